"""Allocation: exact totals, bounds, optimality, and the sensitivity behind it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import dense_pass, find_blocks, problem, quiet, refit_oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import OneOfTwo, mixtral, tiny_model, tokens

import secateur
from secateur.calibration.stream import Stream
from secateur.models.placement import InMemory
from secateur.numerics.damping import Damping, inverse_diagonal_of_model, shrinkage_for
from secateur.numerics.hessian import Hessian
from secateur.numerics.masks import is_met
from secateur.pruning import allocation as al
from secateur.pruning import dry_run, loop, loss_curves
from secateur.pruning.context import DroppedBlocks, RunContext
from secateur.pruning.dry_run import estimate
from secateur.pruning.fisher import draw_labels, output_fisher_information
from secateur.recipe.patterns import NM, Unstructured
from secateur.recipe.recipe import Recipe
from secateur.recipe.resolve import resolve_recipe
from secateur.runtime.memory import MemoryBudget

GRID = [0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def curve(steepness, weights, scale=1.0):
    return loss_curves.LossCurve(GRID, [scale * level**steepness for level in GRID], weights)


def total_zeros(patterns, curves):
    return sum(pattern.num_pruned(1, curves[name].num_weights) for name, pattern in patterns.items())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 8), st.integers(1, 5000), st.floats(1e-6, 1e6)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
    st.floats(0.01, 0.5),
)
@example([(1.0, 33, 1.0), (1.0, 33, 1.0)], 0.984375, 0.5)  # both bounds rounded down left one zero without a place
def test_totals_are_exact_and_bounds_hold(shapes, sparsity, spread):
    curves = {str(index): curve(*shape) for index, shape in enumerate(shapes)}
    patterns = loss_curves.minimise_loss(curves, Unstructured(sparsity), spread)
    everything = sum(each.num_weights for each in curves.values())
    assert total_zeros(patterns, curves) == round(sparsity * everything)
    for name, pattern in patterns.items():
        slack = (len(curves) + 1) / curves[name].num_weights  # whole weights
        assert sparsity - spread - slack <= pattern.sparsity <= sparsity + spread + slack


def test_minimum_is_that_of_brute_force():
    curves = {"a": curve(3, 1000), "b": curve(3, 1000, scale=8), "c": curve(6, 2000)}
    patterns = loss_curves.minimise_loss(curves, Unstructured(0.5), 0.45)

    def summed(a, b):
        c = (0.5 * 4000 - 1000 * (a + b)) / 2000
        if not 0.05 <= c <= 0.95:
            return float("inf")
        shares = {"a": a, "b": b, "c": c}
        each = (loss_curves._interpolated(curves[n], torch.tensor([s], dtype=torch.float64)) for n, s in shares.items())
        return float(sum(each))

    steps = [0.05 + 0.01 * k for k in range(91)]
    best = min(summed(a, b) for a in steps for b in steps)
    assert summed(patterns["a"].sparsity, patterns["b"].sparsity) <= best * 1.01
    assert patterns["a"].sparsity > patterns["b"].sparsity, "the cheaper matrix loses more"


def test_n_m_levels_are_exchanged_between_matrices_of_one_size():
    def levels(scale, weights=64):
        return loss_curves.LossCurve([0.25, 0.5, 0.75], [scale * 1.0, scale * 2.0, scale * 8.0], weights)

    curves = {"cheap": levels(0.01), "dear": levels(1.0), "other": levels(5.0, weights=128)}
    patterns = loss_curves.exchange_levels(curves, NM(2, 4), spread=0.25)
    assert patterns == {"cheap": NM(1, 4), "dear": NM(3, 4), "other": NM(2, 4)}
    assert set(loss_curves.exchange_levels(curves, NM(2, 4), spread=0.2).values()) == {NM(2, 4)}


def prune(**options):
    model = tiny_model("llama")
    return model, secateur.prune(model, solver="mrp", calibration=tokens(), **options)


@pytest.mark.parametrize("rule", ["owl", "curve"])
def test_a_run_has_exactly_the_zeros_of_a_uniform_one(rule):
    model, report = prune(pattern="60%", settings={"allocation.rule": rule})
    weights = sum(matrix.rows * matrix.columns for matrix in report.matrices)
    assert sum(matrix.zeros for matrix in report.matrices) == round(0.6 * weights)
    assert len({matrix.pattern for matrix in report.matrices}) > 1
    for matrix in report.matrices:
        assert int((model.get_parameter(matrix.name + ".weight") == 0).sum()) == matrix.zeros
        assert abs(matrix.sparsity - 0.6) <= 0.3 + 1e-3


def test_a_mixed_n_m_run_keeps_the_mean_and_every_pattern():
    model, report = prune(pattern="2:4", settings={"allocation": {"rule": "curve", "spread": 0.25}})
    assert report.sparsity == 0.5
    assert {matrix.pattern for matrix in report.matrices} > {"2:4"}
    for matrix in report.matrices:
        zero = model.get_parameter(matrix.name + ".weight").data == 0
        assert is_met(secateur.parse_pattern(matrix.pattern), zero)


def test_owl_spares_blocks_with_outliers_and_refuses_n_m():
    measured = {f"layers.{block}.w": al._Outliers(1000, share) for block, share in enumerate((0.0, 0.01, 0.1))}
    blocks = {name: name.removesuffix(".w") for name in measured}
    patterns = al.owl_patterns(measured, blocks, Unstructured(0.7), spread=0.1)
    shares = [pattern.sparsity for pattern in patterns.values()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) / 3 == pytest.approx(0.7)
    with pytest.raises(ValueError, match="owl has no form for 2:4"):
        prune(pattern="2:4", settings={"allocation.rule": "owl"})


def test_curve_is_the_loss_of_a_real_refit():
    """A curve's point equals what a solver with the same mask loses, to the curve's tolerance.

    The mask is by the low-rank model's scores: little worse than by the inverse Hessian's.
    """
    W, H = problem(rows=24, columns=48)
    sensitivity = torch.linspace(0.1, 2.0, 24, dtype=torch.float64)
    hessian = Hessian(H, 1)
    found = loss_curves.loss_curve(W, hessian, sensitivity, [Unstructured(level) for level in GRID])
    scaled = W * sensitivity.sqrt()[:, None]
    chosen_by = W * loss_curves.row_scale(sensitivity)[:, None]

    def lost(inverse_diagonal: torch.Tensor) -> float:
        score = chosen_by.square() / inverse_diagonal
        keep = torch.ones_like(score, dtype=torch.bool)
        keep.view(-1)[score.flatten().argsort()[: round(0.5 * score.numel())]] = False
        D = refit_oracle(scaled, H, keep) - scaled
        return float(((D @ H) * D).sum())

    by_model = lost(inverse_diagonal_of_model(*hessian.damped.low_rank))
    assert found.losses[GRID.index(0.5)] == pytest.approx(by_model, rel=0.05)
    assert by_model < 1.1 * lost(hessian.damped.inverse_diagonal)
    assert found.losses == sorted(found.losses)


def test_a_curve_of_few_tokens_does_not_flatter_where_the_hessian_is_shrunk():
    """24 kept weights of 48 fit 24 tokens exactly: without shrinkage the matrix seems to lose nothing."""
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(24, 48, generator=generator, dtype=torch.float64) for _ in range(2))
    fisher, levels = torch.ones(24, dtype=torch.float64), [Unstructured(0.4)]
    flattering, fair = (
        loss_curves.loss_curve(W, Hessian(X.T @ X / 24, 24, damping=1e-6, shrinkage=share), fisher, levels).losses[0]
        for share in (0.0, shrinkage_for(48, 24))
    )
    real = float(W.square().flatten().sort().values[: round(0.4 * W.numel())].sum())  # inputs are uncorrelated
    assert flattering < 0.01 * real
    assert 0.4 * real < fair < 1.2 * real


@pytest.mark.parametrize(("columns", "num_tokens", "factors"), [(48, 48, 16), (96, 48, 16), (96, 48, 48), (48, 480, 4)])
def test_a_curve_says_what_other_tokens_lose(columns, num_tokens, factors, monkeypatch):
    """By the tokens that the rows are fit to, the loss of a wide matrix seems smaller than it is."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(factors, columns, generator=generator, dtype=torch.float64) / factors**0.5
    W = torch.randn(24, columns, generator=generator, dtype=torch.float64)

    def hessian_of(number):
        of_factors = torch.randn(number, factors, generator=generator, dtype=torch.float64) @ shared
        X = of_factors + torch.randn(number, columns, generator=generator, dtype=torch.float64)
        return X.T @ X / number

    changes, refit = [], loss_curves.refit_by_gradients

    def watched(rows, *others, **options):
        solved = refit(rows, *others, **options)
        changes.append(solved[0] - rows)
        return solved

    monkeypatch.setattr(loss_curves, "refit_by_gradients", watched)
    seen, others = hessian_of(num_tokens), hessian_of(20_000)
    hessian = Hessian(seen, num_tokens, shrinkage=shrinkage_for(columns, num_tokens))
    (found,) = loss_curves.loss_curve(W, hessian, torch.ones(24, dtype=torch.float64), [Unstructured(0.4)]).losses
    real, by_seen = (float(((changes[0] @ H) * changes[0]).sum()) for H in (others, seen))
    assert found == pytest.approx(real, rel=0.15)
    assert by_seen < 0.95 * real


