"""The dense and residual targets against least squares, and the detection of residual writes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers import dense_pass
from models import mixtral, tiny_model, tokens

import secateur
from secateur.numerics.hessian import Hessian
from secateur.pruning.dense_target import DenseWeights, Moments, dense_target_weights, observe_moments, write_gain
from secateur.recipe.steps import DenseTarget


def test_dense_target_is_the_least_squares_answer_to_drifted_inputs():
    generator = torch.Generator().manual_seed(0)
    W, Xd = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 12), (12, 400)))
    Xp = Xd + 0.3 * torch.randn(12, 400, generator=generator, dtype=torch.float64)
    hessian, drift = Hessian(Xp @ Xp.T / 400, 400, damping=1e-9), (Xd - Xp) @ Xp.T / 400
    Wt = dense_target_weights(W, Moments(hessian, drift), DenseTarget(kind="dense", strength=1.0))
    assert torch.allclose(Wt, torch.linalg.lstsq(Xp.T, (W @ Xd).T).solution.T, rtol=1e-5)
    half = dense_target_weights(W, Moments(hessian, drift), DenseTarget(kind="dense", strength=0.5))
    assert torch.allclose(half, (W + Wt) / 2, rtol=1e-6)
    assert torch.equal(dense_target_weights(W, Moments(hessian, drift), DenseTarget(kind="dense", strength=0.0)), W)


def test_residual_target_takes_back_the_error_of_the_output():
    generator = torch.Generator().manual_seed(0)
    W, X, E = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((5, 12), (12, 400), (5, 400)))
    moments = Moments(
        Hessian(X @ X.T / 400, 400, damping=1e-9), torch.zeros(12, 12, dtype=torch.float64), E @ X.T / 400
    )
    Wt = dense_target_weights(W, moments, DenseTarget(kind="residual", strength=1.0), write_gain=0.5)
    assert torch.allclose(Wt, W + torch.linalg.lstsq(X.T, E.T / 0.5).solution.T, rtol=1e-5, atol=1e-8)


def granite():
    """Its blocks write a quarter of what their layers give."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.25,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config)


def prepared(family, **overrides):
    model = (granite() if family == "granite" else tiny_model(family, **overrides)).eval()
    found = dense_pass(model, tokens())
    found.stream.dense = list(found.stream.hidden)
    return found.blocks, found.stream


@pytest.mark.parametrize(
    ("family", "overrides", "writes"),
    [
        ("llama", {}, {"mlp.down_proj": 1.0, "self_attn.o_proj": 1.0}),
        ("granite", {}, {"mlp.down_proj": 0.25, "self_attn.o_proj": 0.25}),
        ("gpt2", {}, {"mlp.c_proj": 1.0, "attn.c_proj": 1.0}),
        ("falcon", {}, {"mlp.dense_4h_to_h": 1.0, "self_attention.dense": 1.0}),
        ("gemma3", {}, {}),
    ],
)
def test_writes_into_the_residual_stream_are_found(family, overrides, writes):
    blocks, stream = prepared(family, **overrides)
    found = {}
    with torch.no_grad():
        for group in stream.groups[blocks[0].name]:
            for matrix, input_dim in group.members:
                before = matrix.stored.clone()
                gain = write_gain(blocks[0], stream, matrix, input_dim)
                assert torch.equal(matrix.stored, before)
                if gain is not None:
                    found[matrix.name.removeprefix(f"{blocks[0].name}.")] = gain
    assert set(found) == set(writes)
    for name, gain in writes.items():
        assert found[name] == pytest.approx(gain, rel=0.15)


