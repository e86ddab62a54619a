"""Sparsity patterns: unstructured and n:m."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

from secateur.errors import SecateurError

MAX_GROUP = 16


@dataclass(frozen=True)
class Unstructured:
    """Any `sparsity` share of a matrix's weights is zero (0 = dense, 1 = all zero)."""

    sparsity: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0.0 <= self.sparsity <= 1.0):
            hint = f"; for a percentage write {self.sparsity:g}%" if 1 < self.sparsity <= 100 else ""
            raise SecateurError(f"sparsity is {self.sparsity:g}; it must lie between 0 (dense) and 1 (all zero){hint}")

    def __str__(self) -> str:
        percent = f"{self.sparsity * 100:.10g}"
        is_exact = float(percent) / 100 == self.sparsity and not 0 < self.sparsity < 0.01
        return f"{percent}%" if is_exact else repr(self.sparsity)  # `check_asked_pattern` refuses shares such as 0.5%

    def num_pruned(self, rows: int, columns: int) -> int:
        """Exact number of zeros in a matrix: round(sparsity R C)."""
        return round(self.sparsity * (rows * columns))

    def check_width(self, columns: int) -> None:
        """Accept every width."""


@dataclass(frozen=True)
class NM:
    """At most `n` nonzero weights in every `m` consecutive ones along the input dimension."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= MAX_GROUP:
            raise SecateurError(
                f"pattern {self.n}:{self.m} is not legal: n:m keeps n of every m weights, "
                f"with 1 <= n < m <= {MAX_GROUP} (for example 2:4)"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.n / self.m

    def near(self, spread: float) -> list[int]:
        """Numbers that a group of m may keep, within `spread` of this pattern's sparsity."""
        return [n for n in range(1, self.m) if abs(n - self.n) <= spread * self.m + 1e-9]

    @property
    def num_masks(self) -> int:
        """Number of keep masks that a group can have."""
        return math.comb(self.m, self.n)

    def num_pruned(self, rows: int, columns: int) -> int:
        """Exact number of zeros in a matrix."""
        return rows * (columns // self.m) * (self.m - self.n)

    def check_width(self, columns: int) -> None:
        """Check that groups of m tile a row of `columns` weights.

        Raises:
            SecateurError: `columns` is not a multiple of m.
        """
        if columns % self.m:
            raise SecateurError(
                f"pattern {self} needs an input dimension that is a multiple of {self.m}, but it is {columns}: choose "
                f"another ‹pattern›, or leave the matrix dense"
            )


Pattern = Unstructured | NM
SEVERE = 0.6


def is_severe(pattern: Pattern) -> bool:
    """Whether a pattern costs a model so much that presets take other options: n:m, and 60% or more."""
    return isinstance(pattern, NM) or pattern.sparsity >= SEVERE


def check_asked_pattern(text: Any) -> None:
    """Refuse a pattern of a user that most likely means another one.

    Raises:
        SecateurError: `1` and `0`, which would remove every weight or none, and shares below 1% written with a %.
    """
    spelled = str(text).strip() if isinstance(text, int | float | str) else ""
    if re.fullmatch(r"[01](\.0*)?", spelled):
        raise SecateurError(
            f"pattern {text} removes {'every' if spelled[0] == '1' else 'no'} weight: write 50% or 0.5 for half of the "
            f"weights, or 100% or 0% if you mean it"
        )
    if share := re.fullmatch(r"(0?\.\d+)\s*%", spelled):
        raise SecateurError(
            f"pattern {text} is {float(share[1]) / 100:g} of the weights. For {100 * float(share[1]):g}% write "
            f"{100 * float(share[1]):g}%, and for {text} write {float(share[1]) / 100:g}"
        )


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Read `"50%"`, `"0.5"`, `"2:4"`, a number between 0 and 1, or a pattern itself.

    Raises:
        SecateurError: the text is none of these, or its numbers are out of range.
    """
    if isinstance(text, Unstructured | NM):
        return text
    if isinstance(text, Real) and not isinstance(text, bool):
        return Unstructured(float(text))
    if not isinstance(text, str):
        raise SecateurError(f"pattern is {text!r}; give a share such as '50%' or 0.5, or n:m such as '2:4'")
    spelled = text.strip()
    if match := re.fullmatch(r"(\d+):(\d+)", spelled):
        return NM(int(match[1]), int(match[2]))
    number = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    if match := re.fullmatch(number + r"\s*%", spelled):
        if float(match[1]) > 100:
            raise SecateurError(f"sparsity is {spelled}; it must lie between 0% (dense) and 100% (all zero)")
        return Unstructured(float(match[1]) / 100)
    if match := re.fullmatch(number, spelled):
        return Unstructured(float(match[1]))
    raise SecateurError(f"pattern {text!r} is not understood: write a share such as 50% or 0.5, or n:m such as 2:4")
