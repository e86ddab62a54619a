"""Dense-target weights: adjusted for the drift of their inputs, before they are pruned.

Once earlier blocks are pruned, a matrix sees inputs `Xp` where the dense model has `Xd`. The best dense-target weights
under the pruned inputs (moments divided by the T tokens) are

    Wt = W + alpha W D Hd^-1,        D = (Xd - Xp) Xp^T / T,        Hd the damped Hessian of Xp,

and every solver runs with Wt in place of W. A matrix that writes straight into the residual stream can also correct the
error E that its block's output has on the pruned stream: `Wt = W + alpha (E Xp^T / T) Hd^-1 / g`, g the write gain (how
far the block's output follows the matrix's). E includes the matrix's own drift, so no term for it is added. With the
kind `residual`, a block is observed again after each group of matrices, so later writes see what earlier ones have
corrected.

Shape legend: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.input_groups import InputGroup
from secateur.calibration.stream import Stream, finished_hessians
from secateur.errors import SecateurError
from secateur.models.blocks import Block
from secateur.models.matrices import Matrix
from secateur.numerics.hessian import Hessian, HessianAccumulator, sum_dtype
from secateur.recipe.steps import DenseTarget
from secateur.runtime import distributed

# Where a block adds a product to the residual stream, doubling the product changes the block's output by that product,
# times the residual multiplier. Later layers of the block change the rest; above this share of it, it is not a write.
MAX_REST = 0.5


@dataclass(eq=False)
class Moments:
    """Moments of one group's input.

    Args:
        hessian: its Hessian.
        drift: `(Xd - Xp) Xp^T / T` (C, C).
        error: `E Xp^T / T` (hidden size, C) with E the block output's error; None unless the target is residual.
    """

    hessian: Hessian
    drift: Float[Tensor, "C C"] | None = None
    error: Float[Tensor, "hidden C"] | None = None


def check_all_tokens(stream: Stream) -> None:
    """Check that every matrix sees every token in order: a router may send an expert others, or in another order.

    Raises:
        SecateurError: an expert is among them.
    """
    if stream.routed:
        name = min(stream.routed)
        raise SecateurError(
            f"{name} sees the tokens that a router sends it, and pruning may send others, so it has no dense "
            f"target ({len(stream.routed)} such matrices): use ‹settings.target=none›, or leave them dense "
            f"with ‹exclude›"
        )


def dense_target_weights(
    W: Float[Tensor, "R C"], moments: Moments, target: DenseTarget, write_gain: float | None = None
) -> Float[Tensor, "R C"]:
    """The dense-target weights Wt.

    Args:
        W: the dense weights.
        moments: of their inputs.
        target: kind and strength.
        write_gain: how far the residual stream moves when this matrix's output moves by 1; None = it does not write.

    Cost: 3 products with C x C matrices.
    """
    if moments.drift is None or target.strength == 0:
        return W
    # The error of the block's output already includes this matrix's own drift.
    right = W @ moments.drift if write_gain is None or moments.error is None else moments.error / write_gain
    U = moments.hessian.damped.U
    return W + target.strength * ((right @ U.T) @ U)


def observe_moments(
    block: Block,
    stream: Stream,
    groups: list[InputGroup],
    dense_outputs: Sequence[Tensor],
    originals: DenseWeights,
    target: DenseTarget,
    outputs: HiddenStates | None = None,
) -> dict[str, Moments]:
    """The moments of each group's input by its leader's name; `outputs` takes the block's on the pruned stream.

    Cost: two forward passes of the block on all batches, one on each stream.
    """
    assert stream.dense is not None
    sums: dict[str, HessianAccumulator] = {}
    drifts: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    is_residual = target.kind == "residual"
    for index, hidden in enumerate(stream.hidden):
        with originals.restored():
            dense_inputs, _ = _inputs(block, stream, groups, index, stream.dense[index], of_dense=True)
        inputs, output = _inputs(block, stream, groups, index, hidden)
        if outputs is not None:
            outputs.append(output)
        error = (dense_outputs[index].float() - output.float()).flatten(0, -2)
        real = stream.real[index]
        error = error if real is None else error[real.flatten()]
        for name, X in inputs.items():
            if name not in sums:
                sums[name] = HessianAccumulator(X.shape[1], X.device)
                drifts[name] = torch.zeros_like(sums[name].upper)
                if is_residual:
                    errors[name] = torch.zeros(error.shape[1], X.shape[1], dtype=sum_dtype(X.device), device=X.device)
            sums[name].add(X)
            drifts[name] += (dense_inputs[name] - X).T @ X
            if is_residual and len(X) == len(error):
                errors[name] += error.T @ X
    counts = distributed.all_gather({name: each.tokens for name, each in sums.items()})
    for name, each in sums.items():
        for tensor in (each.upper, drifts[name], errors.get(name)):
            if tensor is not None:
                distributed.all_reduce(tensor)
        each.tokens = sum(count[name] for count in counts)
    hessians = finished_hessians(groups, sums, stream.damping)
    return {
        name: Moments(
            hessian,
            (drifts[name] / hessian.tokens).float(),
            (errors[name] / hessian.tokens).float() if is_residual else None,
        )
        for name, hessian in hessians.items()
    }


def _inputs(
    block: Block, stream: Stream, groups: list[InputGroup], index: int, hidden: Tensor, of_dense: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of each group on one batch (tokens, C) in fp32, and the block's output."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, X: Tensor) -> None:
        seen.setdefault(name, []).append(X.to(torch.float32, copy=True))

    output = stream.replay_watched(block, groups, index, hidden, keep, of_dense)
    return {name: torch.cat(parts) for name, parts in seen.items()}, output


def write_gain(block: Block, stream: Stream, matrix: Matrix, input_dim: int) -> float | None:
    """How far the block's output moves when this matrix's output moves by 1; None where it is not a write.

    The matrix is doubled for one batch. A write into the residual stream then changes the block's output by its
    product, times the residual multiplier. Under a normalisation after it (Gemma) it does not.
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
    real = stream.real[0]
    change = change if real is None else change[real.flatten()]
    product = torch.cat(products)
    if product.shape != change.shape or float(product.square().sum()) == 0:
        return None
    gain = float((change * product).sum() / product.square().sum())
    rest = float((change - gain * product).square().sum() / change.square().sum().clamp_min(1e-30))
    return gain if rest <= MAX_REST and abs(gain) > 1e-3 else None


@dataclass(eq=False)
class DenseWeights:
    """A copy of a block's dense matrices, to run the block dense again after some were pruned.

    Args:
        block: the block, still dense.
    """

    block: Block
    copies: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.copies = {id(matrix.parameter): matrix.parameter.data.clone() for matrix in self.block.matrices}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context the block has its dense weights."""
        parameters = {id(matrix.parameter): matrix.parameter for matrix in self.block.matrices}
        pruned = {key: parameter.data for key, parameter in parameters.items()}
        for key, parameter in parameters.items():
            parameter.data = self.copies[key]
        try:
            yield
        finally:
            for key, parameter in parameters.items():
                parameter.data = pruned[key]
