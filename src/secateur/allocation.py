"""One global sparsity -> one pattern a matrix, and weights for its rows: zeros go where the output feels them least.

Shape legend: T tokens, R output rows, C input columns, L levels of sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur import parallel
from secateur.capture import Batch, Progress, Stream, passes
from secateur.gram import Gram
from secateur.linalg import NotPositiveDefiniteError, refit_rows
from secateur.model import Block
from secateur.observe import Matrix
from secateur.pattern import NM, Pattern, Unstructured, keep_all_but_lowest, keep_highest_of_groups
from secateur.residence import Residence
from secateur.sensitivity import output_sensitivity
from secateur.solvers.contract import live_part

RULES = ("uniform", "owl", "curve")
OUTLIER = 5.0  # OWL's M: an outlier is a score above so many times its matrix's mean
SAMPLED_ROWS = 32
NUM_LEVELS = 5
HIGHEST = 0.98  # no matrix loses everything for the sake of the others
FINE_STEPS = 400


@dataclass(frozen=True)
class Allocation:
    """How zeros are spread over the matrices; their total is exactly the requested share of all weights together.

    Args:
        rule: `uniform`; `owl` = blocks with many outliers lose less (Yin et al., ICML 2024, arXiv 2310.05175);
            `curve` = each matrix's loss is measured at a few sparsities, weighted by what the model's predictions feel
            of each output row, and the sum is minimised; the rows of a matrix compete for its weights by it too.
        spread: how far a matrix's sparsity may lie from the global one.
        windows: calibration sequences that it looks at (all of them where a router shows matrices only some tokens).
        damping: of the Gram matrices behind `curve`, relative to their mean diagonal.
    """

    rule: str = "uniform"
    spread: float = 0.3
    windows: int = 8
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"allocation is {self.rule!r}; it must be one of {', '.join(RULES)}")
        if not 0 < self.spread < 1:
            raise ValueError(f"allocation spread is {self.spread:g}; it must lie between 0 and 1 (default 0.3)")
        if self.windows < 1:
            raise ValueError(f"allocation windows are {self.windows}; at least 1 is needed")


@dataclass(frozen=True, eq=False)
class Allotment:
    """The pattern of each matrix by name, and by what its rows are scaled before a solver chooses among them.

    Scaling a row changes nothing in its own least-squares problem, only its share in an unstructured choice.
    """

    patterns: dict[str, Pattern]
    row_scales: dict[str, Float[Tensor, " R"]] = field(default_factory=dict)


def allocate(
    model: Any,
    blocks: Sequence[Block],
    stream: Stream,
    batches: Sequence[Batch],
    pattern: Pattern,
    allocation: Allocation,
    seed: int,
    progress: Progress,
    residence: Residence,
) -> Allotment:
    """What each matrix gets. Nothing is changed, the stream's state included.

    Cost: none for `uniform`; for the others a dense pass of every block over `windows` sequences with its Gram
    matrices, and for `curve` a backward pass over them too and a refit of 32 rows for each of 5 levels and matrix.

    Raises:
        ValueError: a matrix that saw none of the sequences, or a Gram matrix that can't be factored.
    """
    matrices = [matrix for block in blocks for matrix in block.matrices]
    if allocation.rule == "uniform":
        return Allotment({matrix.name: pattern for matrix in matrices})
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    sequences = sum(sizes) if stream.routed else allocation.windows
    part = _first_sequences(stream, sizes, sequences)
    if allocation.rule == "owl":
        assert isinstance(pattern, Unstructured), "checked by the recipe"
        measured = _over_dense_blocks(blocks, part, _count_outliers, progress, residence)
        block_of = {matrix.name: block.name for block in blocks for matrix in block.matrices}
        return Allotment(_by_outliers(measured, block_of, pattern, allocation))
    levels = _levels(pattern, allocation.spread)
    sensitivity = output_sensitivity(model, blocks, batches, sequences, seed, residence, stream.memory)

    def measure(name: str, W: Tensor, gram: Gram) -> _Curve:
        return loss_curve(W, gram, sensitivity[name], levels, allocation.damping)

    curves = _over_dense_blocks(blocks, part, measure, progress, residence)
    if isinstance(pattern, NM):
        return Allotment(_exchange_levels(curves, pattern, allocation.spread))
    scales = {name: _row_scale(squares) for name, squares in sensitivity.items()}
    return Allotment(_minimise(curves, pattern, allocation.spread), scales)


def _row_scale(sensitivity: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Square root of the rows' sensitivity relative to its mean, as a power of two from 1/8 to 8.

    Powers of two scale a row and back without a rounding.
    """
    mean = sensitivity.mean().clamp_min(torch.finfo(sensitivity.dtype).tiny)
    return (sensitivity / mean).sqrt().clamp(1 / 8, 8.0).log2().round().exp2()


