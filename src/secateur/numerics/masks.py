"""Keep masks of an exact count.

A keep mask is boolean, True = kept. It is chosen from scores, the cost of removing each weight: the lowest scores are
pruned, and equal scores are pruned in index order.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.recipe.patterns import NM, Pattern


def is_met(pattern: Pattern, zero: Bool[Tensor, "R C"]) -> bool:
    """Whether a matrix with zeros at `zero` is at least as sparse as the pattern asks, in every group for n:m."""
    if isinstance(pattern, NM):
        groups = zero.reshape(zero.shape[0], -1, pattern.m)
        return bool((groups.sum(-1) >= pattern.m - pattern.n).all())
    return int(zero.sum()) >= pattern.num_pruned(*zero.shape)


def has_exact_count(pattern: Pattern, pruned: Bool[Tensor, "R C"]) -> bool:
    """Whether a mask prunes exactly what the pattern asks, in every group for n:m."""
    return int(pruned.sum()) == pattern.num_pruned(*pruned.shape) and is_met(pattern, pruned)


def keep_highest(score: Float[Tensor, "R C"], pattern: Pattern) -> Bool[Tensor, "R C"]:
    """Keep the highest scores of the whole matrix, or of each n:m group."""
    if isinstance(pattern, NM):
        return keep_highest_of_groups(score, pattern)
    return keep_all_but_lowest(score, pattern.num_pruned(*score.shape))


def keep_all_but_lowest(score: Float[Tensor, "*shape"], num_pruned: int) -> Bool[Tensor, "*shape"]:
    """Prune the `num_pruned` lowest scores of the whole tensor."""
    flat = score.reshape(-1)
    if num_pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if num_pruned >= flat.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _nth_lowest(flat, num_pruned)
    keep = flat > threshold
    if surplus := flat.numel() - num_pruned - int(keep.sum()):  # of several equal scores the first are pruned
        keep[(flat == threshold).nonzero()[-surplus:, 0]] = True
    return keep.reshape(score.shape)


def _nth_lowest(values: Float[Tensor, " n"], n: int) -> Float[Tensor, ""]:
    """The nth of the values in rising order."""
    if values.device.type == "cpu":  # a tenth of topk's time
        return torch.from_numpy(np.partition(values.numpy(), n - 1))[n - 1]
    # topk and not kthvalue, which has no deterministic form on CUDA.
    return values.topk(n, largest=False, sorted=False).values.max()


def keep_highest_of_groups(score: Float[Tensor, "R C"], pattern: NM) -> Bool[Tensor, "R C"]:
    """Keep the n highest scores of every m consecutive columns."""
    columns = score.reshape(score.shape[0], -1, pattern.m).movedim(-1, 0).contiguous()
    # Each weight's rank is the number of weights that go before it: for so few, comparisons beat sorting tenfold.
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=score.device)
    for i in range(pattern.m - 1):
        goes_first = columns[i] <= columns[i + 1 :]
        rank[i + 1 :] += goes_first
        rank[i] += (~goes_first).sum(0, dtype=torch.int8)
    return (rank >= pattern.m - pattern.n).movedim(0, -1).reshape(score.shape)


def keep_highest_of_rows(score: Float[Tensor, "R C"], num_pruned: int) -> Bool[Tensor, "R C"]:
    """Prune `num_pruned` scores in all, row by row, with row counts that differ by at most one.

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


def front_of(mask: Bool[Tensor, "R C"]) -> tuple[Int[Tensor, "R L"], Bool[Tensor, "R L"]]:
    """Column indices where a mask holds, padded to the longest row, and which of them are real."""
    counts = mask.sum(1)
    longest = int(counts.max())
    index = mask.to(torch.uint8).argsort(dim=1, stable=True, descending=True)[:, :longest]
    return index, torch.arange(longest, device=mask.device) < counts[:, None]
