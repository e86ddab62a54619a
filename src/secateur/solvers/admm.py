"""Joint mask search by ADMM, cf. ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831), then the exact refit.

The support of W is free, and only the pattern constrains it:

    minimise tr((W - W0) Hd (W - W0)^T)  subject to  W = D,  D legal for the pattern.

With columns scaled so that diag Hd = 1, the augmented Lagrangian with penalty rho and scaled multiplier U gives

    W = W0 + (D - W0 - U) rho (Hd + rho I)^-1,    D = project(W + U),    U = U + W - D,

where `project` keeps the largest entries. D begins with the weights whose single removals cost most. The penalty rises
along a fixed geometric schedule, which freezes the mask by its end. ALPS raises it by how much the mask still moves,
and works in an eigenbasis of H. A fixed schedule depends on no weights, so one resolvent `rho (Hd + rho I)^-1` serves
all rows for several steps of one product each. Its Cholesky factor is cheaper than the eigenbasis and stable in fp32,
as rho keeps it away from singularity.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.numerics.damping import DampedHessian
from secateur.numerics.hessian import Hessian
from secateur.numerics.least_squares import refit_rows
from secateur.numerics.masks import keep_highest
from secateur.recipe.patterns import Pattern
from secateur.recipe.solvers import ADMM
from secateur.solvers.base import Solved, restore_dead_inputs, zero_dead_inputs

STEPS_A_PENALTY = 4


def solve_admm(options: ADMM, W: Float[Tensor, "R C"], hessian: Hessian, pattern: Pattern) -> Solved:
    """Joint mask search for any pattern, then the full-row refit.

    Cost: 2 R C^2 flops a step, and 2 C^3 a penalty.
    """
    damped, live = hessian.damped, zero_dead_inputs(W, hessian)
    keep, changed = search_mask(options, live, damped, pattern)
    weight, figures = refit_rows(live, keep, damped, options.tolerance, options.max_iterations)
    search = {"search_iterations": options.search_iterations, "changed_last": changed}
    return restore_dead_inputs(Solved(weight, keep, damped.figures | search | figures), W, hessian)


def search_mask(
    options: ADMM, W: Float[Tensor, "R C"], damped: DampedHessian, pattern: Pattern
) -> tuple[Bool[Tensor, "R C"], int]:
    """The keep mask, and how many of its entries the last step still changed."""
    scale = damped.matrix.diagonal().sqrt()
    H = damped.matrix / (scale[:, None] * scale)
    W0 = W * scale
    keep = _project(W / damped.inverse_diagonal.sqrt(), pattern)
    D, U = W0 * keep, torch.zeros_like(W0)
    changed, penalty, resolvent = 0, 0.0, H
    for step in range(options.search_iterations):
        if step % STEPS_A_PENALTY == 0:
            before, penalty = penalty, _penalty(options, step)
            resolvent = _resolvent(H, penalty)
            U *= before / penalty  # U is the multiplier over rho
        U += W0 + (D - W0 - U) @ resolvent
        before_step, keep = keep, _project(U, pattern)
        D = U * keep
        U -= D
        changed = int((keep != before_step).sum())
    return keep, changed


def _penalty(options: ADMM, step: int) -> float:
    last = (options.search_iterations - 1) // STEPS_A_PENALTY * STEPS_A_PENALTY
    return options.penalty_start * (options.penalty_end / options.penalty_start) ** (step / last if last else 1.0)


def _project(Z: Float[Tensor, "R C"], pattern: Pattern) -> Bool[Tensor, "R C"]:
    """Keep mask of the nearest legal matrix."""
    return keep_highest(Z.abs(), pattern)


def _resolvent(H: Float[Tensor, "C C"], penalty: float) -> Float[Tensor, "C C"]:
    """`rho (H + rho I)^-1`."""
    shifted = H.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).mul_(penalty)
