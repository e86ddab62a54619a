"""Aim at the dense model: weights that answer for the drift of their inputs, before they are pruned.

Once earlier blocks are pruned, a matrix sees inputs `Xp` where the dense model has `Xd`. The best dense-target weights
under the pruned inputs (moments divided by the T tokens) are

    Wt = W + alpha W D Hd^-1,        D = (Xd - Xp) Xp^T / T,        Hd the damped Gram matrix of Xp,

and every solver runs with Wt in place of W. A matrix that writes straight into the residual stream can also take back
the error E that its block's output has on the pruned stream: `Wt = W + alpha (E Xp^T / T) Hd^-1`. E holds the matrix's
own drift, so that no term for it is added.

Shape legend: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur import parallel
from secateur.capture import InputGroup, Stream, finished_grams
from secateur.gram import Gram, GramAccumulator, sum_dtype
from secateur.model import Block
from secateur.observe import Matrix

KINDS = ("pruned", "dense", "residual")
# A product that is doubled changes the output of its block by itself (times the residual multiplier) if the block adds
# it to the residual stream. What later layers of the block make of it is the rest; above this share, it is no write.
MAX_REST = 0.5


@dataclass(frozen=True)
class Target:
    """What a matrix is fitted to.

    Args:
        kind: `pruned` = its dense weights on pruned inputs (SparseGPT's protocol); `dense` = the dense outputs;
            `residual` = dense, and writes into the residual stream also correct the block's output. A block is then
            observed again after each group of matrices, so that later writes see what earlier ones have mended.
        strength: alpha between 0 (as `pruned`) and 1, which fits few tokens too closely.
        damping: of the Gram matrix that is inverted, relative to its mean diagonal.
    """

    kind: str = "pruned"
    strength: float = 0.25
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"target is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"target strength is {self.strength:g}; it must lie between 0 (pruned) and 1 (fully dense)"
            )


@dataclass(eq=False)
class Moments:
    """What one group's input gives: its Gram matrix, and the moments that a target needs.

    Args:
        drift: `(Xd - Xp) Xp^T / T` (C, C).
        error: `E Xp^T / T` (hidden size, C) with E the block output's error; None where the target isn't residual.
    """

    gram: Gram
    drift: Float[Tensor, "C C"] | None = None
    error: Float[Tensor, "hidden C"] | None = None


def check_all_tokens(stream: Stream) -> None:
    """Raise ValueError for a matrix that a router shows only some tokens: in the pruned model they may be others."""
    if stream.routed:
        name = min(stream.routed)
        raise ValueError(
            f"{name} sees only the tokens that a router sends it, and pruning may send others, so it has no dense "
            f"target ({len(stream.routed)} such matrices): use --target pruned, or leave them out with --exclude"
        )


def aim(
    W: Float[Tensor, "R C"], moments: Moments, target: Target, write_gain: float | None = None
) -> Float[Tensor, "R C"]:
    """The dense-target weights Wt.

    Args:
        write_gain: what the residual stream is moved by, for a move of this matrix's output by 1; None = no write.

    Cost: 3 products with C x C matrices.
    """
    if moments.drift is None or target.strength == 0:
        return W
    # The block output's error holds this matrix's own drift already.
    right = W @ moments.drift if write_gain is None or moments.error is None else moments.error / write_gain
    U = moments.gram.damped(target.damping).U
    return W + target.strength * ((right @ U.T) @ U)


def observe(
    block: Block,
    stream: Stream,
    groups: list[InputGroup],
    dense_outputs: Sequence[Tensor],
    originals: DenseWeights,
    target: Target,
) -> dict[str, Moments]:
    """The moments of each group's input by its leader's name.

    Cost: two forward passes of the block on all batches, one on each stream.
    """
    assert stream.dense is not None
    sums: dict[str, GramAccumulator] = {}
    drifts: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for index, hidden in enumerate(stream.hidden):
        with originals.restored():
            dense_inputs, _ = _inputs(block, stream, groups, index, stream.dense[index])
        inputs, output = _inputs(block, stream, groups, index, hidden)
        error = (dense_outputs[index].float() - output.float()).flatten(0, -2)
        real = stream.padding[index]
        error = error if real is None else error[real.flatten()]
        for name, X in inputs.items():
            if name not in sums:
                sums[name] = GramAccumulator(X.shape[1], X.device)
                drifts[name] = torch.zeros_like(sums[name].upper)
                errors[name] = torch.zeros(error.shape[1], X.shape[1], dtype=sum_dtype(X.device), device=X.device)
            sums[name].add(X)
            drifts[name] += (dense_inputs[name] - X).T @ X
            if target.kind == "residual" and len(X) == len(error):
                errors[name] += error.T @ X
    counts = parallel.gather({name: each.tokens for name, each in sums.items()})
    for name, each in sums.items():
        for tensor in (each.upper, drifts[name], errors[name]):
            parallel.add_up(tensor)
        each.tokens = sum(count[name] for count in counts)
    grams = finished_grams(groups, sums)
    residual = target.kind == "residual"
    return {
        name: Moments(
            gram, (drifts[name] / gram.tokens).float(), (errors[name] / gram.tokens).float() if residual else None
        )
        for name, gram in grams.items()
    }


def _inputs(
    block: Block, stream: Stream, groups: list[InputGroup], index: int, hidden: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of each group on one batch (tokens, C) in fp32, and the block's output."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, X: Tensor) -> None:
        seen.setdefault(name, []).append(X.to(torch.float32, copy=True))

    output = stream.replay_watched(block, groups, index, hidden, keep)
    return {name: torch.cat(parts) for name, parts in seen.items()}, output


def write_gain(block: Block, stream: Stream, matrix: Matrix, input_dim: int) -> float | None:
    """By how much the block's output follows this matrix's output, or None where it doesn't do so by itself.

    The matrix is doubled for one batch. A write into the residual stream then changes the block's output by its own
    product, times the residual multiplier; under a normalisation after it (Gemma) it doesn't.
    """
    products: list[Tensor] = []

    def keep(_name: str, X: Tensor) -> None:
        products.append(X.float() @ matrix.weight(input_dim).float().T)

    hidden, group = stream.hidden[0], InputGroup(matrix, [(matrix, input_dim)])
    before = stream.replay_watched(block, [group], 0, hidden, keep)
    original = matrix.stored.clone()
    try:
        matrix.stored.copy_(2 * original)
        after = stream.replay_watched(block, [group], 0, hidden, lambda _name, _X: None)
    finally:
        matrix.stored.copy_(original)
    change = (after.float() - before.float()).flatten(0, -2)
    real = stream.padding[0]
    change = change if real is None else change[real.flatten()]
    product = torch.cat(products)
    if product.shape != change.shape or float(product.square().sum()) == 0:
        return None
    gain = float((change * product).sum() / product.square().sum())
    rest = float((change - gain * product).square().sum() / change.square().sum().clamp_min(1e-30))
    return gain if rest <= MAX_REST and abs(gain) > 1e-3 else None


@dataclass(eq=False)
class DenseWeights:
    """A copy of a block's matrices as they were, to run it dense again after some were pruned."""

    block: Block
    copies: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copies = {id(matrix.parameter): matrix.parameter.data.clone() for matrix in self.block.matrices}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The block with its dense weights."""
        parameters = {id(matrix.parameter): matrix.parameter for matrix in self.block.matrices}
        pruned = {key: parameter.data for key, parameter in parameters.items()}
        for key, parameter in parameters.items():
            parameter.data = self.copies[key]
        try:
            yield
        finally:
            for key, parameter in parameters.items():
                parameter.data = pruned[key]
