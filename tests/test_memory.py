"""Caps on memory: hidden states in files, Hessians in passes, smaller chunks where a GPU's memory is too small."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import problem
from models import save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file

import secateur
from secateur.calibration import hidden_states
from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.stream import Stream
from secateur.numerics import least_squares
from secateur.numerics.least_squares import refit_by_gradients
from secateur.recipe.solvers import Magnitude
from secateur.resume.block_store import JournalledBlocks
from secateur.runtime import memory
from secateur.runtime.chunking import DEFAULT, MIN_CHUNK_BYTES, chunk_bytes, max_chunk_bytes
from secateur.runtime.memory import MemoryBudget, Workspace, memory_budget
from secateur.solvers import Solved
from secateur.solvers.magnitude import solve_magnitude

SETTINGS = {"pattern": "50%", "recipe": "balanced", "calibration": tokens(8)}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("limit", "expected"), [("123456", 123456), ("max", None), (str(1 << 62), None)])
def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch, limit, expected):
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "CONTAINERS", ((tmp_path / "none", *names), (tmp_path, *names)))
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("100000\n")
    (tmp_path / "memory.stat").write_text("anon 60000\ninactive_file 40000\n")
    assert memory.total_memory("cpu") == (expected or psutil.virtual_memory().total)
    assert memory.available_bytes() == 63456 if expected else memory.available_bytes() > 1e6


@pytest.fixture
def in_files(monkeypatch):
    """How many hidden states went to files, by folder."""
    seen = {}
    original = hidden_states._in_file

    def counted(tensor, folder):
        seen[folder] = seen.get(folder, 0) + 1
        return original(tensor, folder)

    monkeypatch.setattr(hidden_states, "_in_file", counted)
    return seen


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_files_give_the_same_bits_and_leave_nothing(tmp_path, in_files, dtype):
    inside, outside = tiny_model("llama", dtype), tiny_model("llama", dtype)
    secateur.prune(inside, **SETTINGS)
    assert not in_files
    secateur.prune(outside, **SETTINGS, offload_dir=tmp_path)
    # four batches: in front of the first block, and what each of two blocks gives of both streams, where it is used
    assert in_files[tmp_path] >= 4 * 4
    assert all(torch.equal(value, weights_of(outside)[name]) for name, value in weights_of(inside).items())
    assert not list(tmp_path.iterdir())


def test_a_cap_sends_hidden_states_to_the_folder_of_the_run_and_gathers_in_passes(tmp_path, in_files, monkeypatch):
    save_checkpoint(tmp_path / "model", hidden_size=64)
    passes = []
    observe = Stream.observe
    monkeypatch.setattr(
        Stream,
        "observe",
        lambda self, block, groups, *outputs: passes.append(len(groups)) or observe(self, block, groups, *outputs),
    )
    free = secateur.prune(tmp_path / "model", tmp_path / "free", **SETTINGS | {"recipe": "fast"})
    assert passes == [4, 4]
    passes.clear()
    capped = secateur.prune(tmp_path / "model", tmp_path / "out", **SETTINGS | {"recipe": "fast"}, max_memory="40KB")
    assert passes == [1] * 8  # 64 x 64 fp32 are 16 KB, and half of the cap is 20
    assert set(in_files) == {tmp_path / ".out.secateur"}
    passes.clear()
    secateur.prune(tmp_path / "model", tmp_path / "balanced", **SETTINGS, max_memory="40KB")
    assert passes == [1] * 16  # the allocation too
    assert not (tmp_path / ".out.secateur").exists()
    ours, theirs = ([each.relative_error for each in report.matrices] for report in (capped, free))
    assert ours == pytest.approx(theirs, rel=1e-2)  # conjugate gradients stop for other rows together
    assert capped.recipe.max_memory == "40KB"


@pytest.mark.parametrize("solver", ["sparsegpt", "wanda"])
def test_a_cap_changes_no_bit_of_what_a_solver_sees(tmp_path, solver):
    """Groups that are observed later see the block as dense as the first ones do."""
    save_checkpoint(tmp_path / "model", hidden_size=64)
    options = SETTINGS | {"recipe": None, "solver": solver}
    for cap in (None, "60KB"):
        secateur.prune(tmp_path / "model", tmp_path / str(cap), max_memory=cap, **options)
    ours, theirs = (load_file(tmp_path / str(cap) / "model.safetensors") for cap in (None, "60KB"))
    assert all(torch.equal(each, theirs[name]) for name, each in ours.items())


def test_a_cap_without_a_folder_says_what_does_not_fit():
    model = tiny_model("llama")
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"hidden states .* more than a quarter of max_memory .*offload_dir"):
        secateur.prune(model, **SETTINGS, max_memory="10KB")
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_sizes_and_folders_are_checked(tmp_path):
    assert memory_budget("8GB", None).limit == 8 * 10**9
    assert memory_budget("500MiB", tmp_path) == MemoryBudget(500 << 20, tmp_path)
    assert memory_budget(None, None) == MemoryBudget()
    for wrong in ("much", "0GB", "-1GB", "8 apples", "8IB"):
        with pytest.raises(ValueError, match="max_memory is"):
            memory_budget(wrong, None)
    with pytest.raises(ValueError, match="not a folder that can be written"):
        memory_budget(None, tmp_path / "absent")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(ValueError, match="hidden states could not be written .*No space left"):
        HiddenStates.of([torch.ones(2, 3)], MemoryBudget(folder=tmp_path), 1)


def test_smaller_chunks_give_the_same_solution(monkeypatch):
    W, H = problem(rows=1000, columns=48, dtype=torch.float32)
    rows_at_once = MIN_CHUNK_BYTES // 4 // 49  # elements a row's preconditioner takes: 7 x 7
    assert rows_at_once < len(W) < DEFAULT["cpu"] // 4 // 49
    rows = []

    def refit(weights, *others, **options):
        rows.append(len(weights))
        return refit_by_gradients(weights, *others, **options)

    monkeypatch.setattr(least_squares, "refit_by_gradients", refit)
    whole = secateur.solve(W, H, "50%", {"name": "mrp", "tolerance": 1e-6})
    assert rows == [len(W)]
    with max_chunk_bytes(MIN_CHUNK_BYTES):
        assert chunk_bytes(CPU) == MIN_CHUNK_BYTES < DEFAULT["cpu"]
        chunked = secateur.solve(W, H, "50%", {"name": "mrp", "tolerance": 1e-6})
    assert sum(rows[1:]) == len(W)
    assert max(rows[1:]) == rows_at_once
    assert torch.equal(whole.keep, chunked.keep)
    assert float((whole.weight - chunked.weight).norm() / whole.weight.norm()) < 1e-3


def provide(monkeypatch, solver):
    """Let a plug-in provide the solver `greedy`."""
    point = SimpleNamespace(name="greedy", load=lambda: solver)
    monkeypatch.setattr("secateur.recipe.solvers.entry_points", lambda group: [point])


@dataclass(frozen=True)
class Greedy:
    """A solver that takes as much memory as it may; a stand-in for a small GPU, since CPUs raise no such error."""

    needs_at_most: int = 1 << 20
    name = "greedy"

    def __call__(self, W, hessian, pattern) -> Solved:
        if chunk_bytes(W.device) > self.needs_at_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve_magnitude(Magnitude(), W, hessian, pattern)


def test_too_little_memory_halves_the_chunk_which_is_journalled_and_used_again(tmp_path, monkeypatch):
    provide(monkeypatch, Greedy)
    save_checkpoint(tmp_path / "model", num_hidden_layers=3)
    settings = {"pattern": "50%", "solver": "greedy", "calibration": tokens(8)}
    stop = JournalledBlocks.commit
    limits = []
    halve = Workspace.halve

    def halved(self, what, device):
        halve(self, what, device)
        limits.append(self.limit)

    def stopped(self, block, figures):
        stop(self, block, figures)
        if len(self.manifest.state.blocks) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "halve", halved)
    with monkeypatch.context() as patched:
        patched.setattr(JournalledBlocks, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    assert limits == [8 << 20, 4 << 20, 2 << 20, 1 << 20]  # from 16 MB on, once for all matrices
    limits.clear()
    secateur.prune(tmp_path / "model", tmp_path / "out", **settings, resume=True)
    assert limits == []
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.mlp.up_proj.weight"] == 0
    ).float().mean() == 0.5
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["solver"]["name"] == "greedy"


def test_memory_too_small_for_any_chunk_is_named(monkeypatch):
    provide(monkeypatch, Greedy)
    with pytest.raises(ValueError, match=r"model\.layers\.0\S*: the solver.s work does not fit into the memory of cpu"):
        secateur.prune(
            tiny_model("llama"), pattern="50%", solver={"name": "greedy", "needs_at_most": 1}, calibration=tokens(8)
        )
