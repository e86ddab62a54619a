"""Weights in 8 bits: whole numbers from -127 to 127 and one scale for each output row.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LARGEST = 127
SCALE_SHARES = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8)


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype with fewer digits: of a weight that is rounded to both."""
    return max(one, other, key=lambda each: torch.finfo(each).eps)


def widest_scales(W: Float[Tensor, "*stack R C"]) -> Float[Tensor, "*stack R"]:
    """The scale of each row by which its largest weight is 127."""
    return W.abs().amax(-1).float() / LARGEST


def nearest_int8(W: Float[Tensor, "*stack R C"]) -> Float[Tensor, "*stack R C"]:
    """The weights, each rounded by itself at the widest scales, in their dtype."""
    scales = widest_scales(W)
    return from_int8(to_int8(W, scales), scales, W.dtype)


def best_scales(W: Float[Tensor, "*stack R C"]) -> Float[Tensor, "*stack R"]:
    """The scale of each row with the least squared error among `SCALE_SHARES` of the widest one.

    127 times a scale is a number of W's dtype. So the rounded weights, saved in that dtype, have the same scales.
    """
    exact, largest = W.float(), W.abs().amax(-1)
    best, least = widest_scales(W), torch.full_like(largest, torch.inf, dtype=torch.float32)
    for share in SCALE_SHARES:
        scales = (largest * share).float() / LARGEST
        error = (from_int8(to_int8(W, scales), scales, W.dtype).float() - exact).square().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def to_int8(W: Float[Tensor, "*stack R C"], scales: Float[Tensor, "*stack R"]) -> Int8[Tensor, "*stack R C"]:
    """The nearest whole number of each weight."""
    return (W.float() / nonzero(scales)[..., None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def nonzero(scales: Float[Tensor, "*stack R"]) -> Float[Tensor, "*stack R"]:
    """The scales to divide by: 1 for a row of zeros."""
    return torch.where(scales > 0, scales, 1.0)


def from_int8(
    values: Int8[Tensor, "*stack R C"], scales: Float[Tensor, "*stack R"], dtype: torch.dtype
) -> Float[Tensor, "*stack R C"]:
    """The weights that whole numbers and scales stand for. None is -0.0, which packing would take for a kept one."""
    return (values.float() * scales[..., None]).to(dtype).add_(0.0)
