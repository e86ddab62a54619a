"""The dense pass: stubbed blocks record what whole passes record, and each block is onloaded once for all batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import find_chain, quiet
from models import FAMILIES, randomised, save_checkpoint, t5, tiny_model, tokens
from torch import Tensor
from torch.utils._pytree import tree_flatten
from zoo import tiny

import secateur
from secateur.calibration.dense_pass import run_dense_pass
from secateur.checkpoints.load import load
from secateur.models.blocks import ForwardError, run_without_cache
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import find_block_chains
from secateur.models.placement import OffloadedWeights
from secateur.models.stubs import CallSample, same_calls, stubbed
from secateur.recipe.recipe import Recipe

OTHERS = ("mamba", "mixtral", "deepseek_v3", "qwen3_next", "gpt_oss", "lfm2", "rwkv", "bamba")


def batches_of(number=8, padded=True):
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(number)]
    if padded:
        batches[1]["attention_mask"][0, 17:] = 0
    return batches


def tensors_in(call):
    """All tensors of a call other than its hidden states."""
    return [leaf for leaf in tree_flatten((call.args, call.kwargs))[0] if isinstance(leaf, Tensor)]


def passes(model, batches):
    """The dense pass with stubs, and by whole passes."""
    model.eval()
    with deterministic_forward(model):
        chain = find_chain(model)
        assert chain.stub_outputs is not None, "stubs change no call of this family"
        return [run_dense_pass(model, each, batches, quiet) for each in (chain, replace(chain, stub_outputs=None))]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_stubs_record_what_whole_passes_record(family):
    model = tiny_model(family) if family in FAMILIES else tiny(family)
    one, other = passes(model, batches_of(padded=family not in OTHERS))
    assert all(torch.equal(*pair) for pair in zip(one.stream.hidden, other.stream.hidden, strict=True))
    assert one.stream.calls.keys() == other.stream.calls.keys()
    for name, calls in one.stream.calls.items():
        for ours, theirs in zip(calls, other.stream.calls[name], strict=True):
            assert ours.kwargs.keys() == theirs.kwargs.keys()
            pairs = list(zip(tensors_in(ours), tensors_in(theirs), strict=True))
            assert all(torch.equal(*pair) for pair in pairs)
    groups = [
        {name: [[m.name for m, _ in group.members] for group in found] for name, found in each.stream.groups.items()}
        for each in (one, other)
    ]
    assert groups[0] == groups[1]
    assert one.stream.routed == other.stream.routed
    assert [block.dense for block in one.blocks] == [block.dense for block in other.blocks]
    assert list(one.missed) == list(other.missed)


def test_blocks_that_hand_on_more_than_hidden_states_run_as_a_whole():
    """T5's first block makes the position bias of all others."""
    model, batches, _ = t5()
    model = randomised(model)
    structure = find_block_chains(model, batches[0], Recipe())
    assert [chain.stub_outputs for chain in structure.chains] == [None, None]
    stream = run_dense_pass(model, structure.chains[0], batches, quiet).stream
    assert len(stream.calls["encoder.block.1"]) == len(batches)


def test_each_block_is_copied_once_for_all_batches(tmp_path):
    save_checkpoint(tmp_path / "model", dtype=torch.float16, num_hidden_layers=4)
    model = load(str(tmp_path / "model"), converted=tmp_path / "converted").model
    placement, shapes = OffloadedWeights("cpu", torch.float32), []
    copy = placement._copy
    placement._copy = lambda data: shapes.append(data.shape) or copy(data)
    batches = batches_of(14, padded=False)
    with deterministic_forward(model):
        chain = find_block_chains(model, batches[0], Recipe(), placement).chains[0]
        shape = chain.blocks[0].module.mlp.down_proj.weight.shape
        assert shapes.count(shape) == 4, "one pass of one sequence, and a trial with stubs that copies no block"
        shapes.clear()
        found = run_dense_pass(model, chain, batches, quiet, placement)
    assert len(found.stream.hidden) == 7
    assert shapes.count(shape) == 4
    assert not placement._copies


def test_blocks_have_their_own_forward_again_whatever_happens():
    model = tiny_model("llama").eval()
    chain = find_chain(model)
    with pytest.raises(ZeroDivisionError), stubbed(chain.blocks, chain.stub_outputs):
        _ = 1 / 0
    assert all("forward" not in vars(block.module) for block in chain.blocks)


def test_an_autocast_inside_a_models_forward_stays_inside(tmp_path):
    """The model's forward pass sets it; a run from files must not leave it on."""
    save_checkpoint(tmp_path / "model", num_hidden_layers=2)
    model = load(str(tmp_path / "model"), converted=tmp_path / "converted").model
    forward = model.model.forward

    def cast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.model.forward = cast
    placement, batches = OffloadedWeights("cpu", torch.float32), batches_of(12, padded=False)
    with deterministic_forward(model):
        chain = find_block_chains(model, batches[0], Recipe(), placement).chains[0]
        run_dense_pass(model, chain, batches, quiet, placement)
        assert not torch.is_autocast_enabled("cpu")


def test_calls_that_differ_are_told_apart():
    model = tiny_model("llama").eval()
    block = find_chain(model).blocks[0]
    stream = run_dense_pass(model, find_chain(model), batches_of(4, padded=False), quiet).stream
    first, second = stream.calls[block.name]
    call = replace(first, kwargs=first.kwargs | {"extra": torch.ones(2)})
    assert same_calls(CallSample({"a": first}), CallSample({"a": second}))
    assert not same_calls(CallSample({"a": first}), CallSample({"a": call}))
    other = replace(first, kwargs=first.kwargs | {"extra": torch.zeros(2)})
    assert not same_calls(CallSample({"a": call}), CallSample({"a": other}))
    shared = {"state": torch.ones(2)}  # a container that earlier blocks may have filled
    held = replace(first, kwargs={"shared": shared})
    assert not same_calls(CallSample({"a": held}), CallSample({"a": held}))


def test_an_error_of_the_model_is_explained_while_weights_are_watched():
    """Every call of torch then ends in a frame of ours. Only a later batch is wrong, which no block has seen before."""
    good = [{"input_ids": ids} for ids in tokens(3)]
    batches = [*good, {"input_ids": tokens()[0], "position_ids": torch.arange(3)[None]}]
    with pytest.raises(ForwardError, match="LlamaDecoderLayer fails on these inputs"):
        secateur.prune(tiny_model("llama"), pattern="50%", solver="magnitude", calibration=batches)


def test_a_bug_of_ours_inside_a_forward_pass_is_not_taken_for_the_models():
    model = tiny_model("llama")
    with pytest.raises(ForwardError, match="LlamaForCausalLM fails on these inputs"):
        run_without_cache(model, model, input_ids=torch.ones(2, 3))

    class Buggy(OffloadedWeights):
        def _copied(self, tensors):
            raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"), Buggy("cpu", torch.float64).onload_model(model):
        run_without_cache(model, model, input_ids=tokens()[0])
