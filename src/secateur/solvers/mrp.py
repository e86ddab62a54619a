"""The Multiple Removal Problem (Zhao et al., EMNLP Findings 2024, arXiv 2410.15567): all pruned weights at once.

Removing the set P of a row jointly has the closed-form optimal update `delta w = -w_P [Hinv_PP]^-1 Hinv_P,:`.
The paper's variants are named by two letters, mask and compensation, each S (single) or M (multiple).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from secateur.gram import Gram
from secateur.linalg import refit_rows
from secateur.pattern import NM, Pattern
from secateur.solvers.contract import Solved, check_refit, live_part, with_dead_part
from secateur.solvers.group_search import MAX_ENUMERATED
from secateur.solvers.sweep import sweep

SWEEP_TILE = 128


@dataclass(frozen=True)
class MRP:
    """Joint removal.

    Args:
        mask: S scores weights one by one; M takes the n:m pattern of a group with the least joint cost (n:m only).
            Where it is not given: M for n:m, S for unstructured patterns.
        compensation: S moves the columns to the right after each column (SparseGPT); M moves jointly.
        block: how far joint compensation reaches. A number sweeps blocks of as many columns with all columns left of
            a block frozen. `all` keeps the mask of that sweep (128 columns a block) and re-optimises every kept
            weight of a row for all its pruned ones at once, from the original weights: the true optimum for the mask.
            With compensation S there is nothing joint to extend: `all` then means blocks of 128.
        damping: added to the Gram matrix's diagonal, relative to its mean over live inputs.
        tolerance: the full-row refit stops when its gap in loss to the optimum is certified to be below this share.
        iterations: most iterations of the full-row refit; reaching it is reported as `converged: False`.
    """

    mask: str | None = None
    compensation: str = "M"
    block: int | str = "all"
    damping: float = 0.01
    tolerance: float = 1e-3
    iterations: int = 200

    def __post_init__(self) -> None:
        for name, rule in (("mask", self.mask or "S"), ("compensation", self.compensation)):
            if rule not in ("S", "M"):
                raise ValueError(f"{name} is {rule!r}; it must be S (single removal) or M (multiple removal)")
        if self.block != "all":
            check_block(self.block)
        check_refit(self.damping, self.tolerance, self.iterations)

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:
        check_mask(self.mask, pattern)
        mask = self.mask or ("M" if isinstance(pattern, NM) else "S")
        damped = gram.damped(self.damping)
        full_row = self.compensation == "M" and self.block == "all"
        tile = self.block if isinstance(self.block, int) else SWEEP_TILE
        live = live_part(W, gram)
        weight, keep = sweep(live, damped, pattern, mask, self.compensation, tile, mask_only=full_row)
        info: dict[str, Any] = {"damping": damped.dampings, "mask": mask}
        if isinstance(pattern, NM) and mask == "M":
            info["mask_search"] = "exhaustive" if pattern.num_masks <= MAX_ENUMERATED else "greedy with exchanges"
        if full_row:
            weight, figures = refit_rows(live, keep, damped, self.tolerance, self.iterations)
            info |= figures
        return with_dead_part(Solved(weight, keep, info), W, gram)


def check_mask(mask: str | None, pattern: Pattern) -> None:
    """Raise ValueError where a mask rule has no form for the pattern."""
    if mask == "M" and not isinstance(pattern, NM):
        raise ValueError(
            f"mask M enumerates the patterns of n:m groups and has no form for the unstructured {pattern}: use mask S, "
            f"or a pattern such as 2:4"
        )


def check_block(block: int | str) -> None:
    """Raise ValueError unless block is a positive number of columns."""
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block is {block!r}; it must be a number of columns, at least 1")