def test_an_allocation_looks_at_its_tokens_in_whole_sequences():
    assert al.sequences_of(8192, sequences=32, num_tokens=32 * 512) == 16
    assert al.sequences_of(8192, sequences=128, num_tokens=128 * 2048) == 4
    assert al.sequences_of(1, sequences=4, num_tokens=2048) == 1
    assert al.sequences_of(16384, sequences=3, num_tokens=3 * 12) > 3  # all that there are


def test_a_curve_costs_nothing_where_dead_inputs_do():
    W, H = problem(rows=24, columns=48)
    H[:24] = 0
    H[:, :24] = 0
    levels = [Unstructured(0.3), Unstructured(0.5), Unstructured(0.6)]
    hessian = Hessian(H, 1)
    losses = loss_curves.loss_curve(W, hessian, torch.ones(24, dtype=torch.float64), levels).losses
    assert losses[:2] == [0.0, 0.0]
    assert losses[2] > 0


@pytest.mark.parametrize(
    ("family", "chunk"), [("llama", None), ("gpt2", None), ("gemma3", 5), ("llama", 3), ("opt", 3)]
)
def test_sensitivity_equals_gradients_taken_by_module_hooks(family, chunk, monkeypatch):
    """Also where only the logits of `chunk` positions are held at a time, which OPT can't do."""
    model = tiny_model(family).eval()
    if chunk is not None:
        monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", chunk * model.config.vocab_size)
    batches = [{"input_ids": ids} for ids in tokens(4)]
    blocks = find_blocks(model)
    with torch.no_grad():
        found = output_fisher_information(model, blocks, batches, sequences=3, seed=7, placement=InMemory())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    seen: dict[str, list[torch.Tensor]] = {}
    for block in blocks:
        for matrix in block.matrices:
            module = model.get_submodule(matrix.name)
            module.register_full_backward_hook(
                lambda _m, _i, out, name=matrix.name: seen.setdefault(name, []).append(out[0].flatten(0, -2))
            )
    for number, ids in enumerate(torch.cat([batch["input_ids"] for batch in batches])[:3]):
        generator = torch.Generator().manual_seed(7 + number)
        logits = model(ids[None], use_cache=False).logits[0]
        odds = logits.detach().softmax(-1).split(len(logits) if chunk is None or family == "opt" else chunk)
        labels = torch.cat([draw_labels(each, generator) for each in odds])
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for name, squares in found.items():
        assert torch.allclose(squares, torch.cat(seen[name]).square().mean(0), rtol=1e-3, atol=1e-9), name


