"""Damping, factors and the refit, against float64 oracles."""

from __future__ import annotations

import pytest
import torch
from helpers import damp, loss, problem, refit_oracle
from jaxtyping import TypeCheckError

import secateur
from secateur.numerics.conjugate_gradients import MaskedInverse, Stop, masked_cg
from secateur.numerics.damping import (
    DampedHessian,
    Damping,
    NotPositiveDefiniteError,
    inverse_diagonal_of_model,
    inverse_factor,
    low_rank_plus_diagonal,
    shrinkage_for,
)
from secateur.numerics.hessian import Hessian, HessianAccumulator, relative_error
from secateur.numerics.least_squares import refit_rows
from secateur.runtime.chunking import max_chunk_bytes
from secateur.solvers.sweep import estimate_pruned, solve_pruned


def random_keep(rows: int, columns: int, seed: int = 1, share: float = 0.5) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > share


def test_shapes_in_signatures_are_checked_here():
    """By conftest.py. Without it, a wrong shape would pass in silence wherever torch broadcasts it."""
    with pytest.raises(TypeCheckError, match="Float"):
        inverse_factor(torch.eye(4)[:3])


def test_inverse_factor_gives_every_trailing_inverse():
    _, H = problem()
    U = inverse_factor(damp(H))
    assert U is not None
    assert torch.equal(U, U.triu())
    for start in (0, 7, 30):
        trailing = torch.linalg.inv(damp(H)[start:, start:])
        assert torch.allclose(U[start:, start:].T @ U[start:, start:], trailing, rtol=1e-9, atol=1e-12)


def test_paper_identity_update_equals_least_squares_and_cost_equals_loss():
    """Delta = -w_P [Hinv_PP]^-1 Hinv_P,: is the refit on the kept columns, and cost(P) is the loss it ends at."""
    W, H = problem()
    Hd, keep = damp(H), random_keep(20, 48)
    Hinv = torch.linalg.inv(Hd)
    refit = refit_oracle(W, H, keep)
    for row in range(len(W)):
        P = (~keep[row]).nonzero()[:, 0]
        multipliers = torch.linalg.solve(Hinv[P][:, P], W[row, P])
        assert torch.allclose(W[row] - multipliers @ Hinv[P], refit[row], atol=1e-11)
        cost = float(multipliers @ W[row, P])
        assert cost == pytest.approx(loss(refit[row : row + 1], W[row : row + 1], H, 0.01), rel=1e-10)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refit_reaches_the_oracle(share, dtype):
    W, H = problem(30, 96, dtype=dtype)
    keep = random_keep(30, 96, share=share)
    exact = loss(refit_oracle(W, H, keep), W, H, 0.01)
    for tolerance, gap in ((1e-8, 1e-5), (1e-4, 1e-3)):
        weight, info = refit_rows(W, keep, DampedHessian(H, 0.01), tolerance, 200)
        assert bool((weight[~keep] == 0).all())
        assert loss(weight, W, H, 0.01) <= exact * (1 + gap)
        assert info["converged"]
    tight, info = refit_rows(W, keep, DampedHessian(H, 0.01), 1e-10, 300)
    assert info["kkt_residual"] < 1e-4
    Hd = damp(H.double())
    residual = ((W.double() - tight.double()) @ Hd) * keep
    scale = ((W.double() * ~keep) @ Hd) * keep
    assert float(residual.norm() / scale.norm()) < 1e-4