def test_moments_of_both_streams_equal_those_of_plain_hooks():
    blocks, stream = prepared("llama")
    block = blocks[0]
    dense_hidden = [hidden + 0.1 * torch.randn_like(hidden) for hidden in stream.hidden]
    stream.dense = dense_hidden
    seen: list[torch.Tensor] = []
    hook = block.module.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense_outputs = stream.outputs(block, of_dense=True)
        Xd, _ = torch.cat(seen), seen.clear()
        outputs = stream.outputs(block)
        Xp = torch.cat(seen)
        hook.remove()
        group = stream.groups[block.name][0]
        found = observe_moments(
            block, stream, [group], dense_outputs, DenseWeights(block), DenseTarget(kind="residual")
        )
    moments = found[group.leader.name]
    E = torch.cat([(d - p).flatten(0, 1) for d, p in zip(dense_outputs, outputs, strict=True)])
    assert torch.allclose(moments.hessian.H, Xp.T @ Xp / len(Xp), atol=1e-5)
    assert torch.allclose(moments.drift, (Xd - Xp).T @ Xp / len(Xp), atol=1e-5)
    assert torch.allclose(moments.error, E.T @ Xp / len(Xp), atol=1e-5)


def test_dense_inputs_are_those_of_the_dense_block_though_a_part_of_it_is_pruned():
    """Groups of a block are observed one after another: here o_proj, when q, k and v have lost half of their inputs."""
    blocks, stream = prepared("llama")
    block = blocks[0]
    by_leader = {group.leader.name.removeprefix(f"{block.name}."): group for group in stream.groups[block.name]}
    seen: list[torch.Tensor] = []
    hook = block.module.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        originals, dense_outputs = DenseWeights(block), stream.outputs(block, of_dense=True)
        Xd, _ = torch.cat(seen), seen.clear()
        for matrix, _ in by_leader["self_attn.q_proj"].members:
            matrix.stored[:, ::2] = 0
        stream.outputs(block)
        Xp = torch.cat(seen)
        hook.remove()
        group, target = by_leader["self_attn.o_proj"], DenseTarget(kind="residual")
        moments = observe_moments(block, stream, [group], dense_outputs, originals, target)
    assert torch.allclose(moments[group.leader.name].drift, (Xd - Xp).T @ Xp / len(Xp), atol=1e-5)
    assert moments[group.leader.name].drift.abs().max() > 1e-3


def test_a_residual_target_moves_the_matrices_that_write_into_the_residual_stream():
    settings = {"target.kind": "residual", "target.strength": 1.0}
    report = secateur.prune(tiny_model("llama"), solver="mrp", calibration=tokens(8), settings=settings)
    writes = {each.name.rsplit(".", 1)[1] for each in report.matrices if each.figures.get("write_gain") is not None}
    assert writes == {"o_proj", "down_proj"}
    moved = [each for each in report.matrices if ".1." in each.name]
    assert all(each.target_error < each.relative_error for each in moved)


@pytest.mark.parametrize("target", ["dense", "residual"])
def test_full_strength_brings_outputs_nearer_to_the_dense_model(target):
    """On the calibration tokens themselves, where a target must help if it is right."""
    dense = tiny_model("llama").eval()
    errors = {}
    for name, settings in {"pruned": {}, target: {"target.kind": target, "target.strength": 1.0}}.items():
        model = copy.deepcopy(dense)
        batches = tokens(64)
        secateur.prune(model, pattern="50%", solver="sparsegpt", calibration=batches, settings=settings)
        with torch.no_grad():
            pairs = [(model.model(ids)[0], dense.model(ids)[0]) for ids in batches]
        errors[name] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert errors[target] < errors["pruned"]


def test_strength_zero_is_the_pruned_target():
    models = []
    for settings in ({}, {"target.kind": "dense", "target.strength": 0.0}):
        model = tiny_model("llama")
        secateur.prune(model, pattern="50%", solver="mrp", calibration=tokens(), settings=settings)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_routed_experts_have_no_dense_target(monkeypatch):
    model = mixtral()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="sees the tokens that a router sends it"):
        secateur.prune(
            model, pattern="50%", solver="magnitude", settings={"target.kind": "dense"}, calibration=tokens(32)
        )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