def test_labels_are_drawn_by_their_odds():
    odds = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.3, 0.0, 0.075, 0.0])
    labels = draw_labels(odds.expand(100_000, -1), torch.Generator().manual_seed(0))
    found = labels.bincount(minlength=len(odds)) / len(labels)
    assert torch.allclose(found, odds, atol=0.006)  # four standard deviations of the largest
    assert not found[odds == 0].any()


def test_a_label_is_found_among_many():
    odds = torch.zeros(4, 50_000)
    odds[torch.arange(4), torch.tensor([0, 7, 30_000, 49_999])] = 1.0
    assert draw_labels(odds, torch.Generator().manual_seed(0)).tolist() == [0, 7, 30_000, 49_999]


def test_padding_gives_no_label_and_its_chunk_may_hold_nothing_else(monkeypatch):
    model = tiny_model("llama").eval()
    monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", 4 * model.config.vocab_size)
    ids = tokens(1)[0][:1]
    padded = {"input_ids": torch.cat([ids, ids[:, :8]], 1), "labels": torch.zeros_like(torch.cat([ids, ids[:, :8]], 1))}
    padded["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :8])], 1)
    with torch.no_grad():
        found = [
            output_fisher_information(model, find_blocks(model), [batch], sequences=1, seed=0, placement=InMemory())
            for batch in ({"input_ids": ids}, padded)
        ]
    for name, squares in found[0].items():
        assert torch.allclose(squares, found[1][name], rtol=1e-4, atol=1e-12), name


def test_experts_share_zeros_exactly_and_idle_ones_weigh_nothing(monkeypatch):
    model = mixtral(num_local_experts=4, num_experts_per_tok=1)
    blocks = find_blocks(model)
    from secateur.models.determinism import _eager_experts

    with torch.no_grad(), _eager_experts(model):
        few = [{"input_ids": torch.tensor([[5]])}]
        one_token = output_fisher_information(model, blocks, few, sequences=1, seed=0, placement=InMemory())
        everyone = [{"input_ids": ids} for ids in tokens(64)]
        found = output_fisher_information(model, blocks, everyone, sequences=64, seed=0, placement=InMemory())
    rows = {name: squares for name, squares in found.items() if "layers.0.mlp.experts.down_proj" in name}
    idle = [squares for name, squares in one_token.items() if "layers.0.mlp.experts.down_proj" in name]
    assert sorted(bool((squares > 0).any()) for squares in idle) == [False, False, False, True]
    assert all(squares.shape == (32,) for squares in idle)
    assert len(rows) == 4
    assert all(bool((squares > 0).any()) for squares in rows.values())
    taken: list[int] = []
    monkeypatch.setattr(
        al,
        "output_fisher_information",
        lambda *given: taken.append(given[3]) or output_fisher_information(*given),
    )
    asked = {"allocation.rule": "curve", "allocation.tokens": 5 * tokens(1)[0].shape[1]}
    report = secateur.prune(mixtral(), pattern="50%", solver="mrp", settings=asked, calibration=tokens(64))
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    assert taken == [5], "sequences whose gradients are taken"


def test_experts_that_see_few_tokens_or_none_are_measured():
    model, few = mixtral(num_local_experts=8), [ids[:1, :6] for ids in tokens(4)]
    report = secateur.prune(model, pattern="50%", solver="mrp", settings={"allocation.rule": "curve"}, calibration=few)
    assert min(matrix.tokens for matrix in report.matrices) == 0
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)


