"""Runs that survive: whatever stops one, and wherever, `resume` ends with the bits of a run that was never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from models import character_tokenizer, save_checkpoint
from safetensors.torch import load_file, save_file
from zoo import tiny

import secateur
from secateur import run
from secateur.pruning import loop
from secateur.resume import block_store, folder, manifest, publish

TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 60
SHARD = "20KB"  # a layer is 19 KB, and so is what is in none
SETTINGS = {"pattern": "50%", "recipe": "balanced", "samples": 4, "seq_len": 32}
WAITS_A_BLOCK = 3  # its file, the manifest, and the folder of the manifest
FLAGS = ("--pattern", "50%", "--recipe", "balanced", "--samples", "4", "--seq-len", "32", "--resume")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model of three blocks, a text, and the model pruned without interruption."""
    folder = tmp_path_factory.mktemp("source")
    save_checkpoint(folder / "model", num_hidden_layers=3)
    (folder / "text.txt").write_text(TEXT)
    prune(folder, folder / "reference", resume=False)
    return folder


@pytest.fixture(scope="module")
def sharded(source):
    """The same model pruned without interruption to a shard for what is in no layer, and one a layer."""
    prune(source, source / "sharded", resume=False, max_shard_size=SHARD)
    return source / "sharded"


def prune(source, out, **changed):
    """The run of this file, in this process."""
    arguments = {"calibration": source / "text.txt", "resume": True} | SETTINGS | changed
    return secateur.prune(source / "model", out, **arguments)


def check_as_if_never_stopped(source, out, name="reference"):
    reference = source / name
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in reference.iterdir())
    for path in reference.glob("*.safetensors*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (json.loads((folder / "secateur.json").read_text()) for folder in (out, reference))
    for report in (ours, theirs):
        for part in (*report["matrices"], *report["blocks"], report["summary"]):
            del part["seconds"]
        del report["summary"]["out"]
    assert ours == theirs
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def stop_at(monkeypatch, step, error):
    """Raise `error` the `step`-th time that the run waits for the disk; returns the counter."""
    count = [0]
    fsync = os.fsync

    def counted(handle):
        count[0] += 1
        if count[0] == step:
            raise error
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    return count


def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(source, tmp_path, monkeypatch):
    out, step, stopped = tmp_path / "out", 1, 0
    while True:
        with monkeypatch.context() as patched:
            count = stop_at(patched, step, KeyboardInterrupt())
            try:
                prune(source, out)
            except KeyboardInterrupt:
                stopped += 1
        if count[0] < step:
            break
        prune(source, out)
        check_as_if_never_stopped(source, out)
        shutil.rmtree(out)
        step += 1
    assert stopped == step - 1 > 3 * WAITS_A_BLOCK  # and those of the finished model


def test_saving_is_told_shard_by_shard(source, tmp_path):
    told = []
    prune(source, tmp_path / "out", max_shard_size=SHARD, progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "save"] == [("save", number, 4) for number in (1, 2, 3, 4)]


def test_shards_hold_what_one_file_holds(source, sharded):
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    found = {name: load_file(sharded / name) for name in names}
    assert index["weight_map"] == {tensor: name for name, tensors in found.items() for tensor in tensors}
    whole = load_file(source / "reference/model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(found[index["weight_map"][name]][name], tensor) for name, tensor in whole.items())
    ours = transformers.AutoModelForCausalLM.from_pretrained(sharded)
    ours.save_pretrained(source / "by-transformers", max_shard_size="1GB")
    assert load_file(source / "by-transformers/model.safetensors").keys() == whole.keys()


def test_saving_goes_on_where_it_was_stopped_and_holds_nothing_twice(source, sharded, tmp_path, monkeypatch):
    """Stopped at each wait for the disk after the last block: whole shards stay, and the blocks that they hold go."""
    out, step, kept, sizes = tmp_path / "out", 3 * WAITS_A_BLOCK + 2, [], []
    whole = weight_bytes(sharded)
    while True:
        with monkeypatch.context() as patched:
            count = stop_at(patched, step, OSError(errno.ENOSPC, "No space left on device"))
            with suppress(ValueError):
                prune(source, out, max_shard_size=SHARD)
        if count[0] < step:
            break
        sizes.append(weight_bytes(out))
        kept.append(len(manifest.read_manifest(out / manifest.FOLDER).shards))
        with monkeypatch.context() as patched:
            if kept[-1]:
                patched.setattr(run, "prune_model", None)  # nothing is pruned, nor replayed
            prune(source, out, max_shard_size="1KB" if kept[-1] else SHARD)  # it was planned by the first process
        check_as_if_never_stopped(source, out, "sharded")
        shutil.rmtree(out)
        step += 1
    assert kept.pop() == 0  # all was moved, and the journal gone
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2, 3, 4}
    assert max(sizes) < whole * (1 + 1 / 3)  # four shards, of which one is there twice


def weight_bytes(folder):
    """What all files below a folder hold, without their headers."""
    files = [path.read_bytes() for path in folder.rglob("*.safetensors")]
    return sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)


