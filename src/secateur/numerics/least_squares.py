"""The full-row refit: least-squares optimum of the kept weights of every row.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.numerics.conjugate_gradients import MaskedInverse, MaskedSolution, Stop, masked_cg
from secateur.numerics.damping import DampedHessian
from secateur.runtime.chunking import chunk_bytes


def refit_rows(
    W: Float[Tensor, "R C"],
    keep: Bool[Tensor, "R C"],
    damped: DampedHessian,
    tolerance: float,
    max_iterations: int,
) -> tuple[Float[Tensor, "R C"], dict[str, Any]]:
    """Joint compensation over whole rows by conjugate gradients.

    Minimises `tr((W' - W) Hd (W' - W)^T)` over W' supported on `keep`. That equals the closed form
    `W - lambda Hinv_P,:` with `lambda = w_P [Hinv_PP]^-1`, the Multiple Removal Problem of arXiv 2410.15567. All rows
    advance together from the pruned original weights. Each row has its preconditioner: the low-rank-plus-diagonal model
    of Hd on the row's kept set, inverted by Woodbury (docs/results.md compares it with others).

    The stop is certified: with r the residual on the kept set, zero elsewhere, the gap to the optimum is at most
    `r Hinv r^T = ||r U^T||^2`, the duality gap. It costs a product, so it is computed only when the last decreases
    promise success.

    Args:
        W: the original weights.
        keep: the kept weights.
        damped: the damped Hessian.
        tolerance: largest gap in loss, relative to the optimal loss.
        max_iterations: iterations after which it stops anyway; the result then has `converged: False`.

    Returns:
        The refit weights, and `iterations`, `kkt_residual` (`||((W - W') Hd) * keep|| / ||((W * pruned) Hd) * keep||`),
        `gap_bound` (the certified relative gap; None where it was never computed), `converged`.

    Cost: one product (R, C) x (C, C) an iteration.
    """
    F, d = damped.low_rank
    rows_at_once = max(1, chunk_bytes(W.device) // 4 // max(F.shape[1] ** 2, W.shape[1]))
    weights, solutions, scale_sq = [], [], 0.0
    for rows in torch.arange(W.shape[0], device=W.device).split(rows_at_once):
        weight, solution, target_sq = refit_by_gradients(
            W[rows], keep[rows], damped.matrix, (F, d), tolerance, max_iterations,
            bound=lambda R: float((R @ damped.U.T).square().sum()),
        )  # fmt: skip
        scale_sq += target_sq
        weights.append(weight)
        solutions.append(solution)
    residual_sq = sum(solution.residual_norm_sq for solution in solutions)
    gap = max(solution.gap for solution in solutions)
    return torch.cat(weights), {
        "iterations": max(solution.iterations for solution in solutions),
        "kkt_residual": (residual_sq / scale_sq) ** 0.5 if scale_sq > 0 else 0.0,
        "gap_bound": gap if math.isfinite(gap) else None,
        "converged": gap <= tolerance,
    }


def refit_by_gradients(
    W: Float[Tensor, "R C"],
    keep: Bool[Tensor, "R C"],
    Hd: Float[Tensor, "C C"],
    low_rank: tuple[Float[Tensor, "C K"], Float[Tensor, " C"]],
    tolerance: float,
    max_iterations: int,
    bound: Callable[[Tensor], float] | None = None,
) -> tuple[Float[Tensor, "R C"], MaskedSolution, float]:
    """The refit of rows at once: weights, how conjugate gradients ended, and the squared norm of their target.

    Args:
        W: the original weights.
        keep: the kept weights.
        Hd: the damped Hessian.
        low_rank: its low-rank-plus-diagonal model.
        tolerance: largest gap in loss, relative to the optimal loss.
        max_iterations: iterations after which it stops anyway.
        bound: upper bound on the gap, given a residual; None = an estimate of the gap decides.
    """
    kept = keep.to(W.dtype)
    start = W * kept
    removed = W - start
    gradient = removed @ Hd
    target = gradient * kept
    stop = Stop(tolerance, max_iterations, float((removed * gradient).sum()), bound)
    solution = masked_cg(Hd, target, kept, MaskedInverse(*low_rank, kept), stop)
    return start + solution.Y, solution, float(target.square().sum())