@dataclass(frozen=True, eq=False)
class _Curve:
    """Sparsities in rising order and the loss at each, and how many weights they share."""

    sparsities: list[float]
    losses: list[float]
    weights: int


def _over_dense_blocks(
    blocks: Sequence[Block],
    stream: Stream,
    measure: Callable[[str, Tensor, Gram], Any],
    progress: Progress,
    residence: Residence,
) -> dict[str, Any]:
    """`measure(name, W, gram)` of every matrix in the dense model. The stream is used up.

    The matrices of a block are dealt out to the processes; the figures (plain data) are then everybody's.
    """
    measured: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        with residence.using(block):
            for groups in passes(stream.groups[block.name], stream.memory.gram_bytes):
                grams = stream.observe(block, groups)
                own = {block.matrices[number] for number in parallel.dealt(len(block.matrices))}
                for group in groups:
                    gram = grams.pop(group.leader.name)
                    for matrix, input_dim in group.members:
                        if matrix in own:
                            measured[matrix.name] = _measured(measure, matrix, input_dim, gram)
            stream.hidden = stream.outputs(block)
        progress("allocation", index + 1, len(blocks))
    found = parallel.gather_items(measured)
    return {matrix.name: found[matrix.name] for block in blocks for matrix in block.matrices}


def _measured(measure: Callable[[str, Tensor, Gram], Any], matrix: Matrix, input_dim: int, gram: Gram) -> Any:
    try:
        return measure(matrix.name, matrix.weight(input_dim).float(), gram)
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(f"{matrix.name}: {error}") from error


def _first_sequences(stream: Stream, sizes: Sequence[int], windows: int) -> Stream:
    """The stream's part of the first batches, as many as hold `windows` sequences."""
    enough = int((torch.tensor(sizes).cumsum(0) < windows).sum()) + 1
    count = len(parallel.dealt(min(enough, len(sizes))))
    calls = {name: calls[:count] for name, calls in stream.calls.items()}
    return Stream(
        stream.hidden[:count], calls, stream.padding[:count], stream.groups, stream.routed, memory=stream.memory
    )


def loss_curve(
    W: Float[Tensor, "R C"],
    gram: Gram,
    sensitivity: Float[Tensor, " R"],
    levels: Sequence[Pattern],
    damping: float = 0.01,
) -> _Curve:
    """Loss `sum_r sensitivity_r (D H D^T)_rr` of a single-removal mask with the full-row refit, at several sparsities.

    Measured on at most 32 rows, evenly spread, and scaled to all; the refit stops at a gap of 3%.
    """
    rows = torch.linspace(0, len(W) - 1, min(SAMPLED_ROWS, len(W))).round().long().to(W.device)
    sample = live_part(W[rows], gram) * sensitivity.to(W.device)[rows].sqrt()[:, None].to(W.dtype)
    damped = gram.damped(damping)
    score = sample.square() / damped.U.square().sum(0)
    sparsities, losses = [], []
    for level in levels:
        if isinstance(level, NM):
            keep = keep_highest_of_groups(score, level)
        else:
            keep = keep_all_but_lowest(score, level.num_pruned(*sample.shape))
        D = refit_rows(sample, keep, damped, tolerance=0.03, max_iterations=30)[0] - sample
        sparsities.append(level.sparsity)
        losses.append(float(((D @ gram.xx) * D).sum()) * len(W) / len(rows))
    return _Curve(sparsities, losses, W.numel())


def _levels(pattern: Pattern, spread: float) -> list[Pattern]:
    """Where a curve is measured, in order of sparsity: over the range that a matrix may get."""
    if isinstance(pattern, NM):
        return [NM(n, pattern.m) for n in range(pattern.m - 1, 0, -1)]
    low, high = _bounds(pattern, spread)
    low = max(low, 0.05)  # the loss at 0 is 0, and has no logarithm
    return [Unstructured(float(s)) for s in torch.linspace(low, max(high, low + 0.01), NUM_LEVELS, dtype=torch.float64)]


def _minimise(curves: dict[str, _Curve], pattern: Pattern, spread: float) -> dict[str, Pattern]:
    """Sparsities that minimise the summed loss at the global one, by bisection of the price of a zero.

    Losses are interpolated with their logarithms linear in sparsity (constant beyond the levels). At a price, each
    matrix takes the sparsity where loss minus price x zeros is least.
    """
    names = list(curves)
    weights = torch.tensor([curves[name].weights for name in names], dtype=torch.float64)
    low, high = _bounds(pattern, spread)
    levels = torch.linspace(low, high, FINE_STEPS, dtype=torch.float64)
    losses = torch.stack([_interpolated(curves[name], levels) for name in names])

    def at(log_price: float) -> Tensor:
        return levels[(losses - math.exp(log_price) * weights[:, None] * levels).argmin(1)]

    cheap, dear = -60.0, 60.0
    for _ in range(100):
        price = (cheap + dear) / 2
        too_few = float((at(price) * weights).sum() / weights.sum()) < pattern.sparsity
        cheap, dear = (price, dear) if too_few else (cheap, price)
    return _exact(dict(zip(names, at(dear).tolist(), strict=True)), curves, pattern, low, high)


