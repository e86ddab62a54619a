"""Channel orders: the search against every order of a small matrix, and models that compute the same in each."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
import transformers
from helpers import Killed, damp, find_chain, kill_at, problem, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from models import OneOfTwo, mixtral, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file
from transformers import BertConfig, BertModel
from zoo import tiny

import secateur
from secateur.numerics.hessian import Hessian
from secateur.permutation import search
from secateur.permutation.channels import ChannelOrder
from secateur.permutation.discovery import in_fp32
from secateur.permutation.order import _some_rows, can_copy, costs_of_zeros
from secateur.permutation.search import find_order, kept_score
from secateur.pruning.context import RunContext
from secateur.pruning.loop import REORDERED, _reorder_channels, checked_dense_pass
from secateur.recipe.declare import RecipeError
from secateur.recipe.patterns import NM
from secateur.recipe.recipe import Recipe
from secateur.runtime.memory import MemoryBudget


def best_of_all_orders(scores):
    """The most that 2:4 keeps of 8 columns, over all ways to make two groups."""
    kept = 0.0
    for first in combinations(range(8), 4):
        rest = [column for column in range(8) if column not in first]
        kept = max(kept, kept_score(scores[:, [*first, *rest]], NM(2, 4)))
    return kept


@given(st.integers(0, 10**6), st.sampled_from([NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(4, 8)]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_order_is_a_permutation_that_keeps_no_less(seed, pattern, few_rows):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(24, 32, generator=generator) ** 4 * torch.rand(32, generator=generator) ** 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TERMS", 1 if few_rows else 1 << 27)
        order = find_order(scores, pattern, 20, seed)
    assert sorted(order.tolist()) == list(range(32))
    assert kept_score(scores[:, order], pattern) >= kept_score(scores, pattern)


def test_the_search_comes_near_the_best_of_all_orders():
    reached = []
    for seed in range(30):
        scores = torch.rand(16, 8, generator=torch.Generator().manual_seed(seed)) ** 4
        before = kept_score(scores, NM(2, 4))
        kept = kept_score(scores[:, find_order(scores, NM(2, 4), 60)], NM(2, 4))
        best = best_of_all_orders(scores)
        reached.append(1.0 if best == before else (kept - before) / (best - before))
    assert min(reached) >= 0.0
    assert sum(reached) / len(reached) > 0.85


def test_large_columns_are_spread_over_the_groups():
    """Four columns far above the others, side by side: no group may hold more than two."""
    scores = torch.rand(10, 16)
    scores[:, :4] += 100
    order = find_order(scores, NM(2, 4), 10)
    assert kept_score(scores[:, order], NM(2, 4)) > kept_score(scores, NM(2, 4)) + 10 * 150
    assert max((order.view(4, 4) < 4).sum(1)) <= 2


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "stablelm"]


@torch.no_grad()
def reorder(model, batches):
    """Reorder a model's channels in place."""
    context = RunContext(Recipe.from_dict({"pattern": "2:4", "permutation": {}}), quiet)
    chain = find_chain(model)
    dense = checked_dense_pass(model, chain, batches, context)
    _reorder_channels(model, chain, dense, batches, context)
    again = checked_dense_pass(model, chain, batches, context)
    for ours, theirs in zip(dense.stream.hidden, again.stream.hidden, strict=True):
        assert torch.equal(ours, theirs)  # they are what flows into the reordered model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_in_another_order(family):
    """Every kind of channel is found, and moves."""
    before = tiny_model(family).eval()
    after, batches = copy.deepcopy(before), [{"input_ids": ids} for ids in tokens(12)]
    reorder(after, batches)
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    for batch in batches:
        expected, found = before(**batch).logits, after(**batch).logits
        assert (found - expected).norm() < 1e-5 * expected.norm()
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert sum(not torch.equal(ours, theirs) for ours, theirs in pairs if ours.ndim == 2) > 5


