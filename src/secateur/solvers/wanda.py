"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): weights times activation norms, compared within each row."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.gram import Gram
from secateur.pattern import NM, Pattern, keep_highest_of_groups, keep_highest_of_rows
from secateur.solvers.contract import Solved


@dataclass(frozen=True)
class Wanda:
    """Score `|w_j| sqrt(H_jj)`; no weight moves.

    Unstructured rows lose `round(s R C)` weights in all, equally but for one. Cost: one sort of each row.
    """

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:
        score = W.abs() * gram.energy.sqrt()
        if isinstance(pattern, NM):
            keep = keep_highest_of_groups(score, pattern)
        else:
            keep = keep_highest_of_rows(score, pattern.num_pruned(*W.shape))
        return Solved(W.masked_fill(~keep, 0.0), keep)
