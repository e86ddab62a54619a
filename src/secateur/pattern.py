"""Sparsity patterns: which masks are legal, and the exact-count selections that build them.

A *keep mask* is boolean, True = kept. Masks are chosen from *scores*, the cost of removing a weight:
the lowest scores are pruned, and equal scores are pruned in index order, so counts are exact.

Shape legend: R output rows, C input columns, G = C / m groups.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_GROUP = 16


@dataclass(frozen=True)
class Unstructured:
    """Any `sparsity` share of a matrix's weights is zero, wherever they are (0 = dense, 1 = all zero)."""

    sparsity: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0.0 <= self.sparsity <= 1.0):
            hint = f"; for a percentage write {self.sparsity:g}%" if 1 < self.sparsity <= 100 else ""
            raise ValueError(f"sparsity is {self.sparsity:g}; it must lie between 0 (dense) and 1 (all zero){hint}")

    def __str__(self) -> str:
        return f"{self.sparsity * 100:.10g}%"

    def num_pruned(self, rows: int, columns: int) -> int:
        """The exact number of zeros in a matrix: round(sparsity R C)."""
        return round(self.sparsity * (rows * columns))

    def check_width(self, columns: int) -> None:
        """Every width is legal."""

    def is_met_by(self, zero: Bool[Tensor, "R C"]) -> bool:
        """Whether a matrix with zeros at `zero` is at least as sparse as the pattern asks."""
        return int(zero.sum()) >= self.num_pruned(*zero.shape)


@dataclass(frozen=True)
class NM:
    """At most `n` nonzero weights in every `m` consecutive ones along the input dimension."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= MAX_GROUP:
            raise ValueError(
                f"pattern {self.n}:{self.m} is not legal: n:m keeps n of every m weights, "
                f"with 1 <= n < m <= {MAX_GROUP} (for example 2:4)"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.n / self.m

    @property
    def num_masks(self) -> int:
        """How many keep masks a group can have."""
        return math.comb(self.m, self.n)

    def num_pruned(self, rows: int, columns: int) -> int:
        """The exact number of zeros in a matrix."""
        return rows * (columns // self.m) * (self.m - self.n)

    def check_width(self, columns: int) -> None:
        """Raise ValueError unless the groups of m tile a row of `columns` weights."""
        if columns % self.m:
            raise ValueError(
                f"pattern {self} needs an input dimension that is a multiple of {self.m}, but it is {columns}: "
                f"choose another pattern, or exclude the matrix (--exclude)"
            )

    def is_met_by(self, zero: Bool[Tensor, "R C"]) -> bool:
        """Whether every group of m has at least m - n zeros."""
        groups = zero.reshape(zero.shape[0], -1, self.m)
        return bool((groups.sum(-1) >= self.m - self.n).all())


Pattern = Unstructured | NM


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Read `"50%"`, `"0.5"`, `"2:4"`, a number between 0 and 1, or a pattern itself.

    Raises:
        ValueError: where the text is none of these, or its numbers are out of range.
    """
    if isinstance(text, Unstructured | NM):
        return text
    if isinstance(text, Real):
        return Unstructured(float(text))
    if not isinstance(text, str):
        raise ValueError(f"pattern is {text!r}; give a share such as '50%' or 0.5, or n:m such as '2:4'")
    spelled = text.strip()
    if match := re.fullmatch(r"(\d+):(\d+)", spelled):
        return NM(int(match[1]), int(match[2]))
    number = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    if match := re.fullmatch(number + r"\s*%", spelled):
        return Unstructured(float(match[1]) / 100)
    if match := re.fullmatch(number, spelled):
        return Unstructured(float(match[1]))
    raise ValueError(f"pattern {text!r} is not understood: write a share such as 50% or 0.5, or n:m such as 2:4")


def keep_all_but_lowest(score: Float[Tensor, "*shape"], num_pruned: int) -> Bool[Tensor, "*shape"]:
    """Keep mask without the `num_pruned` lowest scores of the whole tensor; ties are pruned in index order."""
    flat = score.reshape(-1)
    if num_pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if num_pruned >= flat.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    # topk and not kthvalue, which has no deterministic form on CUDA.
    threshold = flat.topk(num_pruned, largest=False, sorted=False).values.max()
    pruned = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    pruned[ties[: num_pruned - int(pruned.sum())]] = True
    return ~pruned.reshape(score.shape)


def keep_highest_of_groups(score: Float[Tensor, "R C"], pattern: NM) -> Bool[Tensor, "R C"]:
    """Keep mask with the n highest scores of every m consecutive columns; ties are pruned in index order."""
    columns = score.reshape(score.shape[0], -1, pattern.m).movedim(-1, 0).contiguous()
    # Each weight's rank is the number of weights that go before it: for so few, comparisons beat sorting tenfold.
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=score.device)
    for i in range(pattern.m - 1):
        goes_first = columns[i] <= columns[i + 1 :]
        rank[i + 1 :] += goes_first
        rank[i] += (~goes_first).sum(0, dtype=torch.int8)
    return (rank >= pattern.m - pattern.n).movedim(0, -1).reshape(score.shape)


def keep_highest_of_rows(score: Float[Tensor, "R C"], num_pruned: int) -> Bool[Tensor, "R C"]:
    """Keep mask that prunes row by row, `num_pruned` in all, with row counts that differ by at most one.

    The rows that lose one more are those whose next score is lowest, so permuting rows permutes the mask.
    """
    rows = len(score)
    base, num_extra = divmod(num_pruned, rows)
    order = score.argsort(dim=1, stable=True)
    keep = torch.ones_like(score, dtype=torch.bool)
    keep.scatter_(1, order[:, :base], False)
    if num_extra:
        next_column = order[:, base : base + 1]
        extra = ~keep_all_but_lowest(score.gather(1, next_column)[:, 0], num_extra)
        keep[extra.nonzero()[:, 0], next_column[extra, 0]] = False
    return keep
