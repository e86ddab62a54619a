"""The joint choice of n:m patterns, against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import damp, problem

from secateur.numerics.damping import inverse_factor
from secateur.recipe.patterns import NM
from secateur.solvers.group_search import GroupSearch, search_by_exchange


def costs(G, w, sets):
    """cost(P) = w_P [G_PP]^-1 w_P^T of every row and set."""
    return torch.stack([(torch.linalg.solve(G[P][:, P], w[:, P].T) * w[:, P].T).sum(0) for P in map(list, sets)])


def cost_of(G, w, pruned):
    return torch.stack(
        [costs(G, w[row : row + 1], [pruned[row].nonzero()[:, 0].tolist()])[0, 0] for row in range(len(w))]
    )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2)], ids=str)
def test_enumeration_finds_the_least_cost(pattern):
    W, H = problem(30, 16)
    U = inverse_factor(damp(H))
    search = GroupSearch(U, pattern)
    assert search.exhaustive
    for start in range(0, 16, pattern.m):
        span = U[start : start + pattern.m, start : start + pattern.m]
        w = W[:, start : start + pattern.m].contiguous()
        pruned = ~search.best_keep(w, start)
        best = costs(span.T @ span, w, combinations(range(pattern.m), pattern.m - pattern.n)).amin(0)
        assert torch.allclose(cost_of(span.T @ span, w, pruned), best)


def test_exchange_ends_where_no_exchange_helps_and_near_the_best():
    m, num_pruned = 9, 5
    W, H = problem(40, m)
    G = torch.linalg.inv(damp(H))
    pruned = search_by_exchange(G, W, num_pruned)
    assert bool((pruned.sum(1) == num_pruned).all())
    found = cost_of(G, W, pruned)
    best = costs(G, W, combinations(range(m), num_pruned)).amin(0)
    assert float((found / best).mean()) < 1.03
    for p in range(m):
        for q in range(m):
            rows = (pruned[:, p] & ~pruned[:, q]).nonzero()[:, 0]
            if len(rows):
                other = pruned[rows].clone()
                other[:, p], other[:, q] = False, True
                assert bool((cost_of(G, W[rows], other) >= found[rows] * (1 - 1e-5)).all())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(7, 16)], ids=str)
def test_multipliers_solve_the_pruned_system(pattern):
    W, H = problem(12, 32)
    U = inverse_factor(damp(H))
    search = GroupSearch(U, pattern)
    span = U[pattern.m : 2 * pattern.m, pattern.m : 2 * pattern.m]
    w = W[:, pattern.m : 2 * pattern.m].contiguous()
    pruned = ~search.best_keep(w, pattern.m)
    multipliers = search.multipliers(w * pruned, pruned, pattern.m)
    assert torch.allclose((multipliers @ (span.T @ span)) * pruned, w * pruned, atol=1e-9)
    assert bool((multipliers[~pruned] == 0).all())
