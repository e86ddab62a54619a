"""Swap refinement against brute force: every possible exchange is tried in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import damp, loss, problem, refit_oracle

import secateur
from secateur.numerics.masks import is_met
from secateur.recipe.patterns import NM, Unstructured
from secateur.runtime.chunking import max_chunk_bytes
from secateur.solvers import swaps

cases = pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(3, 8)], ids=str)


def refined(W, H, pattern, solver="magnitude", **options):
    return secateur.solve(W, H, pattern, solver, refine=options)


def optimal_loss(W, H, row, keep):
    """The damped loss of one row with its kept weights refit, by a dense solve."""
    Hd, w = damp(H), W[row]
    kept = keep.nonzero()[:, 0]
    new = torch.zeros_like(w)
    new[kept] = torch.linalg.solve(Hd[kept][:, kept], (w @ Hd)[kept])
    return float((new - w) @ Hd @ (new - w))


def exchanges(keep, pattern):
    """Every (kept, pruned) pair of a row that may be exchanged."""
    for i in keep.nonzero()[:, 0].tolist():
        for j in (~keep).nonzero()[:, 0].tolist():
            if not isinstance(pattern, NM) or i // pattern.m == j // pattern.m:
                yield i, j


@cases
def test_no_single_exchange_improves_the_result(pattern):
    W, H = problem(rows=4, columns=16)
    solved = refined(W, H, pattern)
    assert solved.info["rows_at_optimum"] == len(W)
    for row in range(len(W)):
        reached = optimal_loss(W, H, row, solved.keep[row])
        for i, j in exchanges(solved.keep[row], pattern):
            other = solved.keep[row].clone()
            other[i], other[j] = False, True
            assert optimal_loss(W, H, row, other) >= reached * (1 - 1e-8)


@cases
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt", "mrp", "admm"])
def test_no_row_gets_worse_and_counts_hold(pattern, solver):
    W, H = problem(rows=12, columns=48)
    before, after = secateur.solve(W, H, pattern, solver), refined(W, H, pattern, solver)
    for row in range(len(W)):
        one = slice(row, row + 1)
        assert loss(after.weight[one], W[one], H, 0.01) <= loss(before.weight[one], W[one], H, 0.01) * (1 + 1e-9)
    assert torch.equal(after.keep.sum(1), before.keep.sum(1))
    assert int((~after.keep).sum()) == pattern.num_pruned(*W.shape)
    assert is_met(pattern, after.weight == 0)
    assert loss(after.weight, W, H) < 0.999 * loss(before.weight, W, H)


@cases
def test_kept_weights_are_optimal_for_the_new_mask(pattern):
    W, H = problem(rows=12, columns=48)
    solved = refined(W, H, pattern)
    oracle = refit_oracle(W, H, solved.keep)
    assert loss(solved.weight, W, H, 0.01) <= loss(oracle, W, H, 0.01) * (1 + 1e-4)


def test_predicted_gain_is_the_true_one():
    """One exchange lowers the exact loss by what the formula said."""
    W, H = problem(rows=6, columns=24)
    keep = secateur.solve(W, H, "50%", solver="wanda").keep
    state = swaps.SweptRows(W, keep, damp(H), Unstructured(0.5))
    before = [optimal_loss(W, H, row, keep[row]) for row in range(len(W))]
    assert torch.allclose(state.loss, torch.tensor(before, dtype=torch.float64))
    gain, _, _ = state._best_in_rows()
    state.exchange(max_swaps=1)
    after = [optimal_loss(W, H, row, state.final_keep[row]) for row in range(len(W))]
    expected = torch.tensor(before, dtype=torch.float64) - gain.clamp_min(0)
    assert torch.allclose(torch.tensor(after, dtype=torch.float64), expected, rtol=1e-9)


def test_fewer_exchanges_than_needed_are_reported():
    W, H = problem(rows=12, columns=48)
    few, many = refined(W, H, "50%", max_swaps=1), refined(W, H, "50%")
    assert few.info["swaps"] <= len(W)
    assert few.info["rows_at_optimum"] < len(W) == many.info["rows_at_optimum"]
    assert loss(many.weight, W, H) < loss(few.weight, W, H)


def test_chunks_of_rows_change_nothing():
    W, H = problem(rows=12, columns=48)
    whole = refined(W, H, "2:4")
    with max_chunk_bytes(5 * swaps.ARRAYS_A_ROW * 8 * 48**2 // swaps.ARRAYS_AT_ONCE):
        assert torch.equal(refined(W, H, "2:4").keep, whole.keep)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_to_exchange(sparsity):
    W, H = problem(rows=4, columns=16)
    assert refined(W, H, Unstructured(sparsity)).info["swaps"] == 0


def test_wide_matrices_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(swaps.MAX_COLUMNS, "cpu", 32)
    W, H = problem(rows=4, columns=48)
    with pytest.raises(ValueError, match=r"48 input columns .* limited to 32 columns on cpu"):
        refined(W, H, "50%")


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_dead_inputs_are_not_brought_back(pattern):
    """No output depends on them: an exchange that keeps one in place of a live weight lowers no true loss."""
    W, H = problem(16, 40)
    dead = torch.arange(0, 40, 4)
    H[dead] = 0
    H[:, dead] = 0
    plain = secateur.solve(W, H, pattern, solver="mrp")
    swapped = secateur.solve(W, H, pattern, solver="mrp", refine={})
    assert int(swapped.keep[:, dead].sum()) <= int(plain.keep[:, dead].sum())
    assert loss(swapped.weight, W, H) <= loss(plain.weight, W, H) * 1.001
    kept = swapped.keep[:, dead]
    assert torch.equal(swapped.weight[:, dead][kept], W[:, dead][kept])


def test_rows_that_lose_nothing_are_at_their_optimum():
    """With more dead inputs than zeros, exchanges bring the loss to zero, and end there."""
    W, H = problem(16, 64)
    dead = torch.arange(0, 64, 5).tolist() + torch.arange(1, 64, 5).tolist()
    H[dead] = 0
    H[:, dead] = 0
    solved = refined(W, H, "25%", max_swaps=100)
    assert solved.info["rows_at_optimum"] == len(W)
    assert loss(solved.weight, W, H) < 1e-9 * float(((W @ H) * W).sum())


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_a_refit_that_stops_early_makes_no_row_worse(pattern):
    W, H = problem(rows=12, columns=48)
    exact = {"name": "mrp", "tolerance": 1e-9}
    before = secateur.solve(W, H, pattern, exact)
    after = secateur.solve(W, H, pattern, exact, refine={"max_swaps": 1, "tolerance": 0.5, "max_iterations": 1})
    for row in range(len(W)):
        losses = [loss(each.weight[row][None], W[row][None], H, 0.01) for each in (before, after)]
        assert losses[1] <= losses[0] * (1 + 1e-9)
