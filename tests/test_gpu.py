"""On a GPU. Without one these tests are skipped; CONTRIBUTING.md has the command that runs them on a simulated GPU."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
from models import character_tokenizer, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import tiny

import secateur
from secateur import run
from secateur.resume.block_store import JournalledBlocks

sys.path.append(str(Path(__file__).parent / "simulated_gpu"))
import simulated_gpu

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
simulated = pytest.mark.skipif(simulated_gpu.loaded() is None, reason="a real GPU's memory is not ours to limit")
BATCHES = tokens(8)
SOLVERS = ("magnitude", "wanda", "sparsegpt", "mrp", "admm")


@pytest.fixture
def left_on_gpu():
    """How many bytes were allocated since the test began and are not free again."""
    gc.collect()  # models of other tests
    before = torch.cuda.memory_allocated()

    def left() -> int:
        gc.collect()
        return torch.cuda.memory_allocated() - before

    return left


def check_alike(ours, theirs, report, other):
    """The same masks, except for ties, and the same errors: kernels round differently, and sums differ by it."""
    assert ours.keys() == theirs.keys()
    apart = sum(int(((ours[name] == 0) != (theirs[name].cpu() == 0)).sum()) for name in ours)
    assert apart <= sum(tensor.numel() for tensor in ours.values()) / 1000
    assert report.mean_relative_error == pytest.approx(other.mean_relative_error, rel=1e-3)
    assert report.sparsity == other.sparsity


@on_gpu
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"solver": solver} for solver in SOLVERS),
        {"solver": "mrp", "settings": {"refine": {}}},
        *({"recipe": recipe} for recipe in ("fast", "balanced", "best")),
        *({"solver": "mrp", "settings": {"target.kind": kind}} for kind in ("dense", "residual")),
        {"solver": "mrp", "settings": {"true_sequential": True}},
        {"recipe": "balanced", "settings": {"values": "int8"}},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_model_on_a_gpu_is_pruned_as_on_a_cpu(settings, pattern):
    """Texts may lie elsewhere than the model."""
    on_cpu = tiny_model("llama").eval()
    there = copy.deepcopy(on_cpu).cuda()
    report = secateur.prune(on_cpu, pattern=pattern, calibration=BATCHES, **settings)
    other = secateur.prune(there, pattern=pattern, calibration=BATCHES, **settings)
    assert {parameter.device.type for parameter in there.parameters()} == {"cuda"}
    assert other.environment["device"] == "cuda:0"
    check_alike(on_cpu.state_dict(), there.state_dict(), report, other)


@on_gpu
@pytest.mark.parametrize(("kind", "recipe"), [("llama", "best"), ("mixtral", "balanced"), ("mamba", "fast")])
def test_a_model_on_disk_is_pruned_on_a_gpu_as_on_a_cpu(kind, recipe, tmp_path, left_on_gpu):
    tiny(kind).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"pattern": "50%", "recipe": recipe, "calibration": BATCHES}
    other = secateur.prune(tmp_path / "model", tmp_path / "gpu", **settings)  # where there is one, it is the default
    assert other.environment["device"] == "cuda"
    assert left_on_gpu() <= 0
    # bf16 is what a GPU computes in; a CPU may compute in fp32, which holds it.
    precise = {"rel": 1e-3 if simulated_gpu.loaded() and other.environment["forward_dtype"] == "float32" else 0.05}
    report = secateur.prune(tmp_path / "model", tmp_path / "cpu", device="cpu", **settings)
    assert report.mean_relative_error == pytest.approx(other.mean_relative_error, **precise)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert ours.keys() == theirs.keys()
    assert secateur.inspect(tmp_path / "gpu").to_dict()["ok"]
    if kind == "mixtral" and simulated_gpu.loaded():
        return  # the kernels that transformers takes for its experts have no counterpart on a CPU
    text = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 40
    (tmp_path / "text.txt").write_text(text)
    found = [
        secateur.evaluate(tmp_path / "gpu", text=tmp_path / "text.txt", device=device)["perplexity"]
        for device in ("cuda", "cpu")
    ]
    assert found[0] == pytest.approx(found[1], rel=0.02)


@on_gpu
def test_a_gpu_holds_one_block_and_what_it_has_room_for(tmp_path, monkeypatch, left_on_gpu):
    """However many layers the model has; and in the dense pass more of them, where there is room."""
    peaks = {}
    for room in (0, 10**9):
        monkeypatch.setattr(run, "_room", lambda _device, room=room: room)
        for layers in (4, 16):
            folder = tmp_path / f"{layers} layers"
            save_checkpoint(folder, dtype=torch.float32, num_hidden_layers=layers, intermediate_size=256)
            torch.cuda.reset_peak_memory_stats()
            secateur.prune(folder, tmp_path / "out", recipe="fast", calibration=BATCHES, overwrite=True)
            peaks[room, layers] = torch.cuda.max_memory_allocated()
            assert left_on_gpu() <= 0
    assert peaks[0, 16] < 1.05 * peaks[0, 4]
    assert peaks[10**9, 16] > peaks[0, 16]


@on_gpu
def test_a_run_on_a_gpu_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model", num_hidden_layers=3)
    settings = {"pattern": "50%", "calibration": BATCHES, "resume": True}
    secateur.prune(tmp_path / "model", tmp_path / "whole", **settings)
    commit, done = JournalledBlocks.commit, []

    def stopped(self, block, figures):
        commit(self, block, figures)
        done.append(block.name)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(JournalledBlocks, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    assert len(done) == 2
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


@on_gpu
@simulated
def test_a_gpu_with_too_little_memory_is_used_in_smaller_chunks_until_none_is_small_enough(tmp_path, left_on_gpu):
    """The real error of the allocator, at limits below what a run without any takes."""
    high = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 4096}  # so that rows are what takes memory
    save_checkpoint(tmp_path / "model", dtype=torch.float32, **high)
    settings = {
        "pattern": "50%",
        "recipe": "fast",
        "exclude": ["*.down_proj"],
        "calibration": BATCHES,
        "overwrite": True,
    }
    library = simulated_gpu.loaded()
    torch.cuda.reset_peak_memory_stats()
    report = secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    most = torch.cuda.max_memory_allocated()
    try:
        for share in (0.95, 0.9):
            library.simulated_limit(int(share * most))
            other = secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
            assert other.mean_relative_error == pytest.approx(report.mean_relative_error, rel=1e-4)
            library.simulated_limit(int(0.5 * most))
        with pytest.raises(ValueError, match="does not fit into the memory of cuda:0"):
            secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    finally:
        library.simulated_limit(2**62)
    assert left_on_gpu() <= 0


@on_gpu
def test_one_matrix_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(64, 96, generator=generator), torch.randn(400, 96, generator=generator)
    H = X.T @ X
    for solver in SOLVERS:
        ours, theirs = (
            secateur.solve(W, H, "50%", solver),
            secateur.solve(W.cuda(), H.cuda(), "50%", solver),
        )
        assert theirs.weight.device.type == theirs.keep.device.type == "cuda"
        assert (ours.keep != theirs.keep.cpu()).sum() <= 2
        if torch.equal(ours.keep, theirs.keep.cpu()):
            torch.testing.assert_close(theirs.weight.cpu(), ours.weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"W is on cuda:0 and H on cpu"):
        secateur.solve(W.cuda(), H, "50%")


@on_gpu
def test_a_packed_model_on_the_gpu_is_dense_there_and_saved_packed(tmp_path):
    save_checkpoint(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "pruned", pattern="50%", solver="magnitude", calibration=BATCHES)
    secateur.pack(tmp_path / "pruned", tmp_path / "packed")
    model = secateur.load(tmp_path / "packed", device="cuda")
    model.save_pretrained(tmp_path / "packed")
    secateur.unpack(tmp_path / "packed", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@on_gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}, {"model": "cpu", "lm_head": "cuda"}])
def test_a_device_map_with_the_gpu_loads_a_packed_model_dense(tmp_path, monkeypatch, device_map, capsys):
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)  # asks CUDA itself
    save_checkpoint(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "pruned", pattern="50%", solver="magnitude", calibration=BATCHES)
    secateur.pack(tmp_path / "pruned", tmp_path / "packed")
    load = AutoModelForCausalLM.from_pretrained
    ids = torch.arange(8)[None].cuda()
    with torch.no_grad():
        expected = load(tmp_path / "pruned", device_map=device_map)(ids).logits
        found = load(tmp_path / "packed", device_map=device_map)(ids).logits
    assert "device map" in capsys.readouterr().err
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_gpu
def test_two_four_matrices_become_tensors_of_torch(monkeypatch):
    if simulated_gpu.loaded():  # cuSPARSELt has no counterpart on a CPU, and neither backend's product has
        monkeypatch.setattr("torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS", True)
    model = tiny_model("llama", torch.bfloat16, hidden_size=64, intermediate_size=128).cuda().eval()
    settings = {"solver": "magnitude", "calibration": BATCHES, "exclude": ["*.o_proj"]}
    pruned = secateur.prune(model, pattern="2:4", **settings).matrices
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = BATCHES[0].cuda()
    logits = model(text).logits
    names = secateur.to_semi_structured(model)
    assert set(names) == {matrix.name for matrix in pruned}
    assert secateur.to_semi_structured(model) == names, "a cell of a notebook that runs again"
    for matrix in pruned:
        weight = model.get_submodule(matrix.name).weight
        assert type(weight).__name__.startswith("SparseSemiStructuredTensor")
        if simulated_gpu.loaded() or type(weight).__name__.endswith("CUTLASS"):
            assert torch.equal(weight.to_dense(), dense[f"{matrix.name}.weight"])
    if not simulated_gpu.loaded():
        torch.testing.assert_close(model(text).logits, logits, rtol=0.05, atol=0.05)
