"""Rounding to 8 bits for the layer's output: errors of some weights make up for those of others.

Coordinate descent on the rounded weights (QuantEase, arXiv 2309.01885), under the mask. One column after the other,
each kept weight takes the value of its row's grid at which the layer error is least, given all others. So no step
raises the error, and it ends where no single weight can be rounded better.

Shape legend: R output rows, C input columns, B columns of a tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.numerics.int8 import LARGEST, TINY, best_scales, from_int8, to_int8

ROUNDS = 4
TILE = 128


def round_to_int8(
    W: Float[Tensor, "R C"], keep: Bool[Tensor, "R C"], H: Float[Tensor, "C C"], dtype: torch.dtype
) -> Float[Tensor, "R C"]:
    """Kept weights as whole numbers times a scale of their row, such that `tr(D H D^T)` is small, D the change.

    The largest weights of a row stay as they are rounded, since the scale is found again from them (`best_scales`).

    Args:
        W: pruned weights, fp32.
        keep: the mask.
        H: the damped Hessian.
        dtype: that the weights are saved in.

    Cost: at most `ROUNDS` R C^2 multiply-adds, and three copies of W.
    """
    scales = best_scales(W.to(dtype))
    rounded = from_int8(to_int8(W, scales), scales, torch.float32)
    is_free = (keep & (rounded.abs() < (LARGEST - 0.5) * scales[:, None])).T
    Wt, found = W.T, rounded.T.contiguous()
    gradient = H @ (found - Wt)
    for _ in range(ROUNDS):
        before = found.clone()
        for a in range(0, len(found), TILE):
            b = min(a + TILE, len(found))
            _descend(found[a:b], gradient[a:b].clone(), H[a:b, a:b], scales, is_free[a:b])
            gradient.addmm_(H[:, a:b], found[a:b] - before[a:b])
        if torch.equal(found, before):
            break
    return found.T.contiguous().add_(0.0)  # -0.0, which would be a kept weight, becomes 0.0


def _descend(
    found: Float[Tensor, "B R"],
    gradient: Float[Tensor, "B R"],
    H: Float[Tensor, "B B"],
    scales: Float[Tensor, " R"],
    is_free: Bool[Tensor, "B R"],
) -> None:
    """Move each column of a tile to its best grid values in turn, in place; `gradient` is `H D`, halved."""
    inverse = 1 / scales.clamp_min(TINY)
    for k in range(len(found)):
        best = (found[k] - gradient[k] / H[k, k]).mul_(inverse).round_().clamp_(-LARGEST, LARGEST).mul_(scales)
        moved = torch.where(is_free[k], best, found[k])
        gradient[k:].addr_(H[k:, k], moved - found[k])
        found[k] = moved