def test_a_block_that_is_gone_and_was_not_saved_is_not_taken_for_a_saved_one(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(publish.Publisher, "keep_shard", lambda *_: cut())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, max_shard_size=SHARD)
    assert manifest.read_manifest(out / manifest.FOLDER).shards == []
    kept = manifest.read_manifest(out / manifest.FOLDER)
    for blocks in (kept.blocks | {"model.layers.1": manifest.SAVED}, dict([*kept.blocks.items()][:2])):
        shutil.copytree(out, tmp_path / "copy")
        manifest.RunManifest(tmp_path / "copy" / manifest.FOLDER, kept).update(blocks=blocks)
        with pytest.raises(ValueError, match=r"is damaged \(model\.layers\.\d\S+ is in no file\).*overwrite"):
            prune(source, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    (out / manifest.FOLDER / "block-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged"):
        prune(source, out)
    (out / manifest.FOLDER / publish.OUTCOME).write_text("{}")
    with pytest.raises(ValueError, match=r"outcome\.json is damaged .*overwrite"):
        prune(source, out)
    prune(source, out, resume=False, overwrite=True)
    check_as_if_never_stopped(source, out)


def cut():
    raise KeyboardInterrupt


def stopped_while_saving(source, out, monkeypatch, shards):
    """Leave a number of whole shards in `out`."""
    keep = publish.Publisher.keep_shard

    def kept(self, *others):
        keep(self, *others)
        if self.num_whole_shards == shards:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publish.Publisher, "keep_shard", kept)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, max_shard_size=SHARD)
    assert f"in {shards} finished shards" in manifest.unfinished(out).progress


@pytest.mark.parametrize("damage", ["a bit", "the end", "all", "a folder"])
def test_a_damaged_shard_is_not_published(source, tmp_path, monkeypatch, damage):
    out = tmp_path / "out"
    stopped_while_saving(source, out, monkeypatch, 2)
    shard = out / manifest.FOLDER / publish.FINISHED / "00001-model.safetensors"
    bits = shard.read_bytes()
    if damage == "all":
        shard.unlink()
    elif damage == "a folder":
        shutil.rmtree(shard.parent)
    else:
        shard.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]) if damage == "a bit" else bits[:-100])
    with pytest.raises(ValueError, match=r"0000\d-model.safetensors is damaged .*overwrite"):
        prune(source, out)
    assert not (out / "config.json").exists()
    prune(source, out, resume=False, overwrite=True)
    check_as_if_never_stopped(source, out)


def test_a_run_that_has_only_to_save_needs_no_machine_like_the_first(source, sharded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped_while_saving(source, out, monkeypatch, 1)
    more = torch.get_num_threads() + 1
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: more)
        with pytest.raises(ValueError, match="differs: recipe pattern was 50%, is 60%. Resume it"):
            prune(source, out, pattern="60%")
        prune(source, out)
    assert (out / "model-00003-of-00004.safetensors").read_bytes() == (
        sharded / "model-00003-of-00004.safetensors"
    ).read_bytes()


