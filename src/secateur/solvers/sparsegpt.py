"""SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774): single removals, column by column."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.numerics.hessian import Hessian
from secateur.recipe.patterns import Pattern
from secateur.recipe.solvers import SparseGPT
from secateur.solvers.base import Solved, restore_dead_inputs, zero_dead_inputs
from secateur.solvers.sweep import sweep


def solve_sparsegpt(options: SparseGPT, W: Float[Tensor, "R C"], hessian: Hessian, pattern: Pattern) -> Solved:
    """The field's baseline: `mrp` with mask S and compensation S.

    Agrees with the authors' code on real matrices (tests/test_golden.py), but prunes the exact count.
    """
    damped, live = hessian.damped, zero_dead_inputs(W, hessian)
    weight, keep = sweep(live, damped, pattern, mask="S", compensation="S", tile=options.block)
    return restore_dead_inputs(Solved(weight, keep, damped.figures), W, hessian)