@pytest.mark.parametrize(
    ("tokens", "columns", "share"), [(20, 192, 0.5), (30, 192, 0.1), (15, 96, 0.5), (50, 192, 0.7)]
)
def test_gap_is_certified_where_convergence_has_plateaus(tokens, columns, share):
    """Fewer tokens than inputs: estimates from the last steps alone were off by factors of 20 to 100."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
        W = torch.randn(24, columns, generator=generator, dtype=torch.float64)
        H = X.T @ X / tokens
        keep = random_keep(24, columns, seed, share)
        exact = loss(refit_oracle(W, H, keep), W, H, 0.01)
        for tolerance in (1e-2, 1e-3, 1e-4):
            weight, info = refit_rows(W, keep, DampedHessian(H, 0.01), tolerance, 300)
            assert info["converged"]
            assert loss(weight, W, H, 0.01) / exact - 1 <= info["gap_bound"] <= tolerance


def test_the_bound_gets_the_true_residual():
    """Not the one that conjugate gradients carry along, which drifts in fp32."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 200, generator=generator) * torch.randn(200, generator=generator).exp()
    A, mask = DampedHessian(X.T @ X / 60, 1e-5).matrix, random_keep(24, 200, 0).float()
    target, seen = torch.randn(24, 200, generator=generator) @ A * mask, []
    stop = Stop(1e-3, 500, 1e6, lambda R: float(seen.append(R) or 0.0))
    found = masked_cg(A, target, mask, lambda R: R / A.diagonal(), stop)
    assert torch.equal(seen[-1], target - (found.Y @ A) * mask)


def test_a_refit_in_chunks_is_certified_by_all_of_them():
    """The first chunk has nothing to do, and the others stop at the limit."""
    W, H = problem(12, 48)
    keep = random_keep(12, 48)
    keep[:4] = True
    damped = DampedHessian(H, 0.01)
    with max_chunk_bytes(4 * 4 * 49):
        weight, info = refit_rows(W, keep, damped, 1e-12, 2)
    assert (info["iterations"], info["converged"]) == (2, False)
    residual, scale = (part @ damped.matrix * keep for part in (W - weight, W * ~keep))
    assert info["kkt_residual"] == pytest.approx(float(residual.norm() / scale.norm()), rel=1e-6)


def test_refit_stops_at_the_iteration_limit_and_says_so():
    W, H = problem()
    _, info = refit_rows(W, random_keep(20, 48), DampedHessian(H, 0.01), 1e-12, 2)
    assert info["iterations"] == 2
    assert not info["converged"]


def test_refit_in_row_chunks_gives_the_same_weights():
    W, H = problem()
    keep = random_keep(20, 48)
    whole, _ = refit_rows(W, keep, DampedHessian(H, 0.01), 1e-10, 200)
    with max_chunk_bytes(4 * 48 * 48):
        parts, _ = refit_rows(W, keep, DampedHessian(H, 0.01), 1e-10, 200)
    assert torch.allclose(whole, parts, atol=1e-4)


def test_preconditioner_is_the_inverse_of_the_masked_model():
    _, H = problem()
    F, d = low_rank_plus_diagonal(damp(H), 7)
    keep = random_keep(3, 48)
    R = torch.randn(3, 48, dtype=torch.float64) * keep
    found = MaskedInverse(F, d, keep.double())(R)
    with max_chunk_bytes(8 * 28 * 5):  # strips of five columns
        assert torch.allclose(MaskedInverse(F, d, keep.double())(R), found)
    for row in range(3):
        K = keep[row].nonzero()[:, 0]
        model = torch.diag(d[K]) + F[K] @ F[K].T
        assert torch.allclose(found[row, K], torch.linalg.solve(model, R[row, K]), atol=1e-9)
        assert bool((found[row, ~keep[row]] == 0).all())