@pytest.mark.parametrize("family", ["OPT", "Phi"])
def test_a_wrong_guess_that_changes_little_is_found(family):
    """Small weights give all tokens much the same attention, and biases make most of the output."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    torch.manual_seed(0)
    widths = {"ffn_dim": 64, "word_embed_proj_dim": 32} if family == "OPT" else {"intermediate_size": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **widths)
    before = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for each in before.parameters():
            if each.ndim == 1:
                each.add_(torch.randn_like(each) * 0.3)
    after, batches = copy.deepcopy(before), [{"input_ids": ids} for ids in tokens(12)]
    reorder(after, batches)
    expected, found = before(**batches[0]).logits, after(**batches[0]).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_channels_that_later_blocks_read_too_stay(family):
    """Later blocks take the keys and values of earlier ones. Gemma 4 has a head size for each layer."""
    before = tiny(family)
    after, batches = copy.deepcopy(before), [{"input_ids": ids} for ids in tokens(12)]
    reorder(after, batches)
    for batch in batches:
        expected, found = before(**batch).logits, after(**batch).logits
        assert (found - expected).norm() < 1e-5 * expected.norm()
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


def test_sampled_rows_stand_for_all():
    scores = torch.arange(8.0)[:, None].expand(8, 3)
    found = _some_rows(scores, 4)
    assert torch.equal(found[:, 0], 2 * torch.tensor([0.0, 2.0, 5.0, 7.0]))
    assert torch.equal(_some_rows(scores, 99), scores)


SETTINGS = {"pattern": "2:4", "solver": "mrp", "calibration": tokens(32), "settings": {"permutation.rounds": 5}}


def test_a_run_from_files_gives_the_bits_of_one_in_memory(tmp_path):
    model = save_checkpoint(tmp_path / "dense", dtype=torch.float32)
    dense = copy.deepcopy(model.state_dict())
    report = secateur.prune(model.eval(), **SETTINGS)
    assert REORDERED in report.notices
    secateur.prune(tmp_path / "dense", tmp_path / "out", **SETTINGS)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
    assert not torch.equal(found["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert not (tmp_path / ".out.secateur").exists()


@pytest.mark.parametrize(("stage", "number"), [("prune", 1), ("save", 1)])
def test_a_resumed_run_keeps_the_order(tmp_path, monkeypatch, stage, number):
    """Killed between blocks, and when all blocks are done: the search does not run again, and the bits agree."""
    save_checkpoint(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "whole", **SETTINGS)
    with pytest.raises(Killed):
        secateur.prune(
            tmp_path / "dense", tmp_path / "out", max_shard_size="20KB", progress=kill_at(stage, number), **SETTINGS
        )
    monkeypatch.setattr("secateur.pruning.loop.OrderSearch", None)
    report = secateur.prune(tmp_path / "dense", tmp_path / "out", resume=True, **SETTINGS)
    assert REORDERED in report.notices
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert whole.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


def test_the_layer_error_falls():
    errors = []
    for changes in ({}, {"permutation.rounds": 12}):
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        with torch.no_grad():  # neighbouring channels of like size, as trained models have some
            scale = torch.rand(16).repeat_interleave(4) * 3
            model.model.embed_tokens.weight.mul_(scale)
        report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=tokens(64), settings=changes)
        errors.append(report.mean_relative_error)
    assert errors[1] < 0.95 * errors[0]


def test_a_model_without_a_head_gives_its_hidden_states_in_their_own_order():
    """An embedding in another order would be another embedding."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = BertModel(config).eval()
    before = copy.deepcopy(model)
    batches = [{"input_ids": ids} for ids in tokens(12)]
    reorder(model, batches)
    with torch.no_grad():
        found, expected = (each(**batches[0]).last_hidden_state for each in (model, before))
    assert torch.allclose(found, expected, atol=1e-5)
    moved = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before.get_parameter(name))]
    assert any("intermediate" in name for name in moved)