def test_predictions_are_not_always_one_a_token_of_the_mask():
    """A classifier gives one row a text, a decoder one for each of the text's tokens."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=128, **small))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    )
    whole = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(16)]
    pairs = [batch | {"decoder_input_ids": batch["input_ids"][:, :7]} for batch in whole]
    for model, batches in ((classifier, whole), (t5, pairs)):
        report = secateur.prune(
            model, pattern="50%", solver="mrp", settings={"allocation.rule": "curve"}, calibration=batches
        )
        assert report.sparsity == pytest.approx(0.5, abs=1e-4)
        assert len({matrix.sparsity for matrix in report.matrices}) > 2


@pytest.mark.parametrize("rule", ["owl", "curve"])
def test_measuring_changes_neither_the_model_nor_the_stream(rule):
    model = tiny_model("llama").eval()
    batches = [{"input_ids": ids} for ids in tokens()]
    before = copy.deepcopy(model.state_dict())
    found = dense_pass(model, tokens())
    stream, context = found.stream, RunContext(Recipe(allocation={"rule": rule}), quiet)
    with torch.no_grad():
        hidden = [each.clone() for each in stream.hidden]
        al.allocate(model, found.blocks, stream, batches, context)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, hidden, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_row_scales_are_exact_powers_of_two():
    scale = loss_curves.row_scale(torch.rand(100) * torch.logspace(-6, 6, 100))
    assert torch.equal(scale.log2(), scale.log2().round())
    W = torch.randn(100, 8)
    assert torch.equal((W * scale[:, None]) / scale[:, None], W)
    assert 1 / 8 <= float(scale.min()) < float(scale.max()) <= 8


class SeveralExits(torch.nn.Module):
    """A language model whose head takes the sum of all layers' hidden states, as speech models do."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids, use_cache=False):
        states = self.inner.model(input_ids, output_hidden_states=True, use_cache=use_cache).hidden_states
        return SimpleNamespace(logits=self.inner.lm_head(sum(states[1:])))


