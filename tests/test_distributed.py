"""Several processes on one run: what they end with is what one process ends with, and none waits for a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from commands import command
from models import TEXT, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file

import secateur
from secateur.checkpoints.inspection import inspect_folder
from secateur.runtime import distributed

TESTS = Path(__file__).parent
MODULE = ("-m", "secateur")
FLAGS = ("--recipe", "balanced", "--samples", "8", "--seq-len", "32")


def torchrun(processes: int, *arguments: object) -> list[str]:
    """The command for a number of processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    port = ["--master-port", 0, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [str(part) for part in [*launcher, *port, *arguments]]


def accelerate_launch(processes: int, *arguments: object) -> list[str]:
    """The same by accelerate's launcher, which starts several on one machine with --multi_gpu alone, GPUs or not."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    settings = ["--main_process_port", 0, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [str(part) for part in [*launcher, *settings, *arguments]]


def in_processes(processes: int, *arguments: object, launcher=torchrun) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        launcher(processes, *arguments), env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def alone():
    """Each run's pruned model and report, by this process alone."""
    return {name: ranks.run(name) for name in ranks.RUNS}


def test_several_processes_give_the_same_model(alone, tmp_path):
    """Sums are in fp64, so that their order hardly ever reaches fp32: layer errors to 1e-6, and nearly all weights."""
    processes = 3  # which share ten batches unevenly
    done = in_processes(processes, TESTS / "ranks.py", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (model, report) in alone.items():
        theirs = json.loads((tmp_path / f"{name}.json").read_text())
        assert theirs["environment"]["processes"] == processes
        for ours, other in zip(report.to_dict()["matrices"], theirs["matrices"], strict=True):
            assert other["name"] == ours["name"]
            assert other["tokens"] == ours["tokens"]
            assert other["zeros"] == ours["zeros"]
            assert other["relative_error"] == pytest.approx(ours["relative_error"], rel=1e-6), (name, ours["name"])
        weights = load_file(tmp_path / f"{name}.safetensors")
        for key, value in model.state_dict().items():
            close = torch.isclose(weights[key], value, rtol=1e-3, atol=1e-4).double().mean()
            assert close > 0.999, (name, key, float(close))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_checkpoint(folder / "model", num_hidden_layers=3)
    (folder / "text.txt").write_text(TEXT)
    return folder


def prune(source, out, *more):
    return ["prune", source / "model", out, "--calibration", source / "text.txt", *FLAGS, *more]


def test_the_command_by_two_processes_speaks_once_and_knows_when_it_is_done(source, tmp_path):
    """Started by accelerate, and again by torchrun."""
    out = tmp_path / "out"
    done = in_processes(2, *MODULE, *prune(source, out, "--json"), launcher=accelerate_launch)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one JSON, from rank 0
    assert report["environment"]["processes"] == 2
    assert not inspect_folder(out).problems
    assert not (out.parent / ".out.secateur").exists()
    again = in_processes(2, *MODULE, *prune(source, out, "--json", "--resume"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["summary"] == report["summary"]


def test_too_few_batches_for_the_processes_are_named(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [mine, mine])
    with pytest.raises(ValueError, match="1 calibration batches can't be sharded over 2 processes"):
        secateur.prune(tiny_model("llama"), calibration=tokens(1), solver="mrp")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="which process is which is read from /proc")
def test_a_dead_process_ends_the_run_and_another_number_of_them_goes_on(source, tmp_path):
    out = tmp_path / "out"
    arguments = torchrun(2, *MODULE, *prune(source, out, "--set", "refit.epochs=30"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        manifest = out.parent / ".out.secateur" / "manifest.json"
        wait_for(lambda: manifest.exists() and json.loads(manifest.read_text())["blocks"])
        os.kill(second_process(run.pid), signal.SIGKILL)
        died = time.monotonic()
        errors = run.communicate(timeout=60)[1]  # within a minute, as is promised
    assert run.returncode != 0
    assert time.monotonic() - died < 60
    assert "SIGKILL" in errors or "Signal 9" in errors
    finished = json.loads(manifest.read_text())["blocks"]
    assert finished
    again = command(*prune(source, out, "--set", "refit.epochs=30", "--resume", "--json"))
    assert again.returncode == 0, again.stderr
    assert "2 processes began this run and 1 resumed it" in again.stderr.replace("\n", " ")
    assert not inspect_folder(out).problems


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def second_process(launcher: int) -> int:
    """The child of the launcher that is rank 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank 1 among {children}")


def test_work_is_shared_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    costs = [3.0, 1.0, 1.0, 3.0, 8.0, 8.0, 8.0]
    owners = distributed.assign_owners(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) == 8.0
    sharded = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sharded += distributed.shard(10)
    assert sorted(sharded) == list(range(10))


@pytest.mark.parametrize("other", [{"seed": 1}, {"settings": {"solver.block": 64}}])
def test_processes_with_other_settings_are_refused(other, monkeypatch):
    """They would wait for each other's gradients, or put together matrices of two methods."""
    given = []
    monkeypatch.setattr(distributed, "all_gather", lambda mine: given.append(mine) or [mine])
    secateur.prune(tiny_model("llama"), calibration=tokens(), solver="mrp")
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [given[0], mine])
    with pytest.raises(ValueError, match="different models, calibration batches or recipes"):
        secateur.prune(tiny_model("llama"), calibration=tokens(), solver="mrp", **other)


def test_a_process_alone_is_the_first_of_one():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    tensor = torch.ones(2)
    distributed.all_reduce(tensor)
    distributed.broadcast(tensor, 0)
    assert torch.equal(tensor, torch.ones(2))
    assert distributed.all_gather("x") == ["x"]
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}


def test_a_broken_world_size_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(secateur.SecateurError, match="environment variable WORLD_SIZE is 'abc'"):
        secateur.prune(tiny_model("llama"), calibration=tokens(), solver="magnitude")


def test_processes_that_can_not_be_joined_are_named(monkeypatch):
    """A scheduler may set WORLD_SIZE alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(secateur.SecateurError, match="could not be joined .*unset WORLD_SIZE"):
        secateur.prune(tiny_model("llama"), calibration=tokens(), solver="magnitude")


def test_a_dry_run_is_for_one_process(source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 were started: leave torchrun out"):
        secateur.dry_run(source / "model", calibration=source / "text.txt")
