"""One suite for every solver: exact counts, purity, determinism, symmetry, edge cases, and optimality where claimed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CASES, METHODS, case_id, damp, loss, problem, refit_oracle, solve_by
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import tiny_model, tokens

import secateur
from secateur.numerics.hessian import Hessian
from secateur.numerics.masks import is_met
from secateur.recipe.patterns import NM, Unstructured
from secateur.recipe.solvers import ADMM, SOLVERS, read_solver
from secateur.solvers import Solved, admm, mrp
from secateur.solvers.checked import SOLVE

ENTRY_POINTS = "secateur.recipe.solvers.entry_points"
NO_UPDATE = ("magnitude", "wanda")
every_case = pytest.mark.parametrize(("name", "pattern"), CASES, ids=case_id)
every_method = pytest.mark.parametrize("name", METHODS)


def sized(pattern, seed=0):
    return problem(20, 48, seed)


def solve(name, W, H, pattern, **more):
    return solve_by(W, H, pattern, **METHODS[name] | more)


def test_every_builtin_method_is_in_this_suite():
    assert {options["solver"] for options in METHODS.values()} == set(SOLVERS)
    assert set(SOLVE) == set(SOLVERS.values())


@every_case
def test_counts_are_exact_and_weights_agree_with_the_mask(name, pattern):
    W, H = sized(pattern)
    solved = solve(name, W, H, pattern)
    assert int((~solved.keep).sum()) == pattern.num_pruned(*W.shape)
    assert bool((solved.weight[~solved.keep] == 0).all())
    assert bool((solved.weight[solved.keep] != 0).all())
    assert is_met(pattern, solved.weight == 0)
    if isinstance(pattern, NM):
        groups = solved.keep.view(len(W), -1, pattern.m)
        assert bool((groups.sum(-1) == pattern.n).all())


@pytest.mark.filterwarnings("error")
def test_the_weight_of_a_layer_is_taken_as_it_is():
    """A parameter has gradients, which nothing here needs."""
    layer, X = torch.nn.Linear(48, 20), torch.randn(200, 48)
    solved = secateur.solve(layer.weight, X.T @ X / 200, "50%")
    assert not solved.weight.requires_grad
    assert torch.equal(solved.weight, secateur.solve(layer.weight.detach(), X.T @ X / 200, "50%").weight)


@every_case
def test_pure_and_deterministic(name, pattern):
    W, H = sized(pattern)
    before = W.clone(), H.clone()
    first, second = solve(name, W, H, pattern), solve(name, W, H, pattern)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.keep, second.keep)
    transposed = W.T.contiguous().T  # as GPT-2 stores its matrices
    assert torch.allclose(solve(name, transposed, H, pattern).weight, first.weight, atol=1e-9)
    assert torch.equal(transposed, W)


@every_case
def test_permuting_rows_permutes_the_result(name, pattern):
    W, H = sized(pattern)
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(5))
    plain, permuted = solve(name, W, H, pattern), solve(name, W[order], H, pattern)
    assert torch.equal(permuted.keep, plain.keep[order])
    assert torch.allclose(permuted.weight, plain.weight[order], rtol=1e-6, atol=1e-9)


@every_case
def test_float32_agrees_with_the_float64_oracle(name, pattern):
    W, H = sized(pattern)
    W, H = W.float(), H.float()
    single, double = solve(name, W, H, pattern), solve(name, W.double(), H.double(), pattern)
    assert single.weight.dtype == torch.float32
    assert float((single.keep == double.keep).float().mean()) > 0.99
    assert loss(single.weight, W, H) == pytest.approx(loss(double.weight, W, H), rel=0.02)


@every_method
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_sparsity_zero_and_one(name, sparsity):
    if METHODS[name].get("mask") == "M":
        pytest.skip("mask M has no unstructured form")
    W, H = problem()
    H[5] = 0
    H[:, 5] = 0
    solved = solve(name, W, H, Unstructured(sparsity))
    assert torch.equal(solved.weight, W if sparsity == 0 else torch.zeros_like(W))


@every_case
def test_dead_inputs_go_first_and_kept_ones_stay(name, pattern):
    if METHODS[name]["solver"] == "magnitude":
        pytest.skip("magnitude looks at no data")
    W, H = sized(pattern)
    dead = [1, 7, 20, 33]
    H[dead] = 0
    H[:, dead] = 0
    solved = solve(name, W, H, pattern)
    if isinstance(pattern, Unstructured):
        assert not bool(solved.keep[:, dead].any())
    kept = solved.keep[:, dead]
    assert torch.equal(solved.weight[:, dead][kept], W[:, dead][kept])
    if METHODS[name].get("block") is None and name not in (*NO_UPDATE, "sparsegpt", "mrp-SS", "mrp-MS"):
        live = [index for index in range(48) if index not in dead]
        alone, H_alone = W[:, live], H[live][:, live]  # the certificate is about the inputs that count
        exact = loss(refit_oracle(alone, H_alone, solved.keep[:, live]), alone, H_alone, 0.01)
        assert loss(solved.weight[:, live], alone, H_alone, 0.01) <= exact * (1 + 1e-3)


@every_method
def test_dead_inputs_leave_the_rest_as_if_they_were_not_there(name):
    """Unstructured at a share that prunes all dead inputs: the live part is solved like the matrix without them."""
    if METHODS[name].get("mask") == "M" or name in (*NO_UPDATE, "mrp-SM-32"):
        pytest.skip("needs an unstructured update in one tile")
    W, H = problem(16, 32)
    dead = [0, 11, 22, 29, 31, 5, 6, 7]
    live = [index for index in range(32) if index not in dead]
    Hz = H.clone()
    Hz[dead] = 0
    Hz[:, dead] = 0
    pruned_live = 192
    tight = {"tolerance": 1e-12} if METHODS[name]["solver"] in ("mrp", "admm") else {}
    with_dead = solve(name, W, Hz, Unstructured((pruned_live + 16 * len(dead)) / (16 * 32)), **tight)
    alone = W[:, live].contiguous(), H[live][:, live].contiguous()
    without = solve(name, *alone, Unstructured(pruned_live / (16 * len(live))), **tight)
    assert torch.equal(with_dead.keep[:, live], without.keep)
    assert torch.allclose(with_dead.weight[:, live], without.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mrp", "mrp-SM-all", "mrp-MM-all"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(1, 4), NM(5, 12)], ids=case_id)
def test_full_row_is_optimal_for_its_mask(name, pattern):
    if METHODS[name].get("mask") == "M" and isinstance(pattern, Unstructured):
        pytest.skip("mask M has no unstructured form")
    W, H = problem()
    solved = solve(name, W, H, pattern, tolerance=1e-9)
    exact = loss(refit_oracle(W, H, solved.keep), W, H, 0.01)
    assert loss(solved.weight, W, H, 0.01) <= exact * (1 + 1e-5)
    assert solved.info["kkt_residual"] < 1e-4
    default = solve(name, W, H, pattern)
    assert loss(default.weight, W, H, 0.01) <= exact * (1 + 1e-3)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [case for case in CASES if case[0] in ("mrp-SM-32", "mrp-MM-32") and 32 % getattr(case[1], "m", 1) == 0],
    ids=case_id,
)
def test_the_first_block_is_compensated_jointly(name, pattern):
    """Of a matrix of two blocks, the first is removed at once: its kept weights and all to its right are free.

    Then the second is, with the first as it is.
    """
    W, H = problem(12, 64)
    solved = solve(name, W, H, pattern)
    keep = solved.keep.clone()
    keep[:, 32:] = True
    assert torch.allclose(solved.weight[:, :32], refit_oracle(W, H, keep)[:, :32], rtol=1e-6, atol=1e-8)
    Hd = damp(H)
    for w, new, kept in zip(W, solved.weight, solved.keep, strict=True):
        K = 32 + kept[32:].nonzero()[:, 0]
        still_to_remove = torch.cat([w[:32] - new[:32], w[32:]])
        expected = torch.linalg.solve(Hd[K][:, K], (still_to_remove @ Hd)[K])
        assert torch.allclose(new[K], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(4, 8)], ids=case_id)
def test_more_joint_is_better_on_average(pattern):
    """Losses summed over problems: wanda > sparsegpt > full row; block-wise joint removal is at most single removal."""
    names = ["magnitude", "wanda", "sparsegpt", "mrp-SM-32", "mrp"]
    total = dict.fromkeys(names, 0.0)
    for seed in range(6):
        W, H = problem(24, 64, seed)
        for name in names:
            total[name] += loss(solve(name, W, H, pattern).weight, W, H)
    assert total["magnitude"] > total["wanda"] > total["sparsegpt"] > total["mrp"]
    assert total["mrp-SM-32"] < total["sparsegpt"]


def test_mrp_ss_is_sparsegpt():
    W, H = problem()
    for pattern in ("50%", "2:4"):
        ours = solve_by(W, H, pattern, "mrp", mask="S", compensation="S", block=16)
        assert torch.equal(ours.weight, solve_by(W, H, pattern, "sparsegpt", block=16).weight)


def test_sparsegpt_equals_its_plain_form():
    """Column by column from the definition: inverse of the trailing Hessian, OBS error, move the rest."""
    W, H = problem(6, 16)
    live = H.diagonal().mean()
    Hd = H + 0.01 * live * torch.eye(16, dtype=H.dtype)
    solved = solve_by(W, H, "2:4", "sparsegpt", block=8)
    plain = W.clone()
    for j in range(16):
        G = torch.linalg.inv(Hd[j:, j:])
        error = torch.where(solved.keep[:, j], 0.0, plain[:, j] / G[0, 0])
        plain[:, j:] -= error[:, None] * G[0][None]
    assert torch.allclose(solved.weight, plain * solved.keep, atol=1e-9)


@example(1, 4, 0.9375, 4, "mrp")  # one kept weight: the first step is exact, and the second lowers nothing
@example(6, 5, 0.95, 0, "sparsegpt")  # 0.95 * 6 * 15 and 0.95 * 90 round differently
@given(
    st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(["sparsegpt", "mrp"])
)
@settings(max_examples=200, deadline=None)
def test_any_small_shape_and_sparsity(rows, groups, sparsity, seed, name):
    W, H = problem(rows, 3 * groups, seed)
    solved = solve(name, W, H, Unstructured(sparsity))
    assert int((~solved.keep).sum()) == round(sparsity * W.numel())
    assert bool(torch.isfinite(solved.weight).all())


@pytest.mark.parametrize("name", METHODS)
def test_rank_deficient_hessian(name):
    W, _ = problem()
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = solve(name, W, x.T @ x / 3, NM(2, 4))
    assert bool(torch.isfinite(solved.weight).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "obc"}, "unknown solver 'obc': choose one of admm, magnitude, mrp, sparsegpt, wanda"),
        (
            {"solver": "wanda", "block": 3},
            r"solver wanda has no option 'block': it has none \(block belongs to sparsegpt, mrp\)",
        ),
        ({"solver": "mrp", "blocks": 3}, "has no option 'blocks': its options are mask.*did you mean 'block'"),
        ({"solver": "mrp", "mask": "X"}, "mask is 'X': it must be 'S' or 'M'"),
        ({"solver": "mrp", "mask": "M"}, "no form for the unstructured 50%"),
        ({"solver": "mrp", "block": 0}, "block is 0: it must be greater than or equal to 1 or be 'all'"),
        ({"solver": "mrp", "damping": 0.0}, "damping is 0.0: it must be greater than 0"),
        ({"solver": "mrp", "damping": float("nan")}, "damping is nan: it must be a finite number"),
        (
            {"solver": "mrp", "shrinkage": "auto"},
            "shrinkage is 'auto': give a number, as H does not say how many tokens",
        ),
        ({"solver": "mrp", "shrinkage": 1.0}, "shrinkage is 1.0: it must be less than 1"),
        ({"solver": "mrp", "shrinkage": -0.1}, "shrinkage is -0.1: it must be greater than or equal to 0"),
        ({"solver": "mrp", "tolerance": 0.0}, "tolerance is 0.0: it must be greater than 0"),
        ({"solver": "mrp", "max_iterations": 0}, "max_iterations is 0"),
        ({"pattern": "2:5"}, "multiple of 5, but it is 48"),
        ({"pattern": "1.5"}, "between 0"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    W, H = problem()
    request = {"pattern": "50%"} | arguments
    with pytest.raises(ValueError, match=message):
        solve_by(W, H, **request)


def test_bad_matrices_are_named():
    W, H = problem()
    with pytest.raises(ValueError, match=r"H must be \(C, C\)"):
        secateur.solve(W, H[:5, :5], "50%")
    with pytest.raises(ValueError, match="H holds NaN"):
        secateur.solve(W, H * float("nan"), "50%")
    with pytest.raises(ValueError, match="W holds NaN"):
        secateur.solve(W / 0, H, "50%")
    with pytest.raises(ValueError, match="negative diagonal"):
        secateur.solve(W, -H, "50%")
    lopsided, too_small = H.clone(), H.clone()
    lopsided[0, 5] += 50
    with pytest.raises(ValueError, match="not symmetric"):
        secateur.solve(W, lopsided, "50%")
    too_small[3, 3] = 0
    with pytest.raises(ValueError, match="zero on its diagonal at input 3"):
        secateur.solve(W, too_small, "50%")


def test_tensors_of_inference_mode_are_taken():
    W, H = problem(8, 16)
    plain = secateur.solve(W, H, "50%")
    with torch.inference_mode():
        assert torch.equal(secateur.solve(W.clone(), H.clone(), "50%").weight, plain.weight)


def test_plugin_solver_is_found_by_its_entry_point(monkeypatch):
    class Point:
        name = "cheat"

        def load(self):
            return Cheat

    monkeypatch.setattr(ENTRY_POINTS, lambda group: [Point()] if group == "secateur.solvers" else [])
    assert isinstance(read_solver("cheat"), Cheat)
    assert read_solver({"name": "cheat", "how": "nan"}).how == "nan"
    Point.name = "ours"
    with pytest.raises(
        ValueError, match="plug-in of solver ours has the `name` 'cheat': give the class the name of its"
    ):
        read_solver("ours")


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (ImportError("no module"), "plug-in of solver ours can't be loaded: ImportError: no module"),
        (lambda: None, "plug-in of solver ours is .* it must be a dataclass"),
    ],
)
def test_a_broken_plugin_is_named_and_stops_no_other_method(monkeypatch, loads, message):
    class Point:
        name = "ours"

        def load(self):
            if isinstance(loads, Exception):
                raise loads
            return loads

    monkeypatch.setattr(ENTRY_POINTS, lambda group: [Point()])
    assert isinstance(read_solver("wanda"), SOLVERS["wanda"])
    with pytest.raises(ValueError, match="mrp has no option 'foo'"):
        read_solver({"name": "mrp", "foo": 1})
    with pytest.raises(ValueError, match=message):
        read_solver("ours")
    with pytest.raises(ValueError, match="choose one of admm, magnitude, mrp, ours, sparsegpt, wanda"):
        read_solver("theirs")


@dataclass(frozen=True)
class Cheat:
    """Breaks the contract in the way it is told to."""

    how: str = ""
    name = "cheat"

    def __call__(self, W, hessian, pattern):
        if self.how == "damping":
            hessian.H.diagonal().add_(1.0)
        if self.how == "in place":
            W.mul_(2.0)
        keep = torch.ones_like(W, dtype=torch.bool) if self.how == "nothing" else keep_highest(W, pattern)
        if self.how == "elsewhere":
            keep = keep[:, torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(0))]
        weight = W if self.how in ("nothing", "weights") else W * keep
        if self.how == "nan":
            weight[keep] = float("nan")
        figures = {"figures": {"figure": torch.ones(2)}, "nan figure": {"figure": float("nan")}}
        return Solved(weight, keep, figures.get(self.how, {}))


def keep_highest(W, pattern):
    groups = W.abs().reshape(len(W), -1, 4)
    return (groups.argsort(-1).argsort(-1) >= 2).reshape(W.shape)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", "breaks 2:4: row 0 has 0 zeros in columns 0 to 3"),
        ("elsewhere", r"breaks 2:4: row \d+ has \d zeros in columns"),
        ("weights", "other than zero where its mask prunes"),
        ("nan", "NaN or infinite weights"),
        ("figures", "figures that are not plain numbers"),
        ("nan figure", "NaN or infinite figures"),
        ("damping", "wrote into its weights or its Hessian"),
        ("in place", "wrote into its weights or its Hessian"),
        ("", None),
    ],
)
def test_a_method_that_breaks_the_contract_is_refused(monkeypatch, how, message):
    monkeypatch.setattr(ENTRY_POINTS, lambda group: [SimpleNamespace(name="cheat", load=lambda: Cheat)])
    model = tiny_model("llama")
    W, H = problem(8, 16)
    calls = (
        lambda: solve_by(W, H, "2:4", "cheat", how=how),
        lambda: secateur.prune(model, pattern="2:4", solver={"name": "cheat", "how": how}, calibration=tokens(4)),
    )
    for call in calls:
        if message is None:
            call()
        else:
            with pytest.raises(ValueError, match=message):
                call()


def test_text_where_an_option_is_a_number():
    with pytest.raises(ValueError, match="damping is 'a': it must be a number"):
        secateur.solve(torch.ones(2, 4), torch.eye(4), "50%", damping="a")


def test_inputs_that_correlate_by_more_than_one_are_named():
    W, H = problem(8, 16)
    H[3, 5] = H[5, 3] = 1.2 * float((H[3, 3] * H[5, 5]).sqrt())
    with pytest.raises(secateur.SecateurError, match=r"H\[3, 5\] is .* two inputs can't correlate by more than 1"):
        secateur.solve(W, H, "50%")
    X = torch.randn(16, 1).to(torch.bfloat16)  # every correlation is 1, rounded
    assert bool(torch.isfinite(secateur.solve(W, X @ X.T, "50%").weight).all())


def test_values_that_fp32_can_not_hold_are_named():
    W, H = problem(8, 16, dtype=torch.float32)
    for w, h, message in (
        (1e20, 1, r"W holds .*e\+20, whose square overflows fp32"),
        (1e-24, 1, "losses underflow fp32"),
        (1, 1e-40, "losses underflow fp32"),
        (1, 1e35, "NaN or infinite figures: the input may be too large"),
    ):
        with pytest.raises(secateur.SecateurError, match=message):
            secateur.solve(W * w, H * h, "50%")
        in_double = secateur.solve(W.double() * w, H.double() * h, "50%")
        assert torch.equal(in_double.keep, secateur.solve(W.double(), H.double(), "50%").keep)


@pytest.mark.parametrize("wrong", [np.ones((4, 4)), [[1.0]], torch.ones(4, 4).to(torch.float8_e4m3fn), None])
def test_what_is_not_a_floating_tensor_is_named(wrong):
    for arguments in ((wrong, torch.eye(4)), (torch.ones(4, 4), wrong)):
        with pytest.raises(secateur.SecateurError, match="give a torch tensor of a floating dtype"):
            secateur.solve(*arguments, "50%")


def lowest(score, number):
    """A mask without the `number` lowest entries of a score."""
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[score.flatten().argsort()[:number]] = False
    return keep.view(score.shape)


def test_magnitude_compares_within_the_matrix_and_wanda_within_each_row():
    W, H = problem(rows=8, columns=32)
    W[:4] *= 10
    assert torch.equal(solve_by(W, H, 0.5, "magnitude").keep, lowest(W.abs(), W.numel() // 2))
    score = W.abs() * H.diagonal().sqrt()
    assert torch.equal(solve_by(W, H, 0.5, "wanda").keep, torch.stack([lowest(row, 16) for row in score]))


def test_joint_removal_scores_the_first_span_by_the_whole_inverse():
    """All columns of a span are still free: `[Hd^-1]_jj`, and not what is left of it column by column."""
    W, H = problem(rows=12, columns=64)
    keep = solve_by(W, H, 0.5, "mrp", block=16).keep[:, :16]
    score = W[:, :16].square() / damp(H).inverse().diagonal()[:16]
    assert torch.equal(keep, lowest(score, 12 * 8))


def test_over_the_full_row_tiles_share_zeros_by_single_removals_in_the_whole_matrix():
    W, H = problem(rows=12, columns=64)
    W[:, :32] *= 3  # a head that matters more
    score = W.square() / damp(H).inverse().diagonal()
    zeros = ~lowest(score, W.numel() // 2)
    found = ~solve_by(W, H, 0.5, "mrp").keep
    assert [int(part.sum()) for part in found.split(mrp.MASK_TILE, 1)] == [
        int(part.sum()) for part in zeros.split(mrp.MASK_TILE, 1)
    ]
    uniform = ~solve_by(W, H, 0.5, "mrp", block=32).keep
    assert int(uniform[:, :32].sum()) == 12 * 16 > int(found[:, :32].sum())


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_admm_is_that_of_the_textbook(pattern):
    """With the multiplier itself, which a new penalty leaves as it is, and a dense solve each step."""
    W, H = problem(rows=6, columns=24)
    options = ADMM(search_iterations=14, penalty_start=0.1, penalty_end=2.0)
    scale = damp(H).diagonal().sqrt()
    Hd, target = damp(H) / (scale[:, None] * scale), W * scale
    project = admm._project
    D = target * project(W / damp(H).inverse().diagonal().sqrt(), pattern)
    multiplier = torch.zeros_like(target)
    for step in range(options.search_iterations):
        penalty = admm._penalty(options, step - step % admm.STEPS_A_PENALTY)
        right = target @ Hd + penalty * D - multiplier
        X = torch.linalg.solve(Hd + penalty * torch.eye(24, dtype=torch.float64), right, left=False)
        keep = project(X + multiplier / penalty, pattern)
        D = (X + multiplier / penalty) * keep
        multiplier = multiplier + penalty * (X - D)
    found, _ = admm.search_mask(options, W, Hessian(H, 1).damped, pattern)
    assert torch.equal(found, keep)
