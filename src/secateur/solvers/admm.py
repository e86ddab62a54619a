"""Joint mask search by ADMM, cf. ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831), then the exact refit.

The support of W is free, and only the pattern constrains it:

    minimise tr((W - W0) Hd (W - W0)^T)  subject to  W = D,  D legal for the pattern.

With columns scaled so that diag Hd = 1, the augmented Lagrangian with penalty rho and scaled multiplier U gives

    W = W0 + (D - W0 - U) rho (Hd + rho I)^-1,    D = project(W + U),    U = U + W - D,

where `project` keeps the largest entries. The penalty rises along a fixed geometric schedule, which freezes the mask by
its end. ALPS raises it by how much the mask still moves and works in an eigenbasis of H. A fixed schedule depends on no
weights, so one resolvent `rho (Hd + rho I)^-1` serves all rows for several steps, each a single product; its Cholesky
factor is cheaper than the eigenbasis, and sound in fp32, since rho bounds it away from singularity.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.gram import Gram
from secateur.linalg import Damped, refit_rows
from secateur.pattern import NM, Pattern, keep_all_but_lowest, keep_highest_of_groups
from secateur.solvers.contract import Solved, check_refit, live_part, with_dead_part

STEPS_A_PENALTY = 4


@dataclass(frozen=True)
class ADMM:
    """Joint mask search, any pattern.

    Args:
        search_iterations: steps of the search; 40 end at 0.99 of ALPS's layer error, 16 at about its own.
        penalty_start, penalty_end: the penalty rho at the first and the last step, relative to a scaled diagonal of 1.
            A lower start searches more freely; an end below 0.5 leaves the mask unsettled.
        damping: added to the Gram matrix's diagonal, relative to its mean over live inputs.
        tolerance, iterations: when the final refit stops, as for `mrp`.

    Cost: 2 R C^2 flops a step, and 2 C^3 a penalty.
    """

    search_iterations: int = 40
    penalty_start: float = 0.2
    penalty_end: float = 0.7
    damping: float = 0.01
    tolerance: float = 1e-3
    iterations: int = 200

    def __post_init__(self) -> None:
        check_refit(self.damping, self.tolerance, self.iterations)
        if self.search_iterations < 1:
            raise ValueError(f"search iterations are {self.search_iterations}; at least 1 is needed")
        if not 0 < self.penalty_start <= self.penalty_end < float("inf"):
            raise ValueError(
                f"penalties run from {self.penalty_start:g} to {self.penalty_end:g}: they must be positive and not fall"
            )

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:
        damped, live = gram.damped(self.damping), live_part(W, gram)
        keep, changed = self.search(live, damped, pattern)
        weight, figures = refit_rows(live, keep, damped, self.tolerance, self.iterations)
        info: dict[str, Any] = {"damping": damped.dampings, "search_iterations": self.search_iterations}
        return with_dead_part(Solved(weight, keep, info | {"changed_last": changed} | figures), W, gram)

    def search(self, W: Float[Tensor, "R C"], damped: Damped, pattern: Pattern) -> tuple[Bool[Tensor, "R C"], int]:
        """The keep mask, and how many of its entries the last step still changed."""
        scale = damped.matrix.diagonal().sqrt()
        H = damped.matrix / (scale[:, None] * scale)
        W0 = W * scale
        keep = _project(W0, pattern)
        D, U = W0 * keep, torch.zeros_like(W0)
        changed, penalty, resolvent = 0, 0.0, H
        for step in range(self.search_iterations):
            if step % STEPS_A_PENALTY == 0:
                before, penalty = penalty, self._penalty(step)
                resolvent = _resolvent(H, penalty)
                U *= before / penalty  # U is the multiplier over rho
            U += W0 + (D - W0 - U) @ resolvent
            before_step, keep = keep, _project(U, pattern)
            D = U * keep
            U -= D
            changed = int((keep != before_step).sum())
        return keep, changed

    def _penalty(self, step: int) -> float:
        last = (self.search_iterations - 1) // STEPS_A_PENALTY * STEPS_A_PENALTY
        return self.penalty_start * (self.penalty_end / self.penalty_start) ** (step / last if last else 1.0)


def _project(Z: Float[Tensor, "R C"], pattern: Pattern) -> Bool[Tensor, "R C"]:
    """Keep mask of the nearest legal matrix: of the whole matrix, or of each n:m group, the largest entries."""
    if isinstance(pattern, NM):
        return keep_highest_of_groups(Z.abs(), pattern)
    return keep_all_but_lowest(Z.abs(), pattern.num_pruned(*Z.shape))


def _resolvent(H: Float[Tensor, "C C"], penalty: float) -> Float[Tensor, "C C"]:
    """`rho (H + rho I)^-1`."""
    shifted = H.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).mul_(penalty)