@pytest.mark.parametrize("what", ["order", "dtype"])
def test_a_trial_that_runs_out_of_memory_leaves_the_weights(what, monkeypatch):
    """It fails at the second tensor."""
    model = tiny_model("llama", torch.bfloat16)
    parameters = dict(model.named_parameters())
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    calls = []

    def fails(self, *_):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return self.clone()

    name = {"order": "index_select", "dtype": "float"}[what]
    monkeypatch.setattr(torch.Tensor, name, fails)
    order = ChannelOrder(indices={name: {0: torch.arange(len(each))} for name, each in parameters.items()})
    trial = order.tried(parameters) if what == "order" else in_fp32(list(parameters.values()))
    with pytest.raises(MemoryError), trial:
        pass
    assert len(calls) == 2
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == before


def test_an_unstructured_pattern_is_refused():
    with pytest.raises(RecipeError, match="is for n:m patterns"):
        Recipe.from_dict({"pattern": "50%", "permutation": {}})


def test_experts_in_one_tensor_stay_as_they_are():
    model = mixtral().eval()
    before = copy.deepcopy(model)
    batches = [{"input_ids": ids} for ids in tokens(12)]
    reorder(model, batches)
    assert (model(**batches[0]).logits - before(**batches[0]).logits).abs().max() < 1e-4
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_padding_in_front_does_not_hide_a_wrong_guess():
    """On padding alone all positions look alike, and attention may mix heads without a difference."""
    before = tiny_model("llama", num_key_value_heads=4, max_position_embeddings=128).eval()
    after = copy.deepcopy(before)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(12, 96)]
    for batch in batches:
        batch["input_ids"][:, :60] = 0
        batch["attention_mask"][:, :60] = 0
    reorder(after, batches)
    expected, found = (model(**batches[0]).logits[:, 60:] for model in (before, after))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_module_that_the_texts_do_not_reach_keeps_the_residual_stream():
    """Such as the projector of pictures: its outputs would be left behind."""
    model = tiny_model("llama").eval()
    model.projector = torch.nn.Linear(8, 32)
    before = copy.deepcopy(model)
    reorder(model, [{"input_ids": ids} for ids in tokens(12)])
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


class Expert(torch.nn.Module):
    """A norm stands between its two matrices, so the order of their channels can't change."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 32)
        torch.nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def test_an_expert_that_was_not_run_is_not_reordered():
    """What no token of the trial reached was not tried; its matrices need no Hessian, and few sequences have one."""
    model = tiny_model("llama").eval()
    for layer in model.model.layers:
        layer.mlp = OneOfTwo(Expert(), Expert())
    before = copy.deepcopy(model)
    batches = [{"input_ids": ids} for ids in tokens(24)]
    reorder(model, batches)
    for batch in batches:
        expected, found = before(**batch).logits, model(**batch).logits
        assert (found - expected).norm() < 1e-5 * expected.norm()
    layer, earlier = model.model.layers[0], before.model.layers[0]
    assert not torch.equal(layer.self_attn.v_proj.weight, earlier.self_attn.v_proj.weight)


def test_a_bottleneck_inside_a_block_does_not_hide_the_residual_stream():
    """A matrix that takes in channels of the block, and whose outputs are not the residual stream's."""
    model = tiny_model("llama").eval()
    for layer in model.model.layers:
        mlp = torch.nn.Sequential(
            torch.nn.Linear(32, 8), torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
        )
        layer.mlp = mlp
    before = copy.deepcopy(model)
    reorder(model, batches := [{"input_ids": ids} for ids in tokens(12)])
    expected, found = before(**batches[0]).logits, model(**batches[0]).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_a_cost_is_that_of_a_single_removal_relative_to_the_output():
    W, H = problem(6, 16)
    expected = W.square() / damp(H).inverse().diagonal() / ((W @ H) * W).sum()
    for scale in (1, 10):
        assert torch.allclose(costs_of_zeros(scale * W, Hessian(H, tokens=1)), expected)


def test_copies_for_a_trial_take_half_of_the_memory_at_most():
    weights = [torch.nn.Parameter(torch.empty(10, 10))]
    assert can_copy(weights, MemoryBudget(1600))
    assert not can_copy(weights, MemoryBudget(1599))
