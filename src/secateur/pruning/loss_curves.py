"""Loss curves: a matrix's loss at several sparsities, and the sparsities that minimise the sum of all losses.

Shape legend: R output rows, S sampled rows, C input columns, L levels of sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.numerics.damping import inverse_diagonal_of_model
from secateur.numerics.hessian import Hessian
from secateur.numerics.least_squares import refit_by_gradients
from secateur.numerics.masks import keep_highest
from secateur.recipe.patterns import NM, Pattern, Unstructured
from secateur.solvers.base import zero_dead_inputs

SAMPLED_ROWS = 32
NUM_LEVELS = 5
MAX_SPARSITY = 0.98  # no matrix loses everything for the sake of the others
FINE_STEPS = 400


@dataclass(frozen=True, eq=False)
class LossCurve:
    """Loss of a matrix by sparsity.

    Args:
        sparsities: in rising order.
        losses: at each.
        num_weights: of the matrix.
    """

    sparsities: list[float]
    losses: list[float]
    num_weights: int


def loss_curve(
    W: Float[Tensor, "R C"],
    hessian: Hessian,
    fisher: Float[Tensor, " R"],
    levels: Sequence[Pattern],
) -> LossCurve:
    """Loss `sum_r fisher_r (D Hs D^T)_rr` of a single-removal mask with the full-row refit, at several sparsities.

    Measured on at most 32 rows, each of which counts for those of similar Fisher information. For few rows a factor of
    H would take most of the time. So the scores come from a low-rank model of it, and the refit stops at an estimated
    gap of 3%. The mask is chosen by scaled rows, as a solver does it. Hs is the shrunk Hessian: by H, to which the rows
    were fit, wide matrices seem to lose much less than they do on other text (docs/decisions.md).

    Args:
        W: the weights.
        hessian: of their inputs.
        fisher: Fisher information of each output row.
        levels: patterns in order of sparsity.

    Cost: about 30 products (32, C) x (C, C) a level.
    """
    rows, shares = _sampled_rows(fisher)
    live = zero_dead_inputs(W[rows.to(W.device)], hessian)
    sample = live * shares.sqrt()[:, None].to(W)
    Hd, model = hessian.damped.unfactored, hessian.damped.unfactored_low_rank
    score = (live * row_scale(fisher)[rows][:, None].to(W)).square() / inverse_diagonal_of_model(*model)
    sparsities, losses = [], []
    for level in levels:
        keep = keep_highest(score, level)
        D = refit_by_gradients(sample, keep, Hd, model, tolerance=0.03, max_iterations=30)[0] - sample
        sparsities.append(level.sparsity)
        losses.append(_loss(D, hessian))
    return LossCurve(sparsities, losses, W.numel())


def _loss(D: Float[Tensor, "S C"], hessian: Hessian) -> float:
    """Sum over the rows of D of their loss by the shrunk, undamped Hessian."""
    by_H = float(((D @ hessian.H) * D).sum())
    by_diagonal = float((D.square() @ hessian.input_energy).sum())
    return by_H + hessian.shrinkage * (by_diagonal - by_H)


def _sampled_rows(fisher: Float[Tensor, " R"]) -> tuple[Int[Tensor, " S"], Float[Tensor, " S"]]:
    """At most 32 rows, and for each the Fisher information of all rows that it stands for.

    The rows are sorted by Fisher information and cut into equal parts; the middle row stands for its part. A few rows
    can hold most of a matrix's information: rows at equal distances would hit or miss them by chance.
    """
    parts = fisher.argsort(stable=True).tensor_split(min(SAMPLED_ROWS, len(fisher)))
    rows = torch.stack([part[len(part) // 2] for part in parts])
    return rows, torch.stack([fisher[part].sum() for part in parts])


def row_scale(fisher: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Square root of the rows' Fisher information relative to its mean, as a power of two from 1/8 to 8.

    Powers of two scale a row and back without rounding.
    """
    mean = fisher.mean().clamp_min(torch.finfo(fisher.dtype).tiny)
    return (fisher / mean).sqrt().clamp(1 / 8, 8.0).log2().round().exp2()


def curve_levels(pattern: Pattern, spread: float) -> list[Pattern]:
    """Patterns at which a curve is measured, in order of sparsity: over the allowed range, and for n:m every n."""
    if isinstance(pattern, NM):
        return [NM(n, pattern.m) for n in range(pattern.m - 1, 0, -1)]
    low, high = sparsity_bounds(pattern, spread)
    low = min(max(low, 0.05), 0.99)  # the loss at 0 is 0, and has no logarithm
    return [Unstructured(float(s)) for s in torch.linspace(low, max(high, low + 0.01), NUM_LEVELS, dtype=torch.float64)]


