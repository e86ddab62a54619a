"""Weights that a run rounds to 8 bits: near the layer's optimum, on a grid that packing finds again bit for bit."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers import damp, loss, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, save_checkpoint, tiny_model, tokens
from safetensors import safe_open

import secateur
from secateur.errors import SecateurError
from secateur.numerics.int8 import best_scales, from_int8, nearest_int8, to_int8
from secateur.packed.encoding import decode, is_encoded
from secateur.packed.layout import pack_int8, unpack
from secateur.recipe.recipe import Recipe
from secateur.solvers import rounding
from secateur.solvers.rounding import round_to_int8

TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 60
REFIT = {"epochs": 2}


def case(seed, rows=6, columns=40, sparsity=0.5):
    """Pruned weights, their mask, and a damped Hessian of correlated inputs."""
    W, H = problem(rows=rows, columns=columns, seed=seed)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return W.float() * keep, keep, damp(H).float()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from((0.0, 0.5, 0.9)), st.sampled_from((torch.bfloat16, torch.float16)))
def test_the_layer_loses_less_than_by_the_nearest_values_and_zeros_stay(seed, sparsity, dtype):
    W, keep, H = case(seed, sparsity=sparsity)
    rounded = round_to_int8(W, keep, H, dtype)
    scales = best_scales(W.to(dtype))
    nearest = from_int8(to_int8(W, scales), scales, torch.float32)
    assert not rounded[~keep].any()
    assert not rounded.signbit()[rounded == 0].any()
    assert loss(rounded, W, H) <= loss(nearest, W, H) * (1 + 1e-5)


def test_no_single_weight_can_be_rounded_better(monkeypatch):
    monkeypatch.setattr(rounding, "ROUNDS", 100)
    W, keep, H = case(3)
    rounded = round_to_int8(W, keep, H, torch.float32)
    scales = best_scales(W)
    least = loss(rounded, W, H)
    for row, column in keep.nonzero().tolist():
        for step in (-1, 1):
            other = rounded.clone()
            other[row, column] += step * scales[row]
            pinned = rounded[row, column].abs() >= 126.5 * scales[row]
            assert pinned or loss(other, W, H) >= least * (1 - 1e-5)


def test_it_is_near_the_optimum_of_all_roundings():
    """Against every combination of the values below and above: far nearer than the nearest values."""
    gained, possible = 0.0, 0.0
    for seed in range(8):
        W, keep, H = case(seed, rows=1, columns=12, sparsity=0.2)
        scales = best_scales(W)
        below = (W / scales[:, None]).floor()
        free = keep[0].nonzero()[:, 0].tolist()
        ups = torch.zeros(2 ** len(free), 12)
        ups[:, free] = torch.tensor([*itertools.product((0.0, 1.0), repeat=len(free))])
        changes = ((below + ups).clamp(-127, 127) * scales[:, None] - W).double()
        best = float(((changes @ H.double()) * changes).sum(1).min())
        nearest, ours = loss(unpack(pack_int8(W)), W, H), loss(round_to_int8(W, keep, H, torch.float32), W, H)
        gained, possible = gained + nearest - ours, possible + nearest - best
    assert gained > 0.75 * possible > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_finds_the_same_numbers_again(dtype, transposed):
    for seed in range(20):
        W, keep, H = case(seed, sparsity=0.9 if seed % 2 else 0.5)
        saved = round_to_int8(W, keep, H, dtype).to(dtype)
        saved = saved.T.contiguous() if transposed else saved
        assert torch.equal(unpack(pack_int8(saved, transposed)), saved)


def packed_tensors(folder):
    """Every packed tensor of a folder, by its name."""
    found = {}
    for path in folder.glob("packed*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found |= {name: decode(each) for name, each in tensors.items() if is_encoded(each)}
    return found


@pytest.mark.parametrize("refit", ["none", REFIT])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_run_holds_the_numbers_of_the_dense_run(tmp_path, family, refit):
    save_checkpoint(tmp_path / "model", family, torch.bfloat16)
    options = {"calibration": tokens(8, 32), "recipe": "fast"}
    for form in ("dense", "packed"):
        chosen = {"values": "int8", "format": form, "refit": refit}
        report = secateur.prune(tmp_path / "model", tmp_path / form, settings=chosen, **options)
    dense = secateur.load(tmp_path / "dense").state_dict()
    packed = packed_tensors(tmp_path / "packed")
    assert {matrix.name + ".weight" for matrix in report.matrices} == packed.keys()
    for name, each in packed.items():
        assert each.values.dtype == torch.int8
        assert torch.equal(unpack(each), dense[name]), name
    assert not secateur.inspect(tmp_path / "packed").problems
    assert re.search("int8 values", (tmp_path / "packed" / "README.md").read_text())


def test_experts_are_rounded_along_their_inputs(tmp_path):
    from test_packed_models import any_model

    model = any_model("mixtral")
    report = secateur.prune(model, calibration=tokens(8, 32), recipe="fast", settings={"values": "int8"})
    assert any("[" in matrix.name for matrix in report.matrices)
    for matrix in report.matrices:
        path, _, index = matrix.name.partition("[")
        parameters = dict(model.named_parameters())
        parameter = parameters[path if path in parameters else f"{path}.weight"].data
        stored = parameter[int(index[:-1])] if index else parameter
        assert torch.equal(unpack(pack_int8(stored, transposed=matrix.input_dim == 0)), stored), matrix.name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_loses_less_than_by_rounding_afterwards(family):
    """By the loss of the first block's first matrix, whose inputs are those of the dense model in both runs."""
    options = {"calibration": tokens(32, 32), "solver": "mrp"}
    whole, rounded = tiny_model(family, torch.bfloat16), tiny_model(family, torch.bfloat16)
    as_is = secateur.prune(whole, **options).matrices[0]
    int8 = secateur.prune(rounded, settings={"values": "int8"}, **options).matrices[0]
    assert as_is.zeros == int8.zeros
    assert as_is.relative_error < int8.relative_error < 1.02 * as_is.relative_error


def test_every_candidate_of_a_refit_is_rounded():
    model = tiny_model("llama", torch.bfloat16)
    chosen = {"values": "int8", "refit": {"epochs": 4, "rate": 0.05}}
    report = secateur.prune(model, calibration=tokens(96), solver="mrp", settings=chosen)
    assert any(block.best_epoch > 0 for block in report.blocks)
    for matrix in report.matrices:
        stored = model.get_parameter(f"{matrix.name}.weight").data
        assert torch.equal(nearest_int8(stored), stored), matrix.name


def test_other_values_are_refused():
    with pytest.raises(SecateurError, match="values is 'int4': it must be 'same' or 'int8'"):
        Recipe().changed({"values": "int4"})
