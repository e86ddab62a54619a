"""Checks of the weights and the Hessian that a user passes to `secateur.solve`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError

MAX_WEIGHT = 1e18  # squares of larger ones overflow fp32
MAX_CORRELATION = 1.05  # of two inputs; a Hessian in a narrow dtype is a little above 1
MIN_LOSS = 1e-30  # of the largest weight, with the largest input: fp32 loses the digits of much smaller ones


@torch.no_grad()
def check_problem(W: Any, H: Any) -> None:
    """Check that W (R, C) and H (C, C) are weights and the Hessian of their inputs.

    Raises:
        SecateurError: no tensors, shapes that do not fit, two devices, NaN or infinity, weights whose squares fp32
            can't hold, or an H that is not `X X^T / T`.
    """
    for name, tensor in (("W", W), ("H", H)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.itemsize < 2:
            kind = f"{tensor.dtype} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise SecateurError(f"{name} is a {kind}: give a torch tensor of a floating dtype of 16 bits or more")
    if W.ndim != 2 or not W.numel() or H.shape != (W.shape[1], W.shape[1]):
        raise SecateurError(f"W is {tuple(W.shape)} and H is {tuple(H.shape)}: for W (R, C), H must be (C, C)")
    if W.device != H.device:
        raise SecateurError(f"W is on {W.device} and H on {H.device}: put both on one device")
    for name, tensor in (("W", W), ("H", H)):
        if not bool(torch.isfinite(tensor).all()):
            raise SecateurError(f"{name} holds NaN or infinity")
    largest, in_single = float(W.abs().max()), torch.float64 not in (W.dtype, H.dtype)
    if in_single and largest > MAX_WEIGHT:
        raise SecateurError(f"W holds {largest:.1e}, whose square overflows fp32: scale W down, or pass it in fp64")
    diagonal = H.diagonal()
    if bool((diagonal < 0).any()):
        raise SecateurError("H has a negative diagonal: it is not X X^T / T")
    if in_single and 0 < largest**2 * float(diagonal.max()) < MIN_LOSS:
        raise SecateurError(
            f"W holds {largest:.1e} at most, and H {float(diagonal.max()):.1e}: losses underflow fp32. Scale one of "
            f"them up, or pass it in fp64"
        )
    if not torch.allclose(H, H.T, rtol=1e-2, atol=1e-3 * float(diagonal.max())):
        raise SecateurError("H is not symmetric: it is not X X^T / T")
    dead = diagonal == 0
    if bool(H[dead].any()):
        raise SecateurError(
            f"H has a zero on its diagonal at input {int(dead.nonzero()[0])} and other numbers in that row: it is not "
            f"X X^T / T, or was computed in too narrow a dtype (fp32 is enough)"
        )
    scale = diagonal.sqrt()
    if bool((beyond := H.abs() > MAX_CORRELATION * scale[:, None] * scale).any()):
        i, j = (int(index) for index in beyond.nonzero()[0])
        raise SecateurError(
            f"H[{i}, {j}] is {float(H[i, j]):.2g}, and the diagonal has {float(diagonal[i]):.2g} and "
            f"{float(diagonal[j]):.2g} there: two inputs can't correlate by more than 1, so H is not X X^T / T"
        )