def minimise_loss(curves: dict[str, LossCurve], pattern: Pattern, spread: float) -> dict[str, Pattern]:
    """Patterns that minimise the summed loss at the global sparsity, by bisection of the price of a zero.

    Losses are interpolated log-linearly in sparsity, constant beyond the levels. At a price, each matrix takes the
    sparsity where loss minus price x zeros is least.
    """
    names = list(curves)
    weights = torch.tensor([curves[name].num_weights for name in names], dtype=torch.float64)
    low, high = sparsity_bounds(pattern, spread)
    levels = torch.linspace(low, high, FINE_STEPS, dtype=torch.float64)
    losses = torch.stack([_interpolated(curves[name], levels) for name in names])

    def at(log_price: float) -> Tensor:
        return levels[(losses - math.exp(log_price) * weights[:, None] * levels).argmin(1)]

    cheap, dear = -60.0, 60.0
    for _ in range(100):
        price = (cheap + dear) / 2
        too_few = float((at(price) * weights).sum() / weights.sum()) < pattern.sparsity
        cheap, dear = (price, dear) if too_few else (cheap, price)
    wanted = dict(zip(names, at(dear).tolist(), strict=True))
    return exact_patterns(wanted, {name: curves[name].num_weights for name in names}, pattern, low, high)


def prices_of_zeros(curves: dict[str, LossCurve], pattern: Pattern) -> dict[str, float]:
    """What one more zero costs in each matrix at the global sparsity, relative to the median matrix.

    Nothing where the curves have no slope there, such as those of a single level.
    """
    step = 0.01
    around = torch.tensor([pattern.sparsity - step, pattern.sparsity + step], dtype=torch.float64)
    rises = {name: _interpolated(curve, around).diff() / curve.num_weights for name, curve in curves.items()}
    median = float(torch.cat(list(rises.values())).median())
    return {name: float(rise) / median for name, rise in rises.items()} if median > 0 else {}


def sparsity_bounds(pattern: Pattern, spread: float) -> tuple[float, float]:
    """Lowest and highest sparsity that a matrix may get."""
    return max(0.0, pattern.sparsity - spread), max(pattern.sparsity, min(MAX_SPARSITY, pattern.sparsity + spread))


def _interpolated(curve: LossCurve, levels: Float[Tensor, " L"]) -> Float[Tensor, " L"]:
    known = torch.tensor(curve.sparsities, dtype=torch.float64)
    logs = torch.tensor(curve.losses, dtype=torch.float64).clamp_min(1e-30).log()
    right = torch.searchsorted(known, levels).clamp(1, len(known) - 1)
    left = right - 1
    share = ((levels - known[left]) / (known[right] - known[left])).clamp(0.0, 1.0)
    return (logs[left] + share * (logs[right] - logs[left])).exp()


def exact_patterns(
    wanted: Mapping[str, float], num_weights: Mapping[str, int], pattern: Pattern, low: float, high: float
) -> dict[str, Pattern]:
    """Patterns near the wanted sparsities, within the bounds, whose zeros add up to the global number exactly."""
    zeros = {name: round(wanted[name] * num_weights[name]) for name in wanted}
    missing = round(pattern.sparsity * sum(num_weights[name] for name in wanted)) - sum(zeros.values())
    # Rounded outward: else the bounds of many small matrices leave no room for the total.
    bound = {name: math.ceil(high * n) if missing > 0 else math.floor(low * n) for name, n in num_weights.items()}
    room = {name: bound[name] - zeros[name] for name in wanted}
    total = sum(room.values())
    for name in wanted:  # each takes its share of the room, the last ones what is left over
        step = round(missing * room[name] / total) if total else 0
        zeros[name] += step
        missing, total = missing - step, total - room[name]
    return {name: Unstructured(zeros[name] / num_weights[name]) for name in wanted}


def exchange_levels(curves: dict[str, LossCurve], pattern: NM, spread: float) -> dict[str, Pattern]:
    """n:m patterns of one m: while the summed loss falls, one matrix gives a weight a group to another of its size."""
    allowed = pattern.near(spread)
    kept = dict.fromkeys(curves, pattern.n)
    by_size: dict[int, list[str]] = {}
    for name, curve in curves.items():
        by_size.setdefault(curve.num_weights, []).append(name)

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