def test_low_rank_model_keeps_the_diagonal_and_improves_with_rank():
    _, H = problem()
    Hd = damp(H)
    errors = []
    for rank in (1, 8, 24):
        F, d = low_rank_plus_diagonal(Hd, rank)
        model = F @ F.T + torch.diag(d)
        assert torch.allclose(model.diagonal(), Hd.diagonal(), rtol=2e-3)
        assert bool((d > 0).all())
        errors.append(float((model - Hd).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_tile_solves_agree_with_each_other_and_with_a_direct_solve():
    _, H = problem()
    U = inverse_factor(damp(H))
    assert U is not None
    span = U[8:40, 8:40].contiguous()
    pruned = ~random_keep(15, 32)
    pruned[0] = False
    pruned[1] = True
    removed = torch.randn(15, 32, dtype=torch.float64) * pruned
    exact = solve_pruned(span, removed, pruned)
    G = span.T @ span
    for row in range(1, 15):
        P = pruned[row].nonzero()[:, 0]
        assert torch.allclose(exact[row, P], torch.linalg.solve(G[P][:, P], removed[row, P]), atol=1e-9)
    assert bool((exact[~pruned] == 0).all())
    estimate = estimate_pruned(span, removed, pruned)
    assert float((estimate - exact).norm() / exact.norm()) < 0.1


def test_masked_cg_solves_a_small_system_exactly():
    _, H = problem()
    Hd, mask = damp(H), random_keep(4, 48).double()
    target = torch.randn(4, 48, dtype=torch.float64) * mask
    solution = masked_cg(Hd, target, mask, lambda R: R / Hd.diagonal(), Stop(1e-14, 500))
    assert torch.allclose((solution.Y @ Hd) * mask, target, atol=1e-5)


def test_dead_inputs_do_not_inflate_the_damping_of_others():
    _, H = problem()
    dead = H.clone()
    dead[[3, 9]] = 0
    dead[:, [3, 9]] = 0
    live = [index for index in range(48) if index not in (3, 9)]
    alone = DampedHessian(H[live][:, live], 0.01)
    assert torch.allclose(DampedHessian(dead, 0.01).matrix[live][:, live], alone.matrix)
    assert DampedHessian(dead, 0.01).dead.nonzero()[:, 0].tolist() == [3, 9]


@pytest.mark.parametrize("rank", [1, 7, 48])
def test_inverse_diagonal_of_a_low_rank_model(rank):
    _, H = problem()
    F, d = low_rank_plus_diagonal(damp(H), rank)
    assert torch.allclose(inverse_diagonal_of_model(F, d), torch.linalg.inv(F @ F.T + torch.diag(d)).diagonal())


def test_hd_without_a_factor_is_hd():
    _, H = problem()
    H[3] = H[:, 3] = 0
    damped = DampedHessian(H, 0.02, 0.1)
    assert torch.equal(damped.unfactored, damped.matrix)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 0.99])
def test_shrinkage_is_a_mean_of_the_hessian_and_its_diagonal(shrinkage):
    _, H = problem()
    mean = (1 - shrinkage) * H + shrinkage * torch.diag(H.diagonal())
    damped = DampedHessian(H, 0.01, shrinkage)
    assert torch.allclose(damped.matrix, mean + 0.01 * H.diagonal().mean() * torch.eye(48, dtype=H.dtype), rtol=1e-12)
    assert damped.figures == {"damping": [0.01], "shrinkage": shrinkage}


def test_shrinkage_by_tokens_is_that_of_two_uncorrelated_tokens_an_input():
    """T tokens, and C tokens sqrt(2 C) times a one-hot vector: their Hessian has the shape of the shrunk one."""
    X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H, prior = X.T @ X / 64, torch.diag((X.square().mean(0) * 16).sqrt())
    with_prior = (X.T @ X + prior.T @ prior) / (64 + 16)
    shrunk = DampedHessian(H, 1e-12, shrinkage_for(8, 64)).matrix
    assert torch.allclose(shrunk, with_prior, rtol=1e-9)
    assert shrinkage_for(8, 10**9) < 1e-7
    assert shrinkage_for(8, 0) == 1.0


def test_a_hessian_is_shrunk_by_its_tokens():
    sums = HessianAccumulator(6, torch.device("cpu"))
    sums.add(torch.randn(24, 6))
    assert sums.finish(Damping(0.02, "auto")).shrinkage == pytest.approx(1 / 3)
    sums = HessianAccumulator(6, torch.device("cpu"))
    sums.add(torch.randn(24, 6))
    hessian = sums.finish(Damping(0.02, 0.25))
    assert (hessian.shrinkage, hessian.damping) == (0.25, 0.02)
    assert hessian.damped.figures["shrinkage"] == 0.25