def test_starting_again_leaves_nothing_of_a_run_that_was_stopped_while_saving(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped_while_saving(source, out, monkeypatch, 2)
    commit, found = block_store.JournalledBlocks.commit, []

    def committed(self, *others):
        commit(self, *others)
        found.append(sorted(path.name for path in out.rglob("*.safetensors")))

    monkeypatch.setattr(block_store.JournalledBlocks, "commit", committed)
    prune(source, out, resume=False, overwrite=True)
    assert found == [[f"block-{number:05d}.safetensors" for number in range(done)] for done in (1, 2, 3)]
    check_as_if_never_stopped(source, out)


def test_power_cuts_while_the_finished_model_is_moved(source, tmp_path, monkeypatch):
    """No exit code runs: whatever has been moved or removed stays so. A folder with a config.json is a whole model."""
    out = tmp_path / "out"
    shutil.copytree(source / "reference", tmp_path / "kept")
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    step, states = 1, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", out)
        (out / "old.bin").write_text("of the earlier model")
        count = [0]
        with monkeypatch.context() as patched:
            for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
                patched.setattr(owner, name, cut_at(getattr(owner, name), step, count, out))
            try:
                prune(source, out, seed=7, overwrite=True, resume=False)
            except PowerCutError:
                pass
            else:
                break
        names = {path.name for path in out.iterdir() if path.is_file()}
        if "config.json" in names:
            assert earlier.keys() <= names  # the earlier model or the new one, whole
            assert json.loads((out / "secateur.json").read_text())["recipe"]
            assert load_file(out / "model.safetensors").keys() == load_file(tmp_path / "kept/model.safetensors").keys()
        states.add(frozenset(names))
        prune(source, out, seed=7, overwrite=True)
        assert {path.name for path in out.iterdir()} == earlier.keys()
        assert (out / "model.safetensors").read_bytes() != earlier["model.safetensors"]
        step += 1
    assert len(states) >= 4  # whole, without its config.json, and partly moved


class PowerCutError(BaseException):
    """The process is gone."""


def cut_at(real, step, count, out):
    """The function, until `step` calls of it and others were made about the model in `out`; then none does a thing."""

    def call(path, *others, **options):
        about = (out / manifest.FOLDER / publish.FINISHED).exists() or count[0]
        count[0] += bool(about)
        if count[0] >= step and about:
            raise PowerCutError
        return real(path, *others, **options)

    return call


def test_finished_blocks_are_not_pruned_again(source, tmp_path, monkeypatch):
    pruned, real = [], loop.prune_block

    def watched(block, *others):
        pruned.append(block.name)
        return real(block, *others)

    monkeypatch.setattr(loop, "prune_block", watched)
    with monkeypatch.context() as patched:
        stop_at(patched, 3 * 2 + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out")
    prune(source, tmp_path / "out")
    assert pruned == [f"model.layers.{index}" for index in (0, 1, 2, 2)]


def test_a_full_disk_costs_nothing_that_was_there(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(source / "reference", out)
    (out / "mark").write_text("earlier")
    for step in (1, 5, 10):
        with monkeypatch.context() as patched:
            stop_at(patched, step, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(ValueError, match="No space left on device"):
                prune(source, out, seed=7, overwrite=True)
        assert (out / "mark").read_text() == "earlier"
        assert (out / "model.safetensors").read_bytes() == (source / "reference/model.safetensors").read_bytes()
    prune(source, out, seed=7, overwrite=True)
    assert not (out / "mark").exists()
    assert not (out / manifest.FOLDER).exists()


def interrupted(source, out, monkeypatch):
    """Leave two finished blocks in `out`."""
    with monkeypatch.context() as patched:
        stop_at(patched, 3 * 2 + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": "60%"}, "recipe pattern was 50%, is 60%"),
        ({"seed": 1}, "recipe seed was 0, is 1"),
        ({"samples": 6}, "calibration was"),
        ({"settings": {"refit.epochs": 2}}, "recipe refit epochs was 1, is 2"),
    ],
)
def test_another_run_refuses_to_go_on_and_says_why(source, tmp_path, monkeypatch, changed, message):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    before = (out / manifest.FOLDER / manifest.MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message):
        prune(source, out, **changed)
    assert (out / manifest.FOLDER / manifest.MANIFEST).read_bytes() == before
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_other_weights_threads_or_versions_refuse_to_go_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    with monkeypatch.context() as patched:
        more = torch.get_num_threads() + 1
        patched.setattr(torch, "get_num_threads", lambda: more)
        with pytest.raises(ValueError, match=f"environment threads was .*, is {more}"):
            prune(source, out)
    path = out / manifest.FOLDER / manifest.MANIFEST
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(ValueError, match="environment torch was 0"):
        prune(source, out)
    shutil.copytree(source, tmp_path / "changed")
    weights = load_file(tmp_path / "changed/model/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "changed/model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model files model.safetensors was"):
        prune(tmp_path / "changed", out)


def test_an_unfinished_run_is_not_started_over_by_accident(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    with pytest.raises(ValueError, match="2 finished blocks are in.*resume"):
        prune(source, out, resume=False)
    prune(source, out, resume=False, overwrite=True)
    check_as_if_never_stopped(source, out)


def test_a_request_that_is_wrong_costs_no_finished_block(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    with pytest.raises(ValueError, match="not a file"):
        prune(source, out, resume=False, overwrite=True, calibration=Path("absent.txt"))
    with pytest.raises(ValueError, match="not a folder that can be written"):
        prune(source, out, resume=False, overwrite=True, offload_dir=tmp_path / "absent")
    (out / "notes.txt").write_text("the user's own")
    report = prune(source, out)
    assert len(report.matrices) == 3 * 7
    assert (out / "notes.txt").read_text() == "the user's own"
    (out / "notes.txt").unlink()
    check_as_if_never_stopped(source, out)


def test_another_run_in_place_of_one_that_was_cut_off_when_all_was_moved(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(folder, "_remove_if_done", lambda _folder: None)
        prune(source, out, seed=7)
    with monkeypatch.context() as patched:
        stop_at(patched, 3 * 2 + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, overwrite=True)
    assert "2 finished blocks" in manifest.unfinished(out).progress
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_overwriting_an_unfinished_run_takes_no_file_that_is_none_of_its(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, 3 * 2 + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out)
    (out / "notes.txt").write_text("of today")
    with pytest.raises(ValueError, match="so it is not a model, and is not overwritten"):
        prune(source, out, seed=7, resume=False, overwrite=True)
    assert (out / "notes.txt").read_text() == "of today"
    (out / "notes.txt").unlink()
    prune(source, out, resume=False, overwrite=True)
    check_as_if_never_stopped(source, out)


def test_a_finished_run_is_left_as_it_is(source, tmp_path):
    shutil.copytree(source / "reference", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = prune(source, tmp_path / "out")
    assert report.sparsity == 0.5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match=r"another run \(its recipe differs\)"):
        prune(source, tmp_path / "out", pattern="60%")
    with pytest.raises(ValueError, match=r"another run \(its calibration, recipe differs\)"):
        prune(source, tmp_path / "out", seed=1)
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another run \(its model differs\)"):
        prune(tmp_path, tmp_path / "out", calibration=source / "text.txt")


def test_a_foreign_folder_and_a_damaged_journal_are_refused(source, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty"):
        prune(source, foreign)
    shutil.copytree(source / "model", foreign, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is not empty"):  # a model, but none that a run made
        prune(source, foreign)
    assert (foreign / "thesis.tex").exists()
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    path = out / manifest.FOLDER / manifest.MANIFEST
    whole = path.read_text()
    for damage in (
        "{",
        whole.replace('"replaces": []', '"replaces": [".secateur"]'),
        whole.replace('"files": {}', '"files": {"..": "model.safetensors"}'),
        "[]",
        '{"blocks": 3}',
    ):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"manifest\.json .*overwrite"):
            prune(source, out)
        assert "a damaged journal" in manifest.unfinished(out).progress
    path.write_text(whole)
    block = out / manifest.FOLDER / "block-00001.safetensors"
    bits = block.read_bytes()
    for damage in (bits[:-8], bits[:-8] + bytes(8)):
        block.write_bytes(damage)
        with pytest.raises(ValueError, match="block-00001.safetensors is damaged"):
            prune(source, out)
    path.write_text("{")
    prune(source, out, resume=False, overwrite=True)  # as the message says
    assert not (out / manifest.FOLDER).exists()


def test_two_runs_on_one_folder(source, tmp_path):
    out = tmp_path / "out"
    (out / manifest.FOLDER).mkdir(parents=True)
    with FileLock(out / manifest.FOLDER / folder.LOCK), pytest.raises(ValueError, match="written by another run"):
        prune(source, out)
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_kill_at_random_moments(source, tmp_path):
    """The real command, killed as by a power cut, again and again until it gets through."""
    out, chance = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-m", "secateur", "prune", source / "model", out, "--calibration", source / "text.txt"]
    path = out / manifest.FOLDER / manifest.MANIFEST
    for kept in range(4):
        process = subprocess.Popen([*map(str, command), *FLAGS], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (path.exists() and path.read_text().count("block-0") >= kept):
            time.sleep(0.001)
        time.sleep(chance.random() / 20)
        process.kill()
        process.communicate()
    done = subprocess.run([*map(str, command), *FLAGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_as_if_never_stopped(source, out)


def test_ctrl_c_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    from secateur.cli import app as cli

    stop_at(monkeypatch, 3 * 2 + 2, KeyboardInterrupt())
    arguments = ["prune", source / "model", tmp_path / "out", "--calibration", source / "text.txt", *FLAGS]
    monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "2 finished blocks are in" in capsys.readouterr().err


def test_nothing_is_left_of_a_run_that_finished_no_block(source, tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        prune(source, tmp_path / "deep" / "out", calibration=Path("absent.txt"))
    assert not list(tmp_path.iterdir())


def test_experts_that_are_fused_while_loading_go_on_to_the_same_bits(tmp_path, monkeypatch):
    tiny("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    prune(tmp_path, tmp_path / "reference", resume=False)
    interrupted(tmp_path, tmp_path / "out", monkeypatch)
    prune(tmp_path, tmp_path / "out")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("reference", "out"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "reference").iterdir()
    )
    prune(tmp_path, tmp_path / "sharded", resume=False, max_shard_size="20KB")  # less than a layer's experts
    names = [path.name for path in (tmp_path / "sharded").glob("*.safetensors")]
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / "sharded" / file).items()}
    expected = load_file(whole)
    assert len(names) > 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