def _bounds(pattern: Pattern, spread: float) -> tuple[float, float]:
    """The least and the highest sparsity that a matrix may get."""
    return max(0.0, pattern.sparsity - spread), max(pattern.sparsity, min(HIGHEST, pattern.sparsity + spread))


def _interpolated(curve: _Curve, levels: Float[Tensor, " L"]) -> Float[Tensor, " L"]:
    known = torch.tensor(curve.sparsities, dtype=torch.float64)
    logs = torch.tensor(curve.losses, dtype=torch.float64).clamp_min(1e-30).log()
    right = torch.searchsorted(known, levels).clamp(1, len(known) - 1)
    left = right - 1
    share = ((levels - known[left]) / (known[right] - known[left])).clamp(0.0, 1.0)
    return (logs[left] + share * (logs[right] - logs[left])).exp()


def _exact(
    wanted: dict[str, float], curves: dict[str, Any], pattern: Pattern, low: float, high: float
) -> dict[str, Pattern]:
    """Whole numbers of zeros near the wanted sparsities, within the bounds, that add up to the global number."""
    weights = {name: curves[name].weights for name in wanted}
    zeros = {name: round(wanted[name] * weights[name]) for name in wanted}
    missing = round(pattern.sparsity * sum(weights.values())) - sum(zeros.values())
    # Rounded outward, or the bounds of small matrices together would leave no room for the total.
    bound = {name: math.ceil(high * n) if missing > 0 else math.floor(low * n) for name, n in weights.items()}
    room = {name: bound[name] - zeros[name] for name in wanted}
    total = sum(room.values())
    for name in wanted:  # each takes its share of the room, the last ones what is left over
        step = round(missing * room[name] / total) if total else 0
        zeros[name] += step
        missing, total = missing - step, total - room[name]
    return {name: Unstructured(zeros[name] / weights[name]) for name in wanted}


def _exchange_levels(curves: dict[str, _Curve], pattern: NM, spread: float) -> dict[str, Pattern]:
    """Patterns of one m: while the summed loss falls, one matrix gives a weight a group to another of its size."""
    allowed = [n for n in range(1, pattern.m) if abs(n - pattern.n) <= spread * pattern.m + 1e-9]
    kept = dict.fromkeys(curves, pattern.n)
    by_size: dict[int, list[str]] = {}
    for name, curve in curves.items():
        by_size.setdefault(curve.weights, []).append(name)

    def change(name: str, step: int) -> float:
        n = kept[name] + step
        losses = curves[name].losses  # in order of sparsity: index m - 1 - n
        return losses[pattern.m - 1 - n] - losses[pattern.m - 1 - kept[name]] if n in allowed else math.inf

    for names in by_size.values():
        while len(names) > 1:
            gains = min((change(name, +1), name) for name in names)
            loses = min((change(name, -1), name) for name in names if name != gains[1])
            if not gains[0] + loses[0] < 0:
                break
            kept[gains[1]] += 1
            kept[loses[1]] -= 1
    return {name: NM(n, pattern.m) for name, n in kept.items()}


@dataclass(frozen=True)
class _Outliers:
    weights: int
    share: float


def _count_outliers(_name: str, W: Float[Tensor, "R C"], gram: Gram) -> _Outliers:
    score = W.abs() * gram.energy.sqrt()
    return _Outliers(W.numel(), float((score > OUTLIER * score.mean()).float().mean()))


def _by_outliers(
    measured: dict[str, _Outliers], block_of: dict[str, str], pattern: Pattern, allocation: Allocation
) -> dict[str, Pattern]:
    """OWL: a block's sparsity falls linearly with its share of outliers, over a range of twice the spread."""
    blocks: dict[str, list[str]] = {}
    for name in measured:
        blocks.setdefault(block_of[name], []).append(name)
    total = sum(outliers.weights for outliers in measured.values())
    share = {
        block: sum(measured[name].weights * measured[name].share for name in names)
        / sum(measured[name].weights for name in names)
        for block, names in blocks.items()
    }
    width = max(share.values()) - min(share.values())
    scaled = {block: (share[block] - min(share.values())) / width if width else 0.0 for block in blocks}
    mean = sum(scaled[block_of[name]] * measured[name].weights for name in measured) / total
    low, high = _bounds(pattern, allocation.spread)
    wanted = {
        name: min(high, max(low, pattern.sparsity - 2 * allocation.spread * (scaled[block_of[name]] - mean)))
        for name in measured
    }
    return _exact(wanted, measured, pattern, low, high)
