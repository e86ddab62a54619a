"""The joint choice of an n:m pattern, group by group (the M mask of the paper).

Removing the set P of a group costs `cost(P) = w_P [G_PP]^-1 w_P^T`, with G the inverse of the trailing Hessian on the
group's own columns. Up to 70 patterns a group (4:8) are all tried; above that the set grows greedily, one cheapest
removal at a time, and is then improved by exchanges until none helps.

Shape legend: R rows, M = m columns of a group, N groups, Q patterns, P = m - n pruned weights a group.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.recipe.patterns import NM

MAX_ENUMERATED = 70
EXCHANGE_GAIN = 1e-6  # relative to the cost: smaller gains are rounding


class GroupSearch:
    """Joint costs and multipliers of the groups of one matrix, for any rows.

    Args:
        U: upper triangular (C, C) with `Hd^-1 = U^T U`.
        pattern: the n:m pattern.
    """

    def __init__(self, U: Float[Tensor, "C C"], pattern: NM) -> None:
        """Precompute the inverses of every set of every group, where there are few sets."""
        m = pattern.m
        self.m, self.num_pruned = m, m - pattern.n
        self.exhaustive = pattern.num_masks <= MAX_ENUMERATED
        blocks = torch.stack([U[a : a + m, a : a + m] for a in range(0, len(U), m)])
        self.G = blocks.mT @ blocks
        if self.exhaustive:
            sets = torch.tensor(list(combinations(range(m), self.num_pruned)), device=U.device)
            self.inverses = _embedded_inverses(self.G, sets)
            self.pruned = torch.zeros(len(sets), m, dtype=torch.bool, device=U.device).scatter_(1, sets, True)
            self.weight_of_bit = 1 << torch.arange(m, device=U.device)
            self.set_of_code = torch.zeros(1 << m, dtype=torch.long, device=U.device)
            self.set_of_code[self._code(self.pruned)] = torch.arange(len(sets), device=U.device)

    def _code(self, pruned: Bool[Tensor, "R M"]) -> Tensor:
        return (pruned * self.weight_of_bit).sum(1)

    def best_keep(self, w: Float[Tensor, "R M"], start: int) -> Bool[Tensor, "R M"]:
        """Keep mask of the group at column `start` with the least joint cost."""
        group = start // self.m
        if not self.exhaustive:
            return ~search_by_exchange(self.G[group], w, self.num_pruned)
        moved = torch.einsum("rm,qmk->qrk", w, self.inverses[group])
        cost = (moved * w).sum(-1)
        return ~self.pruned[cost.argmin(0)]

    def multipliers(
        self, removed: Float[Tensor, "R M"], pruned: Bool[Tensor, "R M"], start: int
    ) -> Float[Tensor, "R M"]:
        """`lambda = w_P [G_PP]^-1` of the given set, zero outside P."""
        group = start // self.m
        if self.exhaustive:
            inverse = self.inverses[group][self.set_of_code[self._code(pruned)]]
            return (removed[:, None, :] @ inverse)[:, 0]
        index = pruned.to(torch.uint8).argsort(dim=1, stable=True, descending=True)[:, : self.num_pruned]
        system = self.G[group][index[:, :, None], index[:, None, :]]
        solution = torch.cholesky_solve(removed.gather(1, index)[:, :, None], torch.linalg.cholesky(system))
        return torch.zeros_like(removed).scatter_(1, index, solution[:, :, 0])


def _embedded_inverses(G: Float[Tensor, "N M M"], sets: Tensor) -> Float[Tensor, "N Q M M"]:
    """`[G_PP]^-1` of every group and set, embedded in zeros."""
    rows, columns = sets[:, :, None], sets[:, None, :]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G[:, rows, columns]))
    embedded = G.new_zeros(len(G), len(sets), G.shape[1], G.shape[1])
    embedded[:, torch.arange(len(sets), device=G.device)[:, None, None], rows, columns] = inverse
    return embedded


def search_by_exchange(G: Float[Tensor, "M M"], w: Float[Tensor, "R M"], num_pruned: int) -> Bool[Tensor, "R M"]:
    """Greedy set of `num_pruned` removals a row, improved by exchanges to a 1-exchange optimum of cost(P).

    Works on the tableau `[[G, w], [w^T, 0]]` swept on P (Goodnight 1979): there the cost of adding q is
    `T_qw^2 / T_qq`, of giving p back `T_pw^2 / T_pp` (T_pp then is `[G_PP^-1]_pp`), and every exchange in closed form.
    """
    rows, m = w.shape
    G, w = G / G.diagonal().mean(), w / w.abs().amax().clamp_min(torch.finfo(w.dtype).tiny)  # or squares underflow
    T = torch.zeros(rows, m + 1, m + 1, dtype=w.dtype, device=w.device)
    T[:, :m, :m] = G
    T[:, :m, m] = w
    T[:, m, :m] = w
    pruned = torch.zeros_like(w, dtype=torch.bool)
    everything = torch.ones(rows, dtype=torch.bool, device=w.device)
    for _ in range(num_pruned):
        cost = T[:, :m, m].square() / T.diagonal(dim1=1, dim2=2)[:, :m]
        q = cost.masked_fill(pruned, float("inf")).argmin(1)
        _pivot(T, q, everything)
        pruned.scatter_(1, q[:, None], True)
    for _ in range(4 * m):
        gain, p, q = _best_exchange(T, pruned)
        better = gain > EXCHANGE_GAIN * T[:, m, m].abs()
        if not bool(better.any()):
            break
        _pivot(T, p, better)
        _pivot(T, q, better)
        pruned[better, p[better]] = False
        pruned[better, q[better]] = True
    return pruned


def _pivot(T: Float[Tensor, "R S S"], k: Tensor, rows: Bool[Tensor, " R"]) -> None:
    """Symmetric sweep of each chosen row's tableau on its own index k, in place; a second sweep undoes the first.

    The sign convention makes it an involution: swept entries hold `-[G_PP]^-1`.
    """
    index = rows.nonzero()[:, 0]
    k = k[index]
    sub = T[index]
    each = torch.arange(len(index), device=T.device)
    pivot = sub[each, k, k]
    column = sub[each, :, k]
    sub = sub - column[:, :, None] * column[:, None, :] / pivot[:, None, None]
    line = column / pivot.abs()[:, None]
    sub[each, k, :] = line
    sub[each, :, k] = line
    sub[each, k, k] = -1 / pivot
    T[index] = sub


def _best_exchange(T: Float[Tensor, "R S S"], pruned: Bool[Tensor, "R M"]) -> tuple[Tensor, Tensor, Tensor]:
    """(gain, p, q): the exchange of pruned p for kept q that lowers cost(P) most, row by row.

    Giving back p lowers the cost by `t_p^2 / a_p` (a_p = [G_PP^-1]_pp) and changes kept q's entries to
    `T_qw - T_qp T_pw / T_pp`, `T_qq - T_qp^2 / T_pp`; adding q then costs their square over it.
    """
    m = pruned.shape[1]
    diagonal = T.diagonal(dim1=1, dim2=2)[:, :m]
    side = T[:, :m, m]
    cross = T[:, :m, :m]
    refund = side.square() / -diagonal
    moved = side[:, None, :] - cross * (side / diagonal)[:, :, None]
    spread = diagonal[:, None, :] - cross.square() / diagonal[:, :, None]
    gain = refund[:, :, None] - moved.square() / spread
    legal = pruned[:, :, None] & ~pruned[:, None, :]
    gain = gain.masked_fill(~legal, -float("inf")).flatten(1)
    best = gain.argmax(1)
    return gain.gather(1, best[:, None])[:, 0], best // m, best % m