def test_sensitivity_counts_every_use_of_a_blocks_output():
    model = SeveralExits(tiny_model("llama").eval())
    ids = tokens(2)[0]
    blocks = find_blocks(model)
    with torch.no_grad():
        found = output_fisher_information(
            model, blocks, [{"input_ids": ids}], sequences=1, seed=0, placement=InMemory()
        )
    seen: list[torch.Tensor] = []
    name = "inner.model.layers.0.mlp.down_proj"
    model.get_submodule(name).register_full_backward_hook(lambda _m, _i, out: seen.append(out[0]))
    logits = model(ids[:1]).logits[0]
    labels = draw_labels(logits.detach().softmax(-1), torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert torch.allclose(found[name], seen[0].flatten(0, -2).square().mean(0), rtol=1e-3)


def test_a_curve_of_many_rows_is_scaled_to_all_of_them():
    W, H = problem(rows=loss_curves.SAMPLED_ROWS, columns=48)
    fisher = torch.linspace(0.1, 2.0, len(W), dtype=torch.float64)
    levels = [Unstructured(level) for level in GRID]
    once = loss_curves.loss_curve(W, Hessian(H, 1), fisher, levels)
    twice = loss_curves.loss_curve(W.repeat_interleave(2, 0), Hessian(H, 1), fisher.repeat_interleave(2), levels)
    assert twice.losses == pytest.approx([2 * each for each in once.losses])
    assert twice.num_weights == 2 * once.num_weights


@pytest.mark.parametrize("seed", range(4))
def test_a_curve_finds_the_few_rows_that_matter_wherever_they_are(seed):
    """Fisher information is heavy-tailed: a few rows can hold most of what a curve is made of."""
    generator = torch.Generator().manual_seed(seed)
    W, H = problem(rows=1024, columns=48, seed=seed)
    fisher = torch.randn(1024, generator=generator, dtype=torch.float64).mul(2).exp()
    levels, hessian = [Unstructured(0.5)], Hessian(H, 1)
    everywhere = torch.randperm(1024, generator=generator)
    found = loss_curves.loss_curve(W, hessian, fisher, levels).losses
    assert loss_curves.loss_curve(W[everywhere], hessian, fisher[everywhere], levels).losses == pytest.approx(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_curves, "SAMPLED_ROWS", 1024)
        assert found == pytest.approx(loss_curves.loss_curve(W, hessian, fisher, levels).losses, rel=0.2)


def test_no_matrix_loses_everything():
    assert loss_curves.sparsity_bounds(Unstructured(0.9), 0.3) == pytest.approx((0.6, 0.98))
    assert loss_curves.sparsity_bounds(Unstructured(0.99), 0.3)[1] == 0.99


def test_an_allocation_asks_for_the_sequences_that_hold_its_tokens(monkeypatch):
    looked = []
    first = Stream.first
    monkeypatch.setattr(Stream, "first", lambda *a: looked.append(a[2]) or first(*a))
    prune(settings={"allocation.tokens": 100})
    assert looked == [5]  # sequences of 24 tokens, of 8


def test_the_first_sequences_of_a_stream_are_whole_batches_with_its_damping():
    stream = dense_pass(tiny_model("llama"), tokens(8), damping=Damping(0.07, "auto")).stream
    first = stream.first([2, 2, 2, 2], 4)
    assert (len(first.hidden), first.damping) == (2, Damping(0.07, "auto"))
    assert len(stream.first([2, 2, 2, 2], 5).hidden) == 3


def test_row_scales_reach_the_solver(monkeypatch):
    taken, real = {}, loop.prune_matrix
    monkeypatch.setattr(loop, "prune_matrix", lambda *a: taken.update({a[0].name: a[5]}) or real(*a))
    prune(settings={"allocation.rule": "curve"})
    assert all(scale is not None for scale in taken.values())
    assert any(len(scale.unique()) > 1 for scale in taken.values())


def test_an_outlier_is_one_by_its_input_too():
    H = torch.eye(100)
    H[7, 7] = 100.0
    assert al._count_outliers("", torch.ones(2, 100), Hessian(H, 1)).share == pytest.approx(0.01)


def estimated(model, batches, settings):
    recipe = resolve_recipe(solver="mrp", settings=settings)
    return estimate(copy.deepcopy(model), batches, RunContext(recipe, quiet, DroppedBlocks(InMemory())), 2**30)


def test_a_dry_run_measures_no_matrix_that_a_rule_decides():
    """The pattern of the others would not even fit this one."""
    model = tiny_model("llama", intermediate_size=66)
    rule = {"match": "*.down_proj", "pattern": "50%"}
    asked = {"pattern": "2:4", "allocation.rule": "curve", "allocation.spread": 0.25, "rules": [rule]}
    batches = [{"input_ids": ids} for ids in tokens(8)]
    assert estimated(model, batches, asked).seconds > 0
    assert estimated(model, batches, asked | {"rules": [{"match": "*", "pattern": "50%"}]}).seconds > 0


def test_a_dry_run_gathers_as_many_hessians_at_once_as_the_run(monkeypatch, tmp_path):
    """Under a cap, in the allocation too: here two of 32 inputs."""
    held, chunks, observe, prune = [], [], Stream.observe, dry_run.prune_block

    def watched(stream, block, groups, *others):
        held.append(sum(8 * group.columns**2 for group in groups))
        return observe(stream, block, groups, *others)

    def watched_chunk(*given):
        chunks.append(given[-1].workspace.limit)
        return prune(*given)

    monkeypatch.setattr(Stream, "observe", watched)
    monkeypatch.setattr(dry_run, "prune_block", watched_chunk)
    memory = MemoryBudget(2 * 2 * 8 * 32**2, tmp_path)
    recipe = resolve_recipe(solver="mrp", settings={"allocation.rule": "curve", "allocation.tokens": 1})
    context = RunContext(recipe, quiet, DroppedBlocks(InMemory()), memory)
    batches = [{"input_ids": ids} for ids in tokens(8)]
    assert estimate(tiny_model("llama", intermediate_size=32), batches, context, 2**30).seconds > 0
    assert len(held) == 2 * 2, "the four groups of a block, for the curves and for the solver"
    assert max(held) <= memory.hessian_bytes
    assert chunks == [memory.chunk_bytes]


def test_a_dry_run_counts_what_a_target_holds():
    """A copy of the block's weights, the dense model's hidden states, and three moments of an input instead of one."""
    model, batches = tiny_model("llama"), [{"input_ids": ids} for ids in tokens(8)]
    plain, dense, residual = (
        estimated(model, batches, settings).memory_bytes
        for settings in ({}, {"target.kind": "dense"}, {"target.kind": "residual"})
    )
    block = sum(4 * parameter.numel() for parameter in model.model.layers[0].parameters() if parameter.ndim > 1)
    hidden = 4 * 32 * sum(ids.numel() for ids in tokens(8))
    squares = 8 * (3 * 32**2 + 64**2)  # of all groups: q, o, gate, down
    assert dense - plain == pytest.approx(block + 2 * hidden + 2 * squares, rel=0.05)
    assert residual < dense, "it gathers those of one group at a time"


def test_a_dry_run_takes_gradients_of_all_its_sequences_where_experts_are_modules():
    model = tiny_model("llama").eval()
    for layer in model.model.layers:
        layer.mlp = OneOfTwo(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    batches = [{"input_ids": ids} for ids in tokens(64)]
    asked = {"allocation.rule": "curve", "allocation.tokens": 1}
    assert estimated(model, batches, asked).seconds > 0
    assert secateur.prune(model, solver="mrp", settings=asked, calibration=tokens(64)).sparsity == pytest.approx(0.5)


def test_a_dry_run_times_the_block_with_the_most_weights(monkeypatch):
    """The first block of a mixture of experts is often an ordinary one, and much smaller."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 64, "num_hidden_layers": 3}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "v_head_dim": 16,
    }
    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    more = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "vocab_size": 128}
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**sizes, **heads, **experts, **more)
    ).eval()
    timed = []
    monkeypatch.setattr(dry_run, "_seconds_of_block", lambda block, *_: timed.append(block.name) or (2.0, 3.0))
    monkeypatch.setattr(dry_run, "_timed", lambda function: (function(), 0.0))
    found = estimate(
        model,
        [{"input_ids": batch} for batch in tokens(8)],
        RunContext(Recipe.from_dict({"pattern": "50%"}), quiet, DroppedBlocks(InMemory())),
        2**30,
    )
    assert timed == ["model.layers.1"]
    weights = [sum(each.numel() for each in layer.parameters()) for layer in model.model.layers]
    assert found.seconds == pytest.approx(5.0 * sum(weights) / weights[1])


@pytest.mark.parametrize("sparsity", [0.995, 1.0])
def test_levels_of_a_curve_end_at_no_weight(sparsity):
    levels = loss_curves.curve_levels(Unstructured(sparsity), 0.001)
    assert [level.sparsity for level in levels] == sorted(level.sparsity for level in levels)
