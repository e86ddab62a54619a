"""The Multiple Removal Problem (Zhao et al., EMNLP Findings 2024, arXiv 2410.15567): all pruned weights at once.

Removing the set P of a row jointly has the closed-form optimal update `delta w = -w_P [Hinv_PP]^-1 Hinv_P,:`.
The paper's variants are named by two letters, mask and compensation, each S (single) or M (multiple).
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from secateur.numerics.damping import DampedHessian
from secateur.numerics.hessian import Hessian
from secateur.numerics.least_squares import refit_rows
from secateur.numerics.masks import keep_all_but_lowest
from secateur.recipe.patterns import NM, Pattern, Unstructured
from secateur.recipe.solvers import MRP
from secateur.solvers.base import Solved, restore_dead_inputs, zero_dead_inputs
from secateur.solvers.group_search import MAX_ENUMERATED
from secateur.solvers.sweep import sweep

SWEEP_TILE = 128
MASK_TILE = 32  # where only the mask is used, narrower tiles choose it from weights that are more up to date


def solve_mrp(options: MRP, W: Float[Tensor, "R C"], hessian: Hessian, pattern: Pattern) -> Solved:
    """A mask by one sweep, then joint compensation: within blocks of columns, or over the full row.

    Within blocks, each block prunes the same share of an unstructured mask, as SparseGPT does. Over the full row, the
    blocks' shares follow from single removals in the whole matrix: attention heads differ in what can be spared.
    With compensation S there is nothing joint to extend over the row: `block: all` then means blocks of 128.
    """
    mask = options.mask or ("M" if isinstance(pattern, NM) else "S")
    damped = hessian.damped
    full_row = options.compensation == "M" and options.block == "all"
    tile = options.block if isinstance(options.block, int) else MASK_TILE if full_row else SWEEP_TILE
    live = zero_dead_inputs(W, hessian)
    quotas = _zeros_of_columns(live, damped, pattern) if full_row and isinstance(pattern, Unstructured) else None
    weight, keep = sweep(live, damped, pattern, mask, options.compensation, tile, mask_only=full_row, quotas=quotas)
    info = damped.figures | {"mask": mask}
    if isinstance(pattern, NM) and mask == "M":
        info["mask_search"] = "exhaustive" if pattern.num_masks <= MAX_ENUMERATED else "greedy with exchanges"
    if full_row:
        weight, figures = refit_rows(live, keep, damped, options.tolerance, options.max_iterations)
        info |= figures
    return restore_dead_inputs(Solved(weight, keep, info), W, hessian)


def _zeros_of_columns(W: Float[Tensor, "R C"], damped: DampedHessian, pattern: Unstructured) -> Int[Tensor, " C"]:
    """How many of each column's weights are among the cheapest single removals of the whole matrix."""
    keep = keep_all_but_lowest(W.square() / damped.inverse_diagonal, pattern.num_pruned(*W.shape))
    return (~keep).sum(0)
