"""Weights that a run rounds to 8 bits: near the layer's optimum, on a grid that packing finds again bit for bit."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers import damp, loss, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mixtral, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file

import secateur
from secateur.errors import SecateurError
from secateur.numerics import rounding
from secateur.numerics.int8 import nearest_int8, scales_of
from secateur.numerics.rounding import round_to_int8
from secateur.packed import kernels
from secateur.packed.encoding import decode, is_encoded
from secateur.packed.layout import pack_int8, unpack
from secateur.pruning.block_refit import MaskedMasterWeights
from secateur.recipe.recipe import Recipe
from secateur.runtime.chunking import max_chunk_bytes

REFIT = {"epochs": 2}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def case(seed, rows=6, columns=40, sparsity=0.5):
    """Pruned weights, their mask, and a damped Hessian of correlated inputs."""
    W, H = problem(rows=rows, columns=columns, seed=seed)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return W.float() * keep, keep, damp(H).float()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from((0.0, 0.5, 0.9)), st.sampled_from(DTYPES))
def test_the_output_changes_less_than_by_the_nearest_values_and_zeros_stay(seed, sparsity, dtype):
    W, keep, H = case(seed, sparsity=sparsity)
    saved = round_to_int8(W, keep, H, dtype)
    assert saved.dtype == dtype
    assert not saved[~keep].any()
    assert not saved.signbit()[saved == 0].any()
    rounded, nearest = round_to_int8(W, keep, H, torch.float32), unpack(pack_int8(W))
    assert loss(rounded, W, H) <= loss(nearest, W, H) * (1 + 1e-5)


def test_no_single_weight_can_be_rounded_better(monkeypatch):
    monkeypatch.setattr(rounding, "ROUNDS", 100)
    W, keep, H = case(3)
    rounded = round_to_int8(W, keep, H, torch.float32)
    scales = scales_of(W)
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
        scales = scales_of(W)
        below = (W / scales[:, None]).floor()
        free = keep[0].nonzero()[:, 0].tolist()
        ups = torch.zeros(2 ** len(free), 12)
        ups[:, free] = torch.tensor([*itertools.product((0.0, 1.0), repeat=len(free))])
        changes = ((below + ups).clamp(-127, 127) * scales[:, None] - W).double()
        best = float(((changes @ H.double()) * changes).sum(1).min())
        nearest, ours = loss(unpack(pack_int8(W)), W, H), loss(round_to_int8(W, keep, H, torch.float32), W, H)
        gained, possible = gained + nearest - ours, possible + nearest - best
    assert gained > 0.75 * possible > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 1e30])
def test_packing_finds_the_same_numbers_again(dtype, transposed, size):
    for seed in range(20):
        W, keep, H = case(seed, sparsity=0.9 if seed % 2 else 0.5)
        W[seed % 6] *= keep[seed % 6].cumsum(0) == 1  # a row with one weight
        saved = round_to_int8(size * W if dtype != torch.float16 or size <= 1 else W, keep, H, dtype)
        saved = saved.T.contiguous() if transposed else saved
        assert same_bits(unpack(pack_int8(saved, transposed)), saved)


def test_tiles_and_chunks_of_rows_change_no_rounding(monkeypatch):
    W, keep, H = case(3)
    whole = round_to_int8(W, keep, H, torch.float32)
    monkeypatch.setattr(rounding, "TILE", 7)
    with max_chunk_bytes(rounding.COPIES * 4 * 40 * 4):  # four rows
        assert torch.equal(round_to_int8(W, keep, H, torch.float32), whole)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


def packed_tensors(folder):
    """Every packed tensor of a folder, by its name."""
    found = {}
    for path in folder.glob("packed*.safetensors"):
        found |= {name: decode(each) for name, each in load_file(path).items() if is_encoded(each)}
    return found


@pytest.mark.parametrize("refit", ["none", REFIT])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("llama", torch.float16), ("llama", torch.float32)],
)
def test_a_packed_run_holds_the_numbers_of_the_dense_run(tmp_path, family, dtype, refit):
    save_checkpoint(tmp_path / "model", family, dtype)
    options = {"calibration": tokens(8, 32), "recipe": "fast"}
    for form in ("dense", "packed"):
        chosen = {"values": "int8", "format": form, "refit": refit}
        report = secateur.prune(tmp_path / "model", tmp_path / form, settings=chosen, **options)
    dense = secateur.load(tmp_path / "dense").state_dict()
    packed = packed_tensors(tmp_path / "packed")
    assert {matrix.name + ".weight" for matrix in report.matrices} == packed.keys()
    for name, each in packed.items():
        assert each.values.dtype == torch.int8
        assert same_bits(unpack(each), dense[name]), name
    if kernels.level() != "none" and (family, dtype) == ("llama", torch.bfloat16):
        with torch.no_grad():
            exact = secateur.load(tmp_path / "dense").float()(tokens()[0]).logits
            errors = {
                form: float((secateur.load(tmp_path / form)(tokens()[0]).logits - exact).norm() / exact.norm())
                for form in ("dense", "packed")
            }
        assert errors["packed"] < 1.5 * errors["dense"] < 0.03  # rounding in bfloat16 is all that differs
    assert not secateur.inspect(tmp_path / "packed").problems
    assert re.search("int8 values", (tmp_path / "packed" / "README.md").read_text())


def test_experts_are_rounded_along_their_inputs(tmp_path):
    model = mixtral().to(torch.bfloat16)
    report = secateur.prune(model, calibration=tokens(8, 32), recipe="fast", settings={"values": "int8"})
    assert any("[" in matrix.name for matrix in report.matrices)
    for matrix in report.matrices:
        path, _, index = matrix.name.partition("[")
        parameters = dict(model.named_parameters())
        parameter = parameters[path if path in parameters else f"{path}.weight"].data
        stored = parameter[int(index[:-1])] if index else parameter
        assert torch.equal(unpack(pack_int8(stored, transposed=matrix.input_dim == 0)), stored), matrix.name


def rounding_error(monkeypatch, function=None):
    """What rounding adds to the error of a model's first matrix, whose inputs no earlier rounding changes."""
    errors = []
    for values in ("same", "int8"):
        if values == "int8" and function is not None:
            monkeypatch.setattr("secateur.pruning.matrix_step.round_to_int8", function)
        model = tiny_model("llama", torch.bfloat16)
        settings = {"calibration": tokens(96), "solver": "mrp", "settings": {"values": values}}
        errors.append(secateur.prune(model, **settings).matrices[0].relative_error)
    return errors[1] - errors[0]


