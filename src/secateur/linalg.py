"""The linear algebra that solvers share: damping, the inverse factor, and the full-row refit.

Shape legend: R output rows, C input columns, B columns of a tile, K rank of the preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.workspace import chunk_bytes

DAMPING_GROWTH = 10.0
MAX_DAMPING_RETRIES = 3
MAX_PRECONDITIONER_RANK = 64
SUBSPACE_ITERATIONS = 2


class NotPositiveDefiniteError(ValueError):
    """The Gram matrix stayed indefinite after every permitted increase of the damping."""


@dataclass(eq=False)
class Damped:
    """`Hd = H + damping * mean(diag H) * I` and what is derived from it, each computed once when first asked.

    The mean runs over live columns. A dead input (`H_jj = 0`) gets the mean as its diagonal: it is decoupled
    from the others (H is positive semi-definite, so its row is zero), and neither their damping nor their
    conditioning sees it.

    Args:
        H: Gram matrix (C, C), undamped, fp32 or fp64.
        damping: relative damping (method: 0.01).
    """

    H: Float[Tensor, "C C"]
    damping: float

    @cached_property
    def dead(self) -> Bool[Tensor, " C"]:
        return self.H.diagonal() == 0

    @cached_property
    def _factored(self) -> tuple[Tensor, Tensor, list[float]]:
        """(Hd, U, dampings tried). A failed Cholesky is retried with ten times the damping, three times at most."""
        diagonal = self.H.diagonal()
        live = ~self.dead
        mean = diagonal[live].mean() if live.any() else torch.ones((), dtype=self.H.dtype, device=self.H.device)
        tried = [self.damping * DAMPING_GROWTH**k for k in range(MAX_DAMPING_RETRIES + 1)]
        for attempt, damping in enumerate(tried):
            Hd = self.H.clone()
            Hd.diagonal().add_(damping * mean)
            Hd.diagonal()[self.dead] = mean
            factor = inverse_factor(Hd)
            if factor is not None:
                return Hd, factor, tried[: attempt + 1]
        raise NotPositiveDefiniteError(
            f"the Gram matrix ({len(diagonal)} inputs) is not positive definite even with damping {tried[-1]:g}: "
            f"use more calibration tokens, or a larger --damping"
        )

    @property
    def matrix(self) -> Float[Tensor, "C C"]:
        return self._factored[0]

    @property
    def U(self) -> Float[Tensor, "C C"]:
        """Upper triangular with `inv(Hd) = U^T U`; `inv(Hd[i:, i:]) = U[i:, i:]^T U[i:, i:]` for every i."""
        return self._factored[1]

    @property
    def dampings(self) -> list[float]:
        """Every damping that was tried; the last one is in force."""
        return self._factored[2]

    @cached_property
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The preconditioner's model of Hd. At rank sqrt(C) its per-row systems cost half a product with Hd."""
        return low_rank_plus_diagonal(self.matrix, min(MAX_PRECONDITIONER_RANK, round(len(self.H) ** 0.5)))


def inverse_factor(H: Float[Tensor, "C C"]) -> Float[Tensor, "C C"] | None:
    """Upper triangular U with `H^-1 = U^T U`, or None where H is not numerically positive definite.

    With J the reversal of rows and columns and `J H J = L L^T`, `U = J L^-1 J`: one Cholesky and one triangular
    inverse (2/3 C^3 multiply-adds in all), against Cholesky, inverse and a second Cholesky in SparseGPT's code.
    """
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed) or not bool(L.diagonal().isfinite().all()):
        return None
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1).contiguous()


def low_rank_plus_diagonal(H: Float[Tensor, "C C"], rank: int) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"]]:
    """Nystrom approximation `H ~ F F^T + diag(d)` with d > 0, exact on the diagonal.

    The range is found by subspace iteration from a seeded start (Halko et al. 2011, arXiv 0909.4061); as
    `H - F F^T` is positive semi-definite, d is its diagonal. Cost: 2 * iterations * C^2 * K flops.
    """
    columns = len(H)
    rank = min(rank, columns)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, rank, generator=generator, dtype=H.dtype).to(H.device)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(H @ basis).Q
    image = H @ basis
    core = basis.T @ image
    L, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if int(failed):  # H has a lower rank, to rounding: a little more in the core leaves a little more to d
        core.diagonal().add_(rank * torch.finfo(H.dtype).eps * core.diagonal().max())
        L = torch.linalg.cholesky((core + core.T) / 2)
    F = torch.linalg.solve_triangular(L, image.T, upper=False).T.contiguous()
    diagonal = H.diagonal()
    return F, torch.maximum(diagonal - F.square().sum(1), 1e-3 * diagonal)


