"""Rounding to 8 bits for the layer's output: errors of some weights make up for those of others.

Coordinate descent on the rounded weights (QuantEase, arXiv 2309.01885), under the mask. One column after the other,
each kept weight takes the value of its row's grid at which the layer's output changes least, given all others. So no
step makes it change more, and it ends where no single weight can be rounded better.

Shape legend: R output rows, C input columns, B columns of a tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.numerics.int8 import LARGEST, from_int8, nonzero, scales_of, to_int8
from secateur.runtime.chunking import chunk_bytes

ROUNDS = 4
TILE = 128
COPIES = 6  # of a chunk of rows


def round_to_int8(
    W: Float[Tensor, "R C"], keep: Bool[Tensor, "R C"], H: Float[Tensor, "C C"], dtype: torch.dtype
) -> Float[Tensor, "R C"]:
    """Kept weights as whole numbers times a scale of their row, in `dtype`, such that `tr(D H D^T)` is small.

    D is the change by rounding. The largest weights of a row stay as they are rounded, since packing finds the scale
    from them (`scales_of`).

    Args:
        W: pruned weights, fp32.
        keep: the mask.
        H: the damped Hessian.
        dtype: that the weights are saved in.

    Cost: at most `ROUNDS + 1` R C^2 multiply-adds; memory for chunks of rows.
    """
    rows = max(1, chunk_bytes(W.device) // (COPIES * 4 * W.shape[1]))
    parts = zip(W.split(rows), keep.split(rows), strict=True)
    return torch.cat([_round_rows(part, kept, H, dtype) for part, kept in parts])


def _round_rows(
    W: Float[Tensor, "R C"], keep: Bool[Tensor, "R C"], H: Float[Tensor, "C C"], dtype: torch.dtype
) -> Float[Tensor, "R C"]:
    scales = scales_of(W.to(dtype))
    values = to_int8(W, scales)
    is_free = (keep & (values.abs() < LARGEST)).T
    found = from_int8(values, scales, torch.float32).T.contiguous()
    gradient = H @ (found - W.T)
    for _ in range(ROUNDS):
        before = found.clone()
        for a in range(0, len(found), TILE):
            b = min(a + TILE, len(found))
            _descend(found[a:b], gradient[a:b].clone(), H[a:b, a:b], scales, is_free[a:b])
            gradient.addmm_(H[:, a:b], found[a:b] - before[a:b])
        if torch.equal(found, before):
            break
    return from_int8(to_int8(found.T, scales), scales, dtype)


def _descend(
    found: Float[Tensor, "B R"],
    gradient: Float[Tensor, "B R"],
    H: Float[Tensor, "B B"],
    scales: Float[Tensor, " R"],
    is_free: Bool[Tensor, "B R"],
) -> None:
    """Move each column of a tile to its best grid values in turn, in place; `gradient` is `H D^T`."""
    steps = nonzero(scales)
    for k in range(len(found)):
        best = (found[k] - gradient[k] / H[k, k]).div_(steps).round_().clamp_(-LARGEST, LARGEST).mul_(scales)
        moved = torch.where(is_free[k], best, found[k])
        gradient[k:].addr_(H[k:, k], moved - found[k])
        found[k] = moved
