"""The Hessian of a layer's inputs, `H = X X^T / T`: products in fp32, sums over batches in fp64.

The order of the batches changes only the last bits of an fp64 sum, and rounding to fp32 removes those, nearly always.
So ranks that share the batches end with the bits of one process.

Shape legend: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.numerics.damping import DEFAULT_DAMPING, DampedHessian, Damping

BAND = {"cpu": 192}  # rows: 0.6 of a whole product's time from 576 to 4096 columns on a Zen 4
BAND_ON_DEVICE = 2048


@dataclass(eq=False)
class Hessian:
    """An undamped Hessian and what solvers derive from it. Matrices with one input (q, k, v) share it.

    Args:
        H: `X X^T / T` (C, C), fp32 or fp64.
        tokens: number of tokens behind it.
        borrowed: share of it from tokens that a router sends to other experts.
        damping: relative damping of `damped`.
        shrinkage: share of the diagonal in `damped`.
    """

    H: Float[Tensor, "C C"]
    tokens: int
    borrowed: float = 0.0
    damping: float = DEFAULT_DAMPING.relative
    shrinkage: float = 0.0

    @cached_property
    def damped(self) -> DampedHessian:
        """The damped Hessian and its factors, computed once."""
        return DampedHessian(self.H, self.damping, self.shrinkage)

    @property
    def input_energy(self) -> Float[Tensor, " C"]:
        """Mean square of each input."""
        return self.H.diagonal()

    @property
    def dead_inputs(self) -> Tensor:
        """Inputs that are zero on every token (C), boolean."""
        return self.H.diagonal() == 0


def relative_error(pruned: Float[Tensor, "R C"], W: Float[Tensor, "R C"], H: Float[Tensor, "C C"]) -> float:
    """Relative layer error `tr(D H D^T) / tr(W H W^T)`, D = pruned - W, with the undamped H.

    Products in H's dtype, sums in fp64. 0 where W gives no output.
    """
    D = pruned - W
    lost = float(((D @ H) * D).sum(1).cpu().double().sum())
    whole = float(((W @ H) * W).sum(1).cpu().double().sum())
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums over batches; Metal has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


class HessianAccumulator:
    """Sums `x x^T` over tokens; `finish` divides by their number.

    Only the upper triangle is summed, in bands of rows, as torch has no product for a symmetric result. Values below
    the diagonal of `upper` mean nothing.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Start with no token."""
        self.upper = torch.zeros(columns, columns, dtype=sum_dtype(device), device=device)
        self.tokens = 0

    def add(self, X: Float[Tensor, "T C"]) -> None:
        """Add inputs, one token a row, in any floating dtype. Cost: about T C^2 / 2 multiply-adds.

        A product of two bf16 numbers is exact in fp32. So bf16 units, where a CPU has them, lose nothing on inputs in
        bf16, and take a third of the time.
        """
        columns, band = X.shape[1], BAND.get(X.device.type, BAND_ON_DEVICE)
        with _bf16_products() if X.dtype == torch.bfloat16 else nullcontext():
            X = X.float()
            for start in range(0, columns, band):
                end = min(start + band, columns)
                self.upper[start:end, start:] += X[:, start:end].T @ X[:, start:]
        self.tokens += len(X)

    def finish(self, damping: Damping = DEFAULT_DAMPING) -> Hessian:
        """The Hessian of all tokens added, in the memory of the sum. Nothing can be added afterwards."""
        assert self.tokens > 0, "no token was added"
        upper = self.upper.div_(self.tokens).float().triu_()
        shrinkage = damping.shrinkage_of(len(upper), self.tokens)
        return Hessian(upper.add_(upper.triu(1).T), self.tokens, damping=damping.relative, shrinkage=shrinkage)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let a CPU's bf16 units compute products of fp32 tensors whose numbers are all bf16; sums stay fp32."""
    backends: Any = torch.backends  # its settings are not declared
    setting = backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
