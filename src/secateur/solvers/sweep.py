"""The left-to-right sweep over columns that SparseGPT introduced, with single or joint removal.

A span of columns [a, b) has its mask chosen from the weights as they stand, its pruned weights are removed, and
the columns right of it move to compensate; columns left of the span stay frozen. With `Hd^-1 = U^T U` (U upper),
the inverse of the trailing Hessian is `G = U[a:, a:]^T U[a:, a:]`, and each removal has the form
`W[:, a:] -= E U[a:b, a:]`, so that corrections of a whole tile reach the columns right of it by one product.

Single removal (S), one column j at a time (OBS; SparseGPT, arXiv 2301.00774):  `e = w_j / U_jj`.
Joint removal (M), a span at once (arXiv 2410.15567):  `lambda = w_P [G_PP]^-1`,  `E = lambda U[a:b, a:b]^T`.

Weights and masks are held transposed, (C, R), so that a column of W is contiguous.
Shape legend: R output rows, C input columns, B columns of a span, P pruned weights of a row in the span.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.numerics.conjugate_gradients import Stop, masked_cg
from secateur.numerics.damping import DampedHessian
from secateur.numerics.masks import front_of, keep_all_but_lowest, keep_highest_of_groups
from secateur.recipe.patterns import NM, Pattern, Unstructured
from secateur.runtime.chunking import chunk_bytes
from secateur.solvers.group_search import GroupSearch

COLUMNS_AT_ONCE = 16


def sweep(
    W: Float[Tensor, "R C"],
    damped: DampedHessian,
    pattern: Pattern,
    mask: str,
    compensation: str,
    tile: int,
    mask_only: bool = False,
    quotas: Int[Tensor, " C"] | None = None,
) -> tuple[Float[Tensor, "R C"], Bool[Tensor, "R C"]]:
    """Prune W to the pattern in one sweep; returns (weight, keep).

    Args:
        W: the weights.
        damped: the damped Hessian.
        pattern: that the mask keeps.
        mask: S = lowest `w^2 / [Hinv]_jj`; M = the n:m pattern of least joint cost (n:m only).
        compensation: S = column by column; M = jointly over the tile. The groups of an n:m pattern are chosen one after
            the other, each from weights that made up for the groups before it one by one; then the tile is solved.
        tile: columns among which an unstructured mask is chosen, and after which the rest of the row is updated.
        mask_only: the caller uses the mask alone, so joint updates of a tile need not be exact.
        quotas: zeros of each column of an unstructured mask, added up over the columns of a tile; None = the same share
            in every tile.

    Cost: R C^2 / 2 multiply-adds for the updates, besides the factor of `damped`.
    """
    columns = W.shape[1]
    U = damped.U
    search = GroupSearch(U, pattern) if isinstance(pattern, NM) and "M" in (mask, compensation) else None
    Wt = W.T.clone(memory_format=torch.contiguous_format)  # .contiguous() would alias a W stored transposed
    keep = torch.ones_like(Wt, dtype=torch.bool)
    for i, j in _tiles(columns, tile, pattern):
        errors = torch.zeros_like(Wt[i:j])
        before = Wt[i:j].clone() if search is not None and compensation == "M" and not mask_only else None
        for a, b in _spans(i, j, pattern):
            span = U[a:b, a:b]
            current = Wt[a:b].T
            if search is not None and mask == "M":
                kept = search.best_keep(current, a)
            else:
                kept = _lowest_go(current.square() / _single_variance(span, compensation), pattern, a, b, quotas)
            keep[a:b] = kept.T
            if compensation == "S":
                _remove_columns(Wt[a:b], span, ~keep[a:b], errors[a - i : b - i])
            else:
                multipliers = _multipliers(search, span, current * ~kept, ~kept, a, mask_only)
                errors[a - i : b - i] = span @ multipliers.T
                Wt[a:b] -= span.T @ errors[a - i : b - i]
            if b < j:
                Wt[b:j].addmm_(U[a:b, b:j].T, errors[a - i : b - i], alpha=-1)
        if before is not None:
            pruned = ~keep[i:j].T
            errors = U[i:j, i:j] @ solve_pruned(U[i:j, i:j], before.T * pruned, pruned).T
            Wt[i:j] = before - U[i:j, i:j].T @ errors
        if j < columns:
            Wt[j:].addmm_(U[i:j, j:].T, errors, alpha=-1)
    return Wt.masked_fill_(~keep, 0.0).T.contiguous(), keep.T.contiguous()


def _lowest_go(
    score: Float[Tensor, "R c"], pattern: Pattern, a: int, b: int, quotas: Int[Tensor, " C"] | None
) -> Bool[Tensor, "R c"]:
    """Keep all of columns a to b but those of lowest score: as many go as the quotas, or else the pattern, say."""
    if isinstance(pattern, NM):
        return keep_highest_of_groups(score, pattern)
    if quotas is not None:
        return keep_all_but_lowest(score, int(quotas[a:b].sum()))
    rows = len(score)
    return keep_all_but_lowest(score, pattern.num_pruned(rows, b) - pattern.num_pruned(rows, a))


def _multipliers(
    search: GroupSearch | None,
    span: Float[Tensor, "B B"],
    removed: Float[Tensor, "R B"],
    pruned: Bool[Tensor, "R B"],
    a: int,
    mask_only: bool,
) -> Float[Tensor, "R B"]:
    """Multipliers of a joint removal in the span that begins at column a."""
    if search is not None:
        return search.multipliers(removed, pruned, a)
    return (estimate_pruned if mask_only else solve_pruned)(span, removed, pruned)


def _tiles(columns: int, tile: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    """Column ranges of at most `tile`, cut at whole groups of an n:m pattern."""
    width = tile if isinstance(pattern, Unstructured) else max(pattern.m, tile - tile % pattern.m)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def _spans(i: int, j: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    """Ranges whose mask is chosen at once: the tile, or each n:m group after the weights moved for earlier ones."""
    width = j - i if isinstance(pattern, Unstructured) else pattern.m
    for start in range(i, j, width):
        yield start, start + width


def _single_variance(span: Float[Tensor, "B B"], compensation: str) -> Float[Tensor, " B"]:
    """`[Hinv]_jj` as it stands when j is removed.

    Column by column, all columns left of j are frozen by then: `U_jj^2`. In a joint removal the whole span is still
    free: the diagonal of G.
    """
    return span.diagonal().square() if compensation == "S" else span.square().sum(0)


def _remove_columns(
    Wt: Float[Tensor, "B R"], U: Float[Tensor, "B B"], pruned: Bool[Tensor, "B R"], errors: Float[Tensor, "B R"]
) -> None:
    """Remove the pruned weights of each column in turn, in place; recursion turns most updates into products."""
    width = len(Wt)
    if width > COLUMNS_AT_ONCE:
        half = width // 2
        _remove_columns(Wt[:half], U[:half, :half], pruned[:half], errors[:half])
        Wt[half:].addmm_(U[:half, half:].T, errors[:half], alpha=-1)
        _remove_columns(Wt[half:], U[half:, half:], pruned[half:], errors[half:])
        return
    for k in range(width):
        errors[k] = Wt[k] * pruned[k] / U[k, k]
        Wt[k:].addr_(U[k, k:], errors[k], alpha=-1)


def solve_pruned(
    U: Float[Tensor, "B B"], removed: Float[Tensor, "R B"], pruned: Bool[Tensor, "R B"]
) -> Float[Tensor, "R B"]:
    """Multipliers `lambda = w_P [G_PP]^-1` of every row, zero outside P, with `G = U^T U`.

    Pruned entries are gathered to the front and padded with the identity to the longest row, so that one batched
    Cholesky solves all rows. Cost: R P^3 / 3 multiply-adds.
    """
    G = U.T @ U
    multipliers = torch.zeros_like(removed)
    front, real = front_of(pruned)
    longest = front.shape[1]
    if longest == 0:
        return multipliers
    identity = torch.eye(longest, dtype=U.dtype, device=U.device)
    for rows in torch.arange(len(removed), device=U.device).split(max(1, chunk_bytes(U.device) // 4 // longest**2)):
        index, valid = front[rows], real[rows]
        system = torch.where(valid[:, :, None] & valid[:, None, :], G[index[:, :, None], index[:, None, :]], identity)
        target = removed[rows].gather(1, index) * valid
        solution = torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        multipliers[rows] = torch.zeros_like(removed[rows]).scatter_(1, index, solution * valid)
    return multipliers


def estimate_pruned(
    U: Float[Tensor, "B B"], removed: Float[Tensor, "R B"], pruned: Bool[Tensor, "R B"]
) -> Float[Tensor, "R B"]:
    """The multipliers of `solve_pruned` to an estimated gap of 1e-3, by conjugate gradients: a fifth of its time.

    For sweeps of which only the mask is used.
    """
    G = U.T @ U
    inverse_diagonal = 1 / G.diagonal()
    mask = pruned.to(U.dtype)
    return masked_cg(G, removed, mask, lambda R: R * inverse_diagonal, Stop(tolerance=1e-3, iterations=len(U))).Y