def refit_rows(
    W: Float[Tensor, "R C"],
    keep: Bool[Tensor, "R C"],
    damped: Damped,
    tolerance: float,
    max_iterations: int,
) -> tuple[Float[Tensor, "R C"], dict[str, Any]]:
    """Joint compensation over whole rows: the least-squares optimum of the kept weights, by conjugate gradients.

    Minimises `tr((W' - W) Hd (W' - W)^T)` over W' supported on `keep`, which equals the closed form
    `W - lambda Hinv_P,:` with `lambda = w_P [Hinv_PP]^-1` (the paper's Multiple Removal Problem). All rows advance
    together from the pruned original weights, one (R, C) x (C, C) product an iteration. The preconditioner is each
    row's own: the low-rank-plus-diagonal model of Hd on that row's kept set, inverted by Woodbury. It needs fewer
    iterations than the diagonal alone, and than the dual system on the pruned set (docs/solvers.md has both).

    The stop is certified: with r the residual on the kept set (zero on the pruned one), the gap to the optimum is at
    most `r Hinv r^T = ||r U^T||^2`, the duality gap. This costs one product, so it is only formed once the decreases
    of the last steps promise success.

    Args:
        W: the original weights.
        tolerance: largest gap in loss, relative to the optimal loss.
        max_iterations: stop here in any case; the result then says `converged: False`.

    Returns:
        The refit weights, and `iterations`, `kkt_residual` (`||((W - W') Hd) * keep|| / ||((W * pruned) Hd) * keep||`),
        `gap_bound` (the certified relative gap; None where it was never formed), `converged`.
    """
    F, d = damped.low_rank
    rows_at_once = max(1, chunk_bytes(W.device) // 4 // max(F.shape[1] ** 2, W.shape[1]))
    weights, solutions, scale_sq = [], [], 0.0
    for rows in torch.arange(W.shape[0], device=W.device).split(rows_at_once):
        kept = keep[rows].to(W.dtype)
        start = W[rows] * kept
        removed = W[rows] - start
        gradient = removed @ damped.matrix
        loss = float((removed * gradient).sum())
        target = gradient * kept
        scale_sq += float(target.square().sum())
        precondition = MaskedInverse(F, d, kept)
        stop = Stop(tolerance, max_iterations, loss, bound=lambda R: float((R @ damped.U.T).square().sum()))
        solution = masked_cg(damped.matrix, target, kept, precondition, stop)
        weights.append(start + solution.Y)
        solutions.append(solution)
    residual_sq = sum(solution.residual_norm_sq for solution in solutions)
    gap = max(solution.gap for solution in solutions)
    return torch.cat(weights), {
        "iterations": max(solution.iterations for solution in solutions),
        "kkt_residual": (residual_sq / scale_sq) ** 0.5 if scale_sq > 0 else 0.0,
        "gap_bound": gap if math.isfinite(gap) else None,
        "converged": gap <= tolerance,
    }


@dataclass(frozen=True)
class Stop:
    """When conjugate gradients stop: at a relative gap of `tolerance`, or after `iterations`.

    Args:
        loss: objective at the start; the gap is relative to the objective at the optimum. With no loss, it is relative
            to the whole decrease.
        bound: an upper bound on the remaining decrease, given the residual. Without one the estimate decides.
    """

    tolerance: float
    iterations: int
    loss: float | None = None
    bound: Callable[[Tensor], float] | None = None


@dataclass(frozen=True, eq=False)
class MaskedSolution:
    """Y, the iterations it took, the relative gap (bounded or estimated), and the squared residual norm."""

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
        target: zero outside the mask.
        mask: ones and zeros in A's dtype (a product with a boolean tensor converts it every time).
        precondition: maps residuals to directions, both supported on the mask.
    """
    Y = torch.zeros_like(target)
    R = target.clone()
    Z = precondition(R)
    P, rz = Z.clone(), (R * Z).sum(1)
    gaps = _Gaps(stop, torch.finfo(A.dtype).eps)
    # Where nothing is kept, or nothing was pruned, the start is the optimum.
    done = float(rz.sum()) <= torch.finfo(A.dtype).eps ** 2 * (stop.loss or 0.0)
    iteration = 0
    while not done and iteration < stop.iterations:
        AP = (P @ A).mul_(mask)
        step = _ratio_or_zero(rz, (P * AP).sum(1))
        Y.addcmul_(step[:, None], P)
        R.addcmul_(step[:, None], AP, value=-1)
        iteration += 1
        done = gaps.are_closed(float((step * rz).sum()), R)
        if not done:
            Z = precondition(R)
            rz, rz_before = (R * Z).sum(1), rz
            P.mul_(_ratio_or_zero(rz, rz_before)[:, None]).add_(Z)
    return MaskedSolution(Y, iteration, 0.0 if iteration == 0 else gaps.gap, float(R.square().sum()))


class _Gaps:
    """Follows the decreases of the objective and decides when the rest is small enough.

    Conjugate gradients know by how much each step lowers the objective. Where the decreases shrink by a steady factor
    q, the rest of their series is `decrease * q / (1 - q)`. That is an estimate, and fails on plateaus. So where a
    bound is to be had, the estimate only says when to form it; a bound that fails tells by how much it is too low.
    """

    def __init__(self, stop: Stop, rounding: float) -> None:
        self.stop, self.rounding = stop, rounding
        self.gap, self.decrease, self.total, self.ratio, self.too_low_by = math.inf, 0.0, 0.0, 0.0, 1.0

    def are_closed(self, decrease: float, R: Float[Tensor, "R C"]) -> bool:
        """Take note of a step and its residual; True where the gap is within tolerance."""
        previous, self.decrease = self.decrease, decrease
        self.total += decrease
        if decrease <= self.rounding**2 * self.total:  # exact to rounding: no step can help any more
            self.gap = self._relative(self.stop.bound(R)) if self.stop.bound else 0.0
            return True
        if previous <= 0:
            return False
        previous_ratio, self.ratio = self.ratio, decrease / previous
        q = min(0.95, max(self.ratio, previous_ratio if previous_ratio < 1 else 0.0, 0.1))
        estimate = self._relative(decrease * q / (1 - q))
        if self.stop.bound is None:
            self.gap = estimate
        elif estimate * self.too_low_by <= self.stop.tolerance:
            self.gap = self._relative(self.stop.bound(R))
            self.too_low_by = min(self.gap / estimate, 10.0)  # on a plateau the factor says little
        return self.gap <= self.stop.tolerance

    def _relative(self, remaining: float) -> float:
        """Relative to the optimum; a loss below the rounding of where it began counts as that rounding."""
        if self.stop.loss is None:
            return remaining / (self.total + remaining) if remaining > 0 else 0.0
        optimum = self.stop.loss - self.total - remaining
        return remaining / max(optimum, self.rounding * self.stop.loss) if remaining > 0 else 0.0


def _ratio_or_zero(numerator: Float[Tensor, " R"], denominator: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Elementwise ratio that is zero for rows that have converged (denominator 0)."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, 0.0)


class MaskedInverse:
    """Applies `(D_K + F_K F_K^T)^-1` for each row's own kept set K, by Woodbury: only rank-sized systems are solved.

    Cost: R C K^2 / 2 multiply-adds to prepare, 2 R C K to apply.
    """

    def __init__(self, F: Float[Tensor, "C K"], d: Float[Tensor, " C"], keep: Float[Tensor, "R C"]) -> None:
        rank = F.shape[1]
        i, j = torch.triu_indices(rank, rank, device=F.device)
        upper = keep @ (F[:, i] * F[:, j] / d[:, None])
        core = F.new_empty(len(keep), rank, rank)
        core[:, i, j] = upper
        core[:, j, i] = upper
        core.diagonal(dim1=1, dim2=2).add_(1.0)
        self.core_inverse = torch.cholesky_inverse(torch.linalg.cholesky(core))
        self.F, self.inverse_d, self.keep = F, 1 / d, keep

    def __call__(self, R: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        scaled = R * self.inverse_d
        weights = torch.einsum("rkl,rl->rk", self.core_inverse, scaled @ self.F)
        return scaled.sub_((weights @ self.F.T).mul_(self.inverse_d)).mul_(self.keep)
