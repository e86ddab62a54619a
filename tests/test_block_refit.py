"""The block refit: exact masks, never worse on validation batches, nothing else touched."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from helpers import dense_pass, find_chain, quiet
from models import mixtral, tiny_model, tokens

import secateur
from secateur.calibration.dense_pass import run_dense_pass
from secateur.calibration.hidden_states import HiddenStates
from secateur.pruning import block_refit, loop
from secateur.pruning.block_refit import MaskedMasterWeights, OutputError, refit_block, refit_targets
from secateur.pruning.context import RunContext
from secateur.pruning.loop import prune_model
from secateur.recipe import steps
from secateur.recipe.patterns import parse_pattern
from secateur.recipe.recipe import Recipe
from secateur.recipe.steps import BlockRefit
from secateur.runtime import memory

REFIT = {"epochs": 4}


def pruned(family="llama", pattern="2:4", dtype=torch.float32, refit=REFIT, sequences=96, **options):
    """A tiny model by mrp and a block refit."""
    model = tiny_model(family, dtype)
    settings = {"refit": refit}
    return model, secateur.prune(
        model, pattern=pattern, solver="mrp", calibration=tokens(sequences), settings=settings, **options
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "bloom", "phi3"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_masks_stay_exact_and_only_pruned_matrices_move(family, pattern):
    dense = copy.deepcopy(tiny_model(family).state_dict())
    plain, _ = pruned(family, pattern, refit=None, sequences=32)
    model, report = pruned(family, pattern, sequences=32)
    names = {f"{matrix.name}.weight" for matrix in report.matrices}
    for name, tensor in model.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, dense[name]), name
    first = report.matrices[0]  # later ones see other inputs
    zeros = [model.get_parameter(first.name + ".weight").data == 0 for model in (model, plain)]
    assert torch.equal(*zeros)
    assert any(block.best_epoch > 0 for block in report.blocks)
    assert int(zeros[0].sum()) == first.zeros == parse_pattern(pattern).num_pruned(first.rows, first.columns)


def test_no_block_is_worse_on_validation_batches_and_some_are_better():
    _, report = pruned()
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert block.val_loss_after <= block.val_loss_before
        assert (block.val_loss_after < block.val_loss_before) == (block.best_epoch > 0)
    assert report.blocks[0].val_loss_after < 0.99 * report.blocks[0].val_loss_before


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_targets_lie_between_the_dense_block_on_either_stream(strength):
    """Against two plain calls of the layer; the solver's look at the block's inputs gives its outputs too."""
    model = tiny_model("llama").eval()
    found = dense_pass(model, tokens(6))
    stream, (_, second) = found.stream, found.blocks
    with torch.no_grad():
        stream.dense = stream.hidden.copy()
        dense_outputs = stream.outputs(second, of_dense=True)
        stream.hidden[1] = stream.hidden[1] + torch.randn(stream.hidden[1].shape)
        pruned_outputs = HiddenStates(number=len(stream.hidden))
        stream.observe(second, stream.groups[second.name], pruned_outputs)
        targets = refit_targets(pruned_outputs, dense_outputs, strength)
        expected = strength * dense_outputs[1] + (1 - strength) * stream.outputs(second)[1]
    assert len(targets) == len(dense_outputs)
    assert torch.allclose(targets[1], expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(targets[0], dense_outputs[0], rtol=1e-5, atol=1e-5)  # the streams agree there
    assert targets is pruned_outputs, "a fifth set of hidden states would not be counted (HIDDEN_SETS)"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (mixtral, {}),
        (partial(tiny_model, "llama"), {}),
        (partial(tiny_model, "llama"), {"true_sequential": True}),
        (partial(tiny_model, "llama"), {"target.kind": "dense"}),
        (partial(tiny_model, "llama"), {"target.kind": "residual"}),
    ],
)
@pytest.mark.parametrize("hessian_bytes", [memory.HESSIAN_BYTES, 1])
def test_the_targets_of_a_run_are_those_of_the_block_before_it_is_pruned(monkeypatch, family, settings, hessian_bytes):
    """The first block sees no error of another, so its two targets agree however it is observed; the second's don't."""
    monkeypatch.setattr(memory, "HESSIAN_BYTES", hessian_bytes)
    taken = []

    def kept(*given):
        taken.append([list(outputs) for outputs in given[:2]])
        return refit_targets(*given)

    monkeypatch.setattr(loop, "refit_targets", kept)
    options = {"refit.epochs": 1, "refit.strength": 0.5} | settings
    secateur.prune(family(), pattern="2:4", solver="mrp", calibration=tokens(32), settings=options)
    agree = [all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*both, strict=True)) for both in taken]
    assert agree == [True, False]
    assert [len(each) for both in taken for each in both] == [16] * 4


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_the_reported_error_is_that_of_the_weights_as_saved(storage):
    """Recomputed from the final weights; with weights saved narrower than the forward pass computes, too."""
    model = tiny_model("llama").eval()
    found = dense_pass(model, tokens(96))
    stream, blocks = found.stream, found.blocks
    with torch.no_grad():
        stream.dense = list(stream.hidden)
        targets = stream.outputs(blocks[0], of_dense=True)
        for matrix in blocks[0].matrices:
            matrix.stored.mul_(torch.rand(matrix.stored.shape) > 0.3).copy_(matrix.stored.to(storage))
        options = BlockRefit(epochs=2, rate=0.002, val_fraction=0.125)
        objective = OutputError(blocks[0], stream, targets)
        figures = refit_block(
            blocks[0], objective, len(targets), options, seed=5, storage_of=lambda _name, _own: storage
        )
        outputs = stream.outputs(blocks[0])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5)).tolist()
    each = [float((((outputs[i] - targets[i]) ** 2).sum(-1) / (targets[i] ** 2).sum(-1)).mean()) for i in order[:6]]
    assert figures["val_loss_after"] == pytest.approx(sum(each) / 6, rel=1e-5)
    assert figures["val_loss_after"] < figures["val_loss_before"]
    for matrix in blocks[0].matrices:
        assert torch.equal(matrix.stored, matrix.stored.to(storage).float())


def test_gradients_of_the_caller_are_given_back():
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    plain, _ = pruned()
    secateur.prune(model, pattern="2:4", calibration=tokens(96), solver="mrp", settings={"refit": REFIT})
    assert all(bool((parameter.grad == 1e3).all()) for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_the_scale_of_hidden_states_does_not_matter():
    """The objective is relative, and so are the steps."""
    gains = []
    for scale in (1.0, 1e4):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(scale)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight.mul_(scale)
        report = secateur.prune(model, pattern="2:4", calibration=tokens(96), solver="mrp", settings={"refit": REFIT})
        gains.append(report.blocks[0].val_loss_after / report.blocks[0].val_loss_before)
    assert gains[1] == pytest.approx(gains[0], rel=0.05)


def test_a_rate_that_ruins_every_pass_is_lowered(monkeypatch):
    """Without the lower ones the weights stay as solved; with them the block gains."""
    _, report = pruned(refit={"rate": 0.9, "epochs": 2})
    assert all(block.val_loss_after < block.val_loss_before and 0 < block.rate < 0.9 for block in report.blocks)
    monkeypatch.setattr(block_refit, "ATTEMPTS", 1)
    plain, _ = pruned(refit=None)
    ruined, report = pruned(refit={"rate": 0.9, "epochs": 2})
    assert [(block.best_epoch, block.rate) for block in report.blocks] == [(0, 0.9), (0, 0.9)]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ruined.state_dict()[name], tensor)


def test_a_refit_that_goes_too_far_is_taken_back_part_of_the_way(monkeypatch):
    """One attempt at a rate that is a little too high: half of the way helps where all of it harms."""
    monkeypatch.setattr(block_refit, "ATTEMPTS", 1)
    too_far = {"rate": 0.06, "epochs": 1}
    plain, _ = pruned(pattern="50%", refit=None)
    model, report = pruned(pattern="50%", refit=too_far)
    first = report.blocks[0]
    assert first.val_loss_after < 0.9 * first.val_loss_before
    assert (first.best_epoch, first.rate) == (1, 0.06)
    name = report.matrices[0].name + ".weight"
    assert torch.equal(model.get_parameter(name) == 0, plain.get_parameter(name) == 0)
    monkeypatch.setattr(block_refit, "STEPS_BACK", ())
    _, report = pruned(pattern="50%", refit=too_far)
    assert report.blocks[0].best_epoch == 0


def test_an_attempt_ends_with_a_hopeless_first_pass(monkeypatch):
    """However many passes are left: one at each ruinous rate, so that more of them cost nothing."""
    measured = []
    mean = block_refit._Shared.mean
    monkeypatch.setattr(block_refit._Shared, "mean", lambda self, val: measured.append(1) or mean(self, val))
    _, report = pruned(refit={"rate": 0.9, "epochs": 9})
    tried = [1 + round(math.log(0.9 / block.rate, 4)) for block in report.blocks]  # rates of each block
    assert min(tried) > 1
    assert len(measured) == sum(1 + (count - 1) + 9 for count in tried)


def test_an_attempt_ends_with_a_first_pass_that_is_not_finite(monkeypatch):
    """Every other attempt as well, so the weights stay as solved."""
    measured, attempts = [], block_refit.ATTEMPTS
    mean = block_refit._Shared.mean

    def ruined(self, val):
        measured.append(mean(self, val))
        return measured[-1] if len(measured) == 1 else math.nan

    monkeypatch.setattr(block_refit._Shared, "mean", ruined)
    _, report = pruned(refit={"epochs": 9}, exclude=["*.1.*"])
    assert [block.best_epoch for block in report.blocks] == [0]
    assert len(measured) == 1 + attempts


@pytest.mark.parametrize(("most", "epochs"), [(None, 4), (10**9, 4), (3 * 96 * 24, 3), (96 * 24 + 1, 1), (5, 1)])
def test_a_longer_text_gets_fewer_epochs(monkeypatch, most, epochs):
    """As many as the cap allows over 96 x 24 tokens: every epoch ends with a look at the validation batches."""
    measured = []
    mean = block_refit._Shared.mean
    monkeypatch.setattr(block_refit._Shared, "mean", lambda self, val: measured.append(1) or mean(self, val))
    _, report = pruned(refit=REFIT | {"rate": 0.001, "max_tokens": most})
    assert len(measured) == sum(1 + epochs for _ in report.blocks)


@pytest.mark.parametrize(("width", "share"), [(576, 1), (32, 1), (24, 0.75), (8, 0.25)])
def test_wide_blocks_take_lower_rates(monkeypatch, width, share):
    """In proportion above the width that rates were chosen at; the tiny model has 32 channels."""
    monkeypatch.setattr(steps, "WIDTH_OF_RATES", width)
    _, report = pruned(refit={"epochs": 1, "rate": 0.001}, sequences=32)
    assert report.blocks[0].best_epoch == 1
    assert report.blocks[0].rate == pytest.approx(0.001 * share)


def test_same_seed_gives_the_same_bits_and_gradients_are_left_as_found():
    first, _ = pruned(dtype=torch.bfloat16)
    second, _ = pruned(dtype=torch.bfloat16)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())


def test_excluded_matrices_are_not_refit():
    dense = copy.deepcopy(tiny_model("llama").state_dict())
    model, _ = pruned(exclude=["*.v_proj"])
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        assert torch.equal(model.state_dict()[name], dense[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_are_refit_but_for_excluded_ones(dtype):
    model = mixtral().to(dtype)
    name = "model.layers.0.mlp.experts.down_proj"
    before = model.get_parameter(name).data.mul_(1.1).clone()  # fp64 that fp32 does not hold
    report = secateur.prune(
        model, pattern="50%", solver="mrp", settings={"refit": {}}, exclude=[f"{name}[1]"], calibration=tokens(64)
    )
    after = model.get_parameter(name).data
    assert torch.equal(after[1], before[1])
    pruned = {matrix.name: matrix.zeros for matrix in report.matrices}
    for index in (0, 2, 3):
        assert int((after[index] == 0).sum()) == pruned[f"{name}[{index}]"]
    assert report.blocks[0].best_epoch > 0


def test_each_expert_has_its_own_rate():
    model = mixtral()
    experts = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    with torch.no_grad():
        experts[0] *= 20
        experts[2:, :, ::2] = 0
    block = find_chain(model, Recipe()).blocks[0]
    weights = MaskedMasterWeights(block, lambda _, dtype: dtype)
    place = sum(
        len(each) if each.ndim == 3 else 1 for each in weights.parameters[: _index(weights.parameters, experts)]
    )
    expected = [float(each[each != 0].square().mean().sqrt()) for each in experts]
    assert weights.scales[place : place + len(experts)] == pytest.approx(expected)
    assert len(weights.scales) == len(weights.parts)
    weights.gradients[0].fill_(7)
    assert (weights.parts[0].grad == 7).all()


def _index(parameters, wanted):
    return next(number for number, each in enumerate(parameters) if each is wanted)


def test_objective_is_the_relative_error_of_each_token():
    """Against a plain loop, with padded positions left out."""
    model = tiny_model("llama").eval()
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(4)]
    batches[0]["attention_mask"][0, 20:] = 0
    found = run_dense_pass(model, find_chain(model), batches, quiet)
    stream, blocks = found.stream, found.blocks
    with torch.no_grad():
        stream.dense = list(stream.hidden)
        targets = stream.outputs(blocks[0], of_dense=True)
        for matrix in blocks[0].matrices:
            matrix.stored.mul_(0.5)
        outputs = stream.outputs(blocks[0])
        objective = OutputError(blocks[0], stream, targets)
        figures = refit_block(blocks[0], objective, len(targets), BlockRefit(epochs=0), seed=3)
    held_out = int(torch.randperm(2, generator=torch.Generator().manual_seed(3))[0])
    y, target = outputs[held_out], targets[held_out]
    each = ((y - target) ** 2).sum(-1) / (target**2).sum(-1)
    expected = each[batches[held_out]["attention_mask"].bool()].mean()
    assert figures["val_loss_before"] == pytest.approx(float(expected), rel=1e-5)


def test_one_batch_is_refused_before_anything_changes():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    context = RunContext(Recipe(refit=BlockRefit()), quiet)
    with pytest.raises(ValueError, match="needs 2 calibration batches or more"):
        prune_model(model, [{"input_ids": tokens(2)[0]}], context)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_as_a_cosine():
    rates = [block_refit._schedule(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] < 0.001


def test_every_step_takes_the_rate_of_the_schedule(monkeypatch):
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *_: taken.append(self.param_groups[0]["lr"]) or step(self)
    )
    pruned(refit={"epochs": 1, "val_fraction": 0.125})
    steps = 48 - 6
    assert [each / max(taken[:steps]) for each in taken[:steps]] == pytest.approx(
        [block_refit._schedule(number, steps) for number in range(steps)]
    )


def test_the_layout_of_expert_weights_in_memory_changes_nothing():
    """Torch's fused Adam goes through the memory of a view as if it were contiguous."""
    found = []
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        model = mixtral()
        for layer in model.model.layers:
            stack = layer.mlp.experts.down_proj
            back = [order.index(dim) for dim in range(3)]
            stack.data = stack.data.permute(order).contiguous().permute(back)
        report = secateur.prune(model, solver="wanda", calibration=tokens(32), settings={"refit": REFIT})
        found.append([block.val_loss_after for block in report.blocks])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