@pytest.mark.parametrize("solver", ["mrp", "sparsegpt"])
def test_a_shrunk_hessian_of_few_tokens_prunes_better_for_other_tokens(solver):
    """Inputs with a known covariance: the error on all tokens that could come, not on the few that were seen."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator, dtype=torch.float64) / 96**0.5 + torch.eye(96)
    mixing *= torch.logspace(-1, 1, 96, dtype=torch.float64)[:, None]  # quiet and loud inputs
    true, W = mixing @ mixing.T, torch.randn(16, 96, generator=generator, dtype=torch.float64)
    X = torch.randn(144, 96, generator=generator, dtype=torch.float64) @ mixing.T

    def error(**options: float) -> float:
        weight = secateur.solve(W, X.T @ X / 144, "50%", solver, **options).weight
        return relative_error(weight, W, true)

    assert error(shrinkage=shrinkage_for(96, 144)) < 0.9 * min(error(), error(damping=0.1), error(damping=1.0))


def test_failed_cholesky_is_retried_with_more_damping_and_recorded():
    values = torch.ones(16, dtype=torch.float64)
    values[0] = -0.05  # indefinite by rounding or by a bad sum: damping 0.01 and 0.1 differ in curing it
    Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    damped = DampedHessian(Q @ torch.diag(values) @ Q.T, 0.01)
    assert damped.figures["damping"] == [0.01, 0.1]


def test_hopeless_hessian_raises_after_three_retries():
    H = torch.eye(4) - 20 * torch.ones(4, 4) / 4 + 20 * torch.eye(4) / 4
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite even with damping 10"):
        _ = DampedHessian(H, 0.01).matrix


def test_hessian_accumulates_batches():
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    total = HessianAccumulator(6, X.device)
    for part in X.to(torch.bfloat16).split(13):
        total.add(part)
    hessian = total.finish()
    exact = X.to(torch.bfloat16).double()
    assert torch.allclose(hessian.H.double(), exact.T @ exact / 50, rtol=1e-5, atol=1e-6)
    assert hessian.tokens == 50
    assert hessian.damped is hessian.damped


def test_a_hessian_wider_than_a_band_is_whole_and_symmetric():
    X = torch.randn(60, 401, generator=torch.Generator().manual_seed(0))
    total = HessianAccumulator(401, X.device)
    for part in X.split(25):
        total.add(part)
    found = total.finish().H
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), X.double().T @ X.double() / 60, rtol=1e-5, atol=1e-6)


def test_a_hessian_of_bf16_inputs_loses_nothing_to_bf16_units():
    X = torch.randn(512, 401, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    setting = torch.backends.mkldnn.matmul
    before, total = setting.fp32_precision, HessianAccumulator(401, X.device)
    total.add(X)
    assert setting.fp32_precision == before
    exact = X.double().T @ X.double() / 512
    assert torch.allclose(total.finish().H.double(), exact, rtol=1e-5, atol=1e-6)


def test_empty_hessian_is_refused():
    with pytest.raises(AssertionError, match="no token"):
        HessianAccumulator(3, torch.device("cpu")).finish()


def test_hessian_of_nothing_is_all_dead():
    damped = Hessian(torch.zeros(4, 4), 1).damped
    assert bool(damped.dead.all())
    assert torch.equal(damped.matrix, torch.eye(4))


@pytest.mark.parametrize("solver", ["sparsegpt", "mrp", "admm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hessian_of_three_tokens_is_solved_at_any_damping(solver, dtype):
    X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    W, _ = problem(16, 64, dtype=dtype)
    solved = secateur.solve(W, X.T @ X / 3, "50%", solver, damping=1e-9)
    assert bool(torch.isfinite(solved.weight).all())
