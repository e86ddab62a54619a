"""Magnitude pruning: remove the smallest weights, look at no data, move nothing."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.numerics.hessian import Hessian
from secateur.numerics.masks import keep_highest
from secateur.recipe.patterns import Pattern
from secateur.recipe.solvers import Magnitude
from secateur.solvers.base import Solved


def solve_magnitude(_options: Magnitude, W: Float[Tensor, "R C"], _hessian: Hessian, pattern: Pattern) -> Solved:
    """Score `|w|`, compared within the whole matrix, or within each n:m group. Cost: one selection."""
    keep = keep_highest(W.abs(), pattern)
    return Solved(W.masked_fill(~keep, 0.0), keep)
