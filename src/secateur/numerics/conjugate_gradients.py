"""Conjugate gradients on masked rows, all rows at once, and their preconditioner.

Shape legend: R output rows, C input columns, K rank of the preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.runtime.chunking import chunk_bytes


@dataclass(frozen=True)
class Stop:
    """When conjugate gradients stop: at a relative gap of `tolerance`, or after `iterations`.

    Args:
        tolerance: largest relative gap to the optimum.
        iterations: iterations after which they stop anyway.
        loss: objective at the start; the gap is relative to the objective at the optimum. None: relative to the whole
            decrease.
        bound: upper bound on the remaining decrease, given the residual. None: an estimate decides.
    """

    tolerance: float
    iterations: int
    loss: float | None = None
    bound: Callable[[Tensor], float] | None = None


@dataclass(frozen=True, eq=False)
class MaskedSolution:
    """Solution, its iterations, its relative gap (bounded or estimated), and its squared residual norm."""

    Y: Tensor
    iterations: int
    gap: float
    residual_norm_sq: float


def masked_cg(
    A: Float[Tensor, "C C"],
    target: Float[Tensor, "R C"],
    mask: Float[Tensor, "R C"],
    precondition: Callable[[Tensor], Tensor],
    stop: Stop,
) -> MaskedSolution:
    """Solve `(Y A) * mask = target` for Y supported on `mask`, all rows at once, by preconditioned conjugate gradients.

    Equivalent to `target_M [A_MM]^-1` row by row. Minimises `tr(Y A Y^T) - 2 tr(target Y^T)`.

    Args:
        A: symmetric positive definite.
        target: zero outside the mask.
        mask: ones and zeros in A's dtype (a product with a boolean tensor converts it every time).
        precondition: maps residuals to directions, both supported on the mask.
        stop: when to stop.

    Cost: one product (R, C) x (C, C) an iteration.
    """
    Y = torch.zeros_like(target)
    R = target.clone()
    Z = precondition(R)
    P, rz = Z.clone(), (R * Z).sum(1)
    gaps = _Gaps(stop, torch.finfo(A.dtype).eps)
    # Where everything or nothing is pruned, the start is the optimum.
    done = float(rz.sum()) <= torch.finfo(A.dtype).eps ** 2 * (stop.loss or 0.0)
    iteration = 0
    while not done and iteration < stop.iterations:
        AP = (P @ A).mul_(mask)
        step = _ratio_or_zero(rz, (P * AP).sum(1))
        Y.addcmul_(step[:, None], P)
        R.addcmul_(step[:, None], AP, value=-1)
        iteration += 1
        done = gaps.are_closed(float((step * rz).sum()), lambda: target - (Y @ A).mul_(mask))
        if not done:
            Z = precondition(R)
            rz, rz_before = (R * Z).sum(1), rz
            P.mul_(_ratio_or_zero(rz, rz_before)[:, None]).add_(Z)
    return MaskedSolution(Y, iteration, 0.0 if iteration == 0 else gaps.gap, float(R.square().sum()))


class _Gaps:
    """Decides from the decreases of the objective when the rest is small enough.

    Each step's decrease is known. Where decreases shrink by a steady factor q, the rest of their series is
    `decrease * q / (1 - q)`. That estimate fails on plateaus. So where there is a bound, the estimate only says when to
    compute it; a bound above the tolerance says by how much the estimate was too low.
    """

    def __init__(self, stop: Stop, rounding: float) -> None:
        """Start before the first step."""
        self.stop, self.rounding = stop, rounding
        self.gap, self.decrease, self.total, self.ratio, self.too_low_by = math.inf, 0.0, 0.0, 0.0, 1.0

    def are_closed(self, decrease: float, residual: Callable[[], Tensor]) -> bool:
        """Record a step's decrease; True where the gap is within tolerance.

        Args:
            decrease: of the objective.
            residual: forms the true residual, for the bound: the one that the steps carry along drifts from it where
                A is ill-conditioned.
        """
        previous, self.decrease = self.decrease, decrease
        self.total += decrease
        if decrease <= self.rounding**2 * self.total:  # exact to rounding: no step can help any more
            self.gap = self._relative(self.stop.bound(residual())) if self.stop.bound else 0.0
            return True
        if previous <= 0:
            return False
        previous_ratio, self.ratio = self.ratio, decrease / previous
        q = min(0.95, max(self.ratio, previous_ratio if previous_ratio < 1 else 0.0, 0.1))
        estimate = self._relative(decrease * q / (1 - q))
        if self.stop.bound is None:
            self.gap = estimate
        elif estimate * self.too_low_by <= self.stop.tolerance:
            self.gap = self._relative(self.stop.bound(residual()))
            self.too_low_by = min(self.gap / estimate, 10.0)  # on a plateau the factor says little
        return self.gap <= self.stop.tolerance

    def _relative(self, remaining: float) -> float:
        """A decrease relative to the optimum; a loss below the start's rounding counts as that rounding."""
        if self.stop.loss is None:
            return remaining / (self.total + remaining) if remaining > 0 else 0.0
        optimum = self.stop.loss - self.total - remaining
        return remaining / max(optimum, self.rounding * self.stop.loss) if remaining > 0 else 0.0


def _ratio_or_zero(numerator: Float[Tensor, " R"], denominator: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Elementwise ratio, zero where the denominator is (rows that have converged)."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, 0.0)


class MaskedInverse:
    """Applies `(D_K + F_K F_K^T)^-1` on each row's kept set K by Woodbury: it solves systems of the rank's size.

    Cost: R C K^2 / 2 multiply-adds to prepare, 2 R C K to apply; its products with F are formed in strips of columns.
    """

    def __init__(self, F: Float[Tensor, "C K"], d: Float[Tensor, " C"], keep: Float[Tensor, "R C"]) -> None:
        """Invert each row's system of the rank's size."""
        rank = F.shape[1]
        i, j = torch.triu_indices(rank, rank, device=F.device)
        upper = F.new_zeros(len(keep), len(i))
        strip = max(1, chunk_bytes(F.device) // (F.element_size() * len(i)))
        by_rank = F.T.contiguous().split(strip, 1)  # gathering rows is faster than columns
        for part, model, variance in zip(keep.split(strip, 1), by_rank, d.split(strip), strict=True):
            upper.addmm_(part, model[i].mul_(model[j]).div_(variance).T)
        core = F.new_empty(len(keep), rank, rank)
        core[:, i, j] = upper
        core[:, j, i] = upper
        core.diagonal(dim1=1, dim2=2).add_(1.0)
        self.core_inverse = torch.cholesky_inverse(torch.linalg.cholesky(core))
        self.F, self.inverse_d, self.keep = F, 1 / d, keep

    def __call__(self, R: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """The preconditioned residuals."""
        scaled = R * self.inverse_d
        weights = torch.einsum("rkl,rl->rk", self.core_inverse, scaled @ self.F)
        return scaled.sub_((weights @ self.F.T).mul_(self.inverse_d)).mul_(self.keep)
