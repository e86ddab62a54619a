"""What every solver is: a pure function of the weights, the Gram matrix and the pattern.

A solver is a frozen dataclass; its fields are its options (and become command-line options). It never changes its
arguments, sees no `nn.Module`, and works in the dtype it is given: fp32, or fp64 as an oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.gram import Gram
from secateur.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned matrix: `weight` (R, C), zero wherever `keep` (R, C) is False, and the solver's own figures.

    `info` holds plain numbers: `damping` (every value tried, the last one in force), `iterations`, `kkt_residual`.
    """

    weight: Float[Tensor, "R C"]
    keep: Bool[Tensor, "R C"]
    info: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Solver(Protocol):
    """The call every method answers."""

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved: ...


def check_refit(damping: float, tolerance: float, iterations: int) -> None:
    """Raise ValueError unless these can steer the full-row refit."""
    check_damping(damping)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie between 0 and 1 (default 1e-3)")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is a positive finite number."""
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be a positive number (the field's usual value is 0.01)")
