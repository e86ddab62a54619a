"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): weights times input norms, compared within each row."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.numerics.hessian import Hessian
from secateur.numerics.masks import keep_highest_of_groups, keep_highest_of_rows
from secateur.recipe.patterns import NM, Pattern
from secateur.recipe.solvers import Wanda
from secateur.solvers.base import Solved


def solve_wanda(_options: Wanda, W: Float[Tensor, "R C"], hessian: Hessian, pattern: Pattern) -> Solved:
    """Score `|w_j| sqrt(H_jj)`; no weight moves.

    Unstructured rows lose `round(s R C)` weights in all, with row counts that differ by at most one. Cost: one sort of
    each row.
    """
    score = W.abs() * hessian.input_energy.sqrt()
    if isinstance(pattern, NM):
        keep = keep_highest_of_groups(score, pattern)
    else:
        keep = keep_highest_of_rows(score, pattern.num_pruned(*W.shape))
    return Solved(W.masked_fill(~keep, 0.0), keep)
