"""Magnitude pruning: remove the smallest weights, look at no data, move nothing."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.gram import Gram
from secateur.pattern import NM, Pattern, keep_all_but_lowest, keep_highest_of_groups
from secateur.solvers.contract import Solved


@dataclass(frozen=True)
class Magnitude:
    """Score `|w|`; unstructured patterns compare within the whole matrix, n:m within groups. Cost: one selection."""

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:  # noqa: ARG002 - uses no data
        if isinstance(pattern, NM):
            keep = keep_highest_of_groups(W.abs(), pattern)
        else:
            keep = keep_all_but_lowest(W.abs(), pattern.num_pruned(*W.shape))
        return Solved(W.masked_fill(~keep, 0.0), keep)