def test_a_run_rounds_by_the_hessian_of_the_matrix(monkeypatch):
    ours = rounding_error(monkeypatch)
    nearest = rounding_error(monkeypatch, lambda W, _keep, _H, dtype: unpack(pack_int8(W.to(dtype))))
    assert 0 < ours < 0.8 * nearest


def test_every_candidate_of_a_refit_is_rounded_to_what_is_saved(tmp_path, monkeypatch):
    """Also where products run in another dtype than the weights are saved in."""
    seen = []
    write_back = MaskedMasterWeights.write_back

    def watched(self):
        write_back(self)
        seen.extend(view.clone() for view, _ in self.int8_matrices)

    monkeypatch.setattr(MaskedMasterWeights, "write_back", watched)
    save_checkpoint(tmp_path / "model", "llama", torch.float16)
    chosen = {"values": "int8", "refit": {"epochs": 2, "rate": 0.05}}
    secateur.prune(tmp_path / "model", tmp_path / "out", calibration=tokens(32), solver="mrp", settings=chosen)
    assert len(seen) >= 14
    for weights in seen:
        assert torch.equal(weights.half().to(weights.dtype), weights)
        assert torch.equal(nearest_int8(weights.half()), weights.half())


def test_what_a_run_did_not_prune_is_packed_bit_for_bit(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    sparse = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        sparse[:, ::2] = 0
    model.save_pretrained(tmp_path / "model")
    chosen = {"values": "int8", "format": "packed", "rules": [{"match": "*.0.*.v_proj", "dense": True}]}
    secateur.prune(tmp_path / "model", tmp_path / "out", calibration=tokens(8), solver="magnitude", settings=chosen)
    packed = packed_tensors(tmp_path / "out")["model.layers.0.self_attn.v_proj.weight"]
    assert packed.scales is None
    assert same_bits(unpack(packed), sparse.data)


def test_a_matrix_whose_hessian_has_no_factor_is_named(monkeypatch):
    monkeypatch.setattr("secateur.numerics.damping.inverse_factor", lambda _H: None)
    with pytest.raises(SecateurError, match=r"model.layers.0.*_proj: the Hessian .* is not positive definite"):
        secateur.prune(tiny_model("llama"), calibration=tokens(8), solver="magnitude", settings={"values": "int8"})


def test_other_values_are_refused():
    with pytest.raises(SecateurError, match="values is 'int4': it must be 'same' or 'int8'"):
        Recipe().changed({"values": "int4"})
