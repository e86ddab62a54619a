"""SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774): single removals, column by column."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.gram import Gram
from secateur.pattern import Pattern
from secateur.solvers.contract import Solved, check_damping, live_part, with_dead_part
from secateur.solvers.mrp import check_block
from secateur.solvers.sweep import sweep


@dataclass(frozen=True)
class SparseGPT:
    """The baseline of the field; `mrp` with mask S and compensation S.

    Args:
        block: columns among which an unstructured mask is chosen at once.
        damping: added to the Gram matrix's diagonal, relative to its mean over live inputs.

    Agrees with the authors' code on real matrices (tests/test_golden.py), but prunes the exact count.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_block(self.block)
        check_damping(self.damping)

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:
        damped = gram.damped(self.damping)
        weight, keep = sweep(live_part(W, gram), damped, pattern, mask="S", compensation="S", tile=self.block)
        return with_dead_part(Solved(weight, keep, {"damping": damped.dampings}), W, gram)
