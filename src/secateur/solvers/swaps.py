"""Exact exchanges: put one pruned weight back and prune another in its place, while that lowers the objective.

Each row keeps `[-A, t; t^T, S]`, its Hessian after the classical sweep operator on the kept set K: `A = [H_KK]^-1`,
`t = A H_KP`, `S` the Schur complement on the pruned set P, with the optimal weights `w_K` and the gradient
`g_P = ((W0 - W) Hd)_P` with it. Exchanging kept i for pruned j lowers the row's loss by exactly

    (g_j + t_ij w_i / A_ii)^2 / (S_jj + t_ij^2 / A_ii)  -  w_i^2 / A_ii

with all kept weights refit (cf. SparseSwaps, arXiv 2512.10922, which moves no weights), and two sweeps carry it out.
Dropping the cheapest weight and then adding the best one is not the same: it stops short of a 1-swap optimum.

Works in fp64, or in fp32 on devices without it. Shape legend: N rows at once, C input columns, K kept, P pruned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.numerics.damping import DampedHessian
from secateur.numerics.hessian import Hessian, sum_dtype
from secateur.numerics.least_squares import refit_rows
from secateur.numerics.masks import front_of
from secateur.recipe.patterns import NM, Pattern
from secateur.recipe.steps import SwapRefinement
from secateur.runtime.chunking import chunk_bytes
from secateur.solvers.base import Solved, restore_dead_inputs, zero_dead_inputs

MAX_COLUMNS = {"cpu": 2048}  # above, a matrix takes hours
MAX_COLUMNS_ON_DEVICE = 8192
ARRAYS_AT_ONCE = 32  # all arrays of a chunk of rows together, in largest temporaries: 0.5 GB on a CPU
ARRAYS_A_ROW = 9  # C x C numbers that live at once while a chunk is set up
MIN_GAIN = 1e-9  # of the row's loss: below it an exchange is rounding
ROUNDING = 1e-15  # the same, of the energy of the row's outputs, as a loss may fall to zero


def refine_by_swaps(
    options: SwapRefinement, W: Float[Tensor, "R C"], solved: Solved, hessian: Hessian, pattern: Pattern
) -> Solved:
    """Improve a solver's mask row by row to a 1-swap optimum, then refit; no row ends with a higher damped loss.

    Exchanges stay within the row (and the n:m group), so counts and patterns hold. The result's `info` adds `swaps`
    (exchanges in all) and `rows_at_optimum`.

    Args:
        options: of the exchanges.
        W: the original weights.
        solved: what a solver made of them.
        hessian: of their inputs.
        pattern: that the mask keeps.

    Raises:
        SecateurError: more columns than the device's limit.

    Cost: 5 C^3 flops a row to begin, 2 C^2 + K P an exchange; rows are taken in chunks that bound the memory.
    """
    check_columns(W.shape[1], W.device)
    damped = hessian.damped
    dtype = sum_dtype(W.device)
    live = zero_dead_inputs(W, hessian)
    H, precise = damped.matrix.to(dtype), live.to(dtype)
    size = max(1, ARRAYS_AT_ONCE * chunk_bytes(W.device) // (ARRAYS_A_ROW * 8 * W.shape[1] ** 2))
    keep = solved.keep.clone()
    swaps = at_optimum = 0
    for rows in torch.arange(len(W), device=W.device).split(size):
        state = SweptRows(precise[rows], keep[rows], H, pattern)
        made, finished = state.exchange(options.max_swaps)
        keep[rows] = state.final_keep
        swaps, at_optimum = swaps + made, at_optimum + finished
    weight, figures = refit_rows(live, keep, damped, options.tolerance, options.max_iterations)
    before = zero_dead_inputs(solved.weight, hessian)
    worse = _row_losses(weight, live, damped) > _row_losses(before, live, damped)
    weight[worse], keep[worse] = before[worse], solved.keep[worse]
    info = solved.info | figures | {"swaps": swaps, "rows_at_optimum": at_optimum}
    return restore_dead_inputs(Solved(weight, keep, info), W, hessian)


def check_columns(columns: int, device: torch.device) -> None:
    """Check that the exchanges of a row of `columns` weights are not too much for the device.

    Raises:
        SecateurError: they are.
    """
    limit = MAX_COLUMNS.get(device.type, MAX_COLUMNS_ON_DEVICE)
    if columns > limit:
        raise SecateurError(
            f"swap refinement of {columns} input columns takes {ARRAYS_A_ROW * columns**2 * 8 / 1e6:.0f} MB and "
            f"{5 * columns**3 / 1e12:.1f} Tflop a row, and is limited to {limit} columns on {device.type}: leave out "
            f"`refine`, leave the matrix dense, or use a GPU"
        )


def _row_losses(weight: Float[Tensor, "R C"], W: Float[Tensor, "R C"], damped: DampedHessian) -> Float[Tensor, " R"]:
    D = weight - W
    return ((D @ damped.matrix) * D).sum(1)


class SweptRows:
    """The swept Hessians of a chunk of rows, all advanced together; rows at their optimum drop out."""

    def __init__(
        self, W: Float[Tensor, "N C"], keep: Bool[Tensor, "N C"], H: Float[Tensor, "C C"], pattern: Pattern
    ) -> None:
        """Sweep the Hessian of each row on its kept set."""
        self.pattern, self.keep = pattern, keep.clone()
        self.final_keep = keep.clone()
        self.rows = torch.arange(len(W), device=W.device)
        k = keep.to(W.dtype)
        kk = k[:, :, None] * k[:, None, :]
        system = kk * H
        system.diagonal(dim1=1, dim2=2).add_(1 - k)
        A = torch.cholesky_inverse(torch.linalg.cholesky(system)).mul_(kk)
        t = A @ H
        target = W @ H
        kept_weights = (A @ target[:, :, None])[:, :, 0]
        self.v = torch.where(keep, kept_weights, target - kept_weights @ H)  # w on K, g on P
        self.least_gain = ROUNDING * (W * target).sum(1)
        self.loss = ((W - kept_weights) * (target - kept_weights @ H)).sum(1)
        cross = keep[:, :, None] & ~keep[:, None, :]
        schur = H - t.mT @ H
        self.M = torch.where(kk.bool(), -A, torch.where(cross, t, torch.where(cross.mT, t.mT, schur)))

    def exchange(self, max_swaps: int) -> tuple[int, int]:
        """Make the best exchange of each row until none helps; returns exchanges made and rows at a 1-swap optimum."""
        find: Callable[[], tuple[Tensor, Tensor, Tensor]] = (
            self._best_in_groups if isinstance(self.pattern, NM) else self._best_in_rows
        )
        made = finished = 0
        for step in range(max_swaps + 1):
            if len(self.rows) == 0:
                break
            gain, i, j = find()
            improves = gain > (MIN_GAIN * self.loss).maximum(self.least_gain)
            finished += int((~improves).sum())
            if not bool(improves.all()):
                self._drop(improves)
                gain, i, j = gain[improves], i[improves], j[improves]
            if step == max_swaps or len(self.rows) == 0:
                break
            self._sweep(i, inverse=True)
            self._sweep(j, inverse=False)
            self.loss -= gain
            self.keep.scatter_(1, i[:, None], False).scatter_(1, j[:, None], True)
            made += len(i)
        self.final_keep[self.rows] = self.keep
        return made, finished

    def _drop(self, stays: Bool[Tensor, " N"]) -> None:
        self.final_keep[self.rows] = self.keep
        self.rows, self.keep = self.rows[stays], self.keep[stays]
        self.loss, self.least_gain = self.loss[stays], self.least_gain[stays]
        self.M, self.v = self.M[stays], self.v[stays]

    def _best_in_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gain, kept i, pruned j) over all pairs of a row."""
        kept, is_kept = front_of(self.keep)
        pruned, is_pruned = front_of(~self.keep)
        if kept.shape[1] == 0 or pruned.shape[1] == 0:
            nothing = torch.zeros(len(self.keep), dtype=torch.long, device=self.keep.device)
            return nothing.to(self.v.dtype), nothing, nothing
        some_rows = self.M.gather(1, kept[:, :, None].expand(-1, -1, self.M.shape[2]))
        t = some_rows.gather(2, pruned[:, None, :].expand(-1, kept.shape[1], -1))
        diagonal = self.M.diagonal(dim1=1, dim2=2)
        A, S = -diagonal.gather(1, kept), diagonal.gather(1, pruned)
        gain = _gain(
            t, self.v.gather(1, kept)[:, :, None], A[:, :, None], self.v.gather(1, pruned)[:, None, :], S[:, None, :]
        )
        gain.masked_fill_(~(is_kept[:, :, None] & is_pruned[:, None, :]), -torch.inf)
        best, place = gain.flatten(1).max(1)
        i, j = place // pruned.shape[1], place % pruned.shape[1]
        return best, kept.gather(1, i[:, None])[:, 0], pruned.gather(1, j[:, None])[:, 0]

    def _best_in_groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gain, kept i, pruned j) over the pairs within the n:m groups of a row."""
        assert isinstance(self.pattern, NM)
        n, columns = self.keep.shape
        m, groups = self.pattern.m, columns // self.pattern.m
        t = self.M.view(n, groups, m, groups, m).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # N, G, i, j
        diagonal = self.M.diagonal(dim1=1, dim2=2).reshape(n, groups, m)
        v, keep = self.v.view(n, groups, m), self.keep.view(n, groups, m)
        pair = keep[..., :, None] & ~keep[..., None, :]
        gain = _gain(t, v[..., :, None], -diagonal[..., :, None], v[..., None, :], diagonal[..., None, :])
        best, place = gain.masked_fill(~pair, -torch.inf).flatten(1).max(1)
        group, i, j = place // (m * m), place // m % m, place % m
        return best, group * m + i, group * m + j

    def _sweep(self, pivot: Int[Tensor, " N"], inverse: bool) -> None:
        """Move one column of each row into the kept set, or (inverse) out of it."""
        index = torch.arange(len(pivot), device=pivot.device)
        column = self.M[index, :, pivot]
        d = column[index, pivot]
        scaled = column / d[:, None]
        v_pivot = self.v[index, pivot]
        self.M.baddbmm_(scaled[:, :, None], column[:, None, :], alpha=-1)
        self.v.addcmul_(scaled, v_pivot[:, None], value=-1)
        sign = -1.0 if inverse else 1.0
        self.M[index, :, pivot] = sign * scaled
        self.M[index, pivot, :] = sign * scaled
        self.M[index, pivot, pivot] = -1 / d
        self.v[index, pivot] = sign * v_pivot / d


def _gain(t: Tensor, w: Tensor, A: Tensor, g: Tensor, S: Tensor) -> Tensor:
    """By how much the loss falls. What A or S can't be (not positive) belongs to pairs that the caller masks."""
    share = t / A
    return (g + share * w).square() / (S + share * t) - w.square() / A
