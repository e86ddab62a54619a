"""Runs that survive: whatever stops one, and wherever, `resume` ends with the bits of a run that was never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from commands import Command, command
from helpers import Killed, kill_at
from models import TEXT, character_tokenizer, save_checkpoint, tokens
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP
from zoo import tiny

import secateur
from secateur import run
from secateur.checkpoints.save import write_checkpoint
from secateur.pruning import loop
from secateur.pruning.context import LayerPatterns
from secateur.recipe.patterns import NM, Unstructured
from secateur.reporting.report import Report
from secateur.resume import block_store, folder, manifest, publish
from secateur.resume.kept import kept_patterns
from secateur.storage import held_folder
from secateur.storage.held_folder import HeldFolder

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
SHARD = "20KB"  # a layer is 19 KB, and so is what is in none
SETTINGS = {"pattern": "50%", "recipe": "balanced", "samples": 4, "seq_len": 32}
BEGINS = 8  # waits for the disk before the first block: the journal twice, the manifest twice, the allocation, folders
EVERY = 3
WAITS_A_BLOCK = 4  # its file and its folder, the manifest, and its folder
TWO_BLOCKS = BEGINS + 2 * WAITS_A_BLOCK + 1  # the wait after which two blocks are finished
FLAGS = ("--pattern", "50%", "--recipe", "balanced", "--samples", "4", "--seq-len", "32", "--resume")


@pytest.fixture(autouse=True)
def _short_page(monkeypatch):
    """Hundreds of runs: drawing each one's page would double their time."""
    monkeypatch.setattr("secateur.reporting.page.run_page", lambda *_: "<!doctype html>")


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
        del (
            report["stages"],
            report["summary"]["out"],
            report["sha256"],
            report["files"]["README.md"],
        )  # the card has OUT's name
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


@pytest.mark.long
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(source, tmp_path, monkeypatch):
    """Stopped at every third wait for the disk: over three blocks that is at each of the four waits of a block."""
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
        step += EVERY
    assert stopped == step // EVERY
    assert step > BEGINS + 3 * WAITS_A_BLOCK + EVERY  # the finished model's too


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


@pytest.mark.long
def test_saving_goes_on_where_it_was_stopped_and_holds_nothing_twice(source, sharded, tmp_path, monkeypatch):
    """Stopped at every third wait for the disk after the last block: whole shards stay, and their blocks go."""
    out, step, kept, sizes = tmp_path / "out", BEGINS + 3 * WAITS_A_BLOCK + 1, [], []
    whole = weight_bytes(sharded)
    while True:
        with monkeypatch.context() as patched:
            count = stop_at(patched, step, OSError(errno.ENOSPC, "No space left on device"))
            with suppress(ValueError):
                prune(source, out, max_shard_size=SHARD)
        if count[0] < step:
            break
        sizes.append(weight_bytes(tmp_path))
        if not out.exists():
            kept.append(len(manifest.read_manifest(manifest.journal_of(out)).shards))
        with monkeypatch.context() as patched:
            if kept[-1]:
                patched.setattr(run, "prune_model", None)  # nothing is pruned, nor replayed
            prune(source, out, max_shard_size="1KB" if kept[-1] else SHARD)  # it was planned by the first process
        check_as_if_never_stopped(source, out, "sharded")
        shutil.rmtree(out)
        step += EVERY
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
    assert manifest.read_manifest(manifest.journal_of(out)).shards == []
    kept = manifest.read_manifest(manifest.journal_of(out))
    for blocks in (kept.blocks | {"model.layers.1": manifest.SAVED}, dict([*kept.blocks.items()][:2])):
        shutil.copytree(manifest.journal_of(out), manifest.journal_of(tmp_path / "copy"))
        change_manifest(tmp_path / "copy", blocks=blocks)
        with pytest.raises(ValueError, match=r"is damaged \(model\.layers\.\d\S+ is in no file\).*overwrite"):
            prune(source, tmp_path / "copy")
        shutil.rmtree(manifest.journal_of(tmp_path / "copy"))
    (manifest.journal_of(out) / "block-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged"):
        prune(source, out)
    (manifest.journal_of(out) / publish.OUTCOME).write_text("{}")
    with pytest.raises(ValueError, match=r"outcome\.json is damaged .*overwrite"):
        prune(source, out)
    prune(source, out, resume=False, overwrite=True)
    check_as_if_never_stopped(source, out)


def change_manifest(out, **changes):
    """Give a manifest other content, as a person would who knows its digest."""
    journal = manifest.journal_of(out)
    with HeldFolder(journal) as held:
        manifest.RunManifest(journal, manifest.read_manifest(journal), held).update(**changes)


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
    shard = manifest.journal_of(out) / publish.FINISHED / "00001-model.safetensors"
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
        with pytest.raises(ValueError, match="differs: recipe pattern was 50%, is 55%. Resume it"):
            prune(source, out, pattern="55%")
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
        found.append(sorted(path.name for path in manifest.journal_of(out).rglob("*.safetensors")))

    monkeypatch.setattr(block_store.JournalledBlocks, "commit", committed)
    prune(source, out, resume=False, overwrite=True)
    assert found == [[f"block-{number:05d}.safetensors" for number in range(done)] for done in (1, 2, 3)]
    check_as_if_never_stopped(source, out)


@pytest.mark.parametrize("exchange", [True, False])
def test_power_cuts_while_the_finished_model_takes_its_place(source, tmp_path, monkeypatch, exchange):
    """No exit code runs. OUT is the earlier model or the new one; without an exchange it may be away for a moment."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    shutil.copytree(source / "reference", kept)
    earlier = bytes_of(kept)
    stopped_before_its_place(source, kept, monkeypatch)
    journal = tmp_path / "journal"
    manifest.journal_of(kept).rename(journal)
    step, states = 1, []
    if not exchange:
        monkeypatch.setattr(held_folder, "_exchange", lambda *_: False)
    while True:
        shutil.copytree(kept, out)
        shutil.copytree(journal, manifest.journal_of(out))
        with monkeypatch.context() as patched:
            count = [0]
            for owner, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (held_folder, "_exchange")):
                patched.setattr(owner, name, cut_at(getattr(owner, name), step, count))
            try:
                prune(source, out, seed=7)
            except PowerCutError:
                pass
            else:
                break
        states.append(bytes_of(out) if out.exists() else None)
        prune(source, out, seed=7)
        new = bytes_of(out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "kept", "out"]
        shutil.rmtree(out)
        step += 1
    assert earlier != new
    assert [state for state in states if state not in (earlier, new)] == [None] * (not exchange)
    assert earlier in states
    assert new in states


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped_before_its_place(source, out, monkeypatch):
    """Leave a whole model in the journal of a folder that holds an earlier one."""
    with monkeypatch.context() as patched:
        patched.setattr(publish, "put_in_place", lambda *_: cut())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, seed=7, overwrite=True)


class PowerCutError(BaseException):
    """The process is gone."""


def cut_at(real, step, count):
    """The function, until `step` calls of it and others were made; then none does a thing."""

    def call(*arguments, **options):
        count[0] += 1
        if count[0] >= step:
            raise PowerCutError
        return real(*arguments, **options)

    return call


def test_finished_blocks_are_not_pruned_again(source, tmp_path, monkeypatch):
    pruned, real = [], loop.prune_block

    def watched(block, *others):
        pruned.append(block.name)
        return real(block, *others)

    monkeypatch.setattr(loop, "prune_block", watched)
    with monkeypatch.context() as patched:
        stop_at(patched, TWO_BLOCKS, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out")
    prune(source, tmp_path / "out")
    assert pruned == [f"model.layers.{index}" for index in (0, 1, 2, 2)]


def test_a_full_disk_costs_nothing_that_was_there(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(source / "reference", out)
    (out / "LICENSE.txt").write_text("earlier")
    for step in (1, 6, 14):
        with monkeypatch.context() as patched:
            stop_at(patched, step, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(ValueError, match="No space left on device"):
                prune(source, out, seed=7, overwrite=True)
        assert (out / "LICENSE.txt").read_text() == "earlier"
        assert (out / "model.safetensors").read_bytes() == (source / "reference/model.safetensors").read_bytes()
    prune(source, out, seed=7, overwrite=True)
    assert not (out / "LICENSE.txt").exists()
    assert not manifest.journal_of(out).exists()


def interrupted(source, out, monkeypatch):
    """Leave two finished blocks in `out`."""
    with monkeypatch.context() as patched:
        stop_at(patched, TWO_BLOCKS, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": "60%"}, "recipe pattern was 50%, is 60%"),
        ({"seed": 1}, "recipe seed was 0, is 1"),
        ({"samples": 6}, "calibration samples was 4, is 6; calibration sha256 was [0-9a-f]{12}[.]{3}, is"),
        ({"settings": {"refit.epochs": 2}}, "recipe refit epochs was 1, is 2"),
    ],
)
def test_another_run_refuses_to_go_on_and_says_why(source, tmp_path, monkeypatch, changed, message):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    before = (manifest.journal_of(out) / manifest.MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message):
        prune(source, out, **changed)
    assert (manifest.journal_of(out) / manifest.MANIFEST).read_bytes() == before
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_what_was_found_before_the_first_block_is_not_looked_for_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    monkeypatch.setattr("secateur.pruning.allocation._allocated", lambda *_: pytest.fail("allocated again"))
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_an_allocation_is_kept_exactly(tmp_path):
    """Of two chains, and with a matrix that stays dense."""
    found = [
        LayerPatterns(
            {"a": Unstructured(0.0), "b": Unstructured(1 / 3)}, {"a": torch.tensor([0.125, 8.0])}, {"a": 0.1}
        ),
        LayerPatterns({"c": NM(2, 4)}),
    ]
    with HeldFolder(tmp_path) as held:
        for find in (found, [None, None]):  # the second process finds nothing by itself
            run_manifest = manifest.RunManifest(tmp_path, manifest.read_manifest(tmp_path), held)
            for chain, patterns in zip(("encoder", "decoder"), find, strict=True):
                kept = kept_patterns(run_manifest, chain, lambda patterns=patterns: patterns)
                expected = found[chain == "decoder"]
                assert (kept.patterns, kept.prices) == (expected.patterns, expected.prices)
                assert kept.row_scales.keys() == expected.row_scales.keys()
                assert all(torch.equal(kept.row_scales[name], scale) for name, scale in expected.row_scales.items())


VERSIONS = ("secateur", "torch", "transformers", "safetensors")


def test_other_weights_threads_or_versions_refuse_to_go_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    with monkeypatch.context() as patched:
        more = torch.get_num_threads() + 1
        patched.setattr(torch, "get_num_threads", lambda: more)
        with pytest.raises(ValueError, match=f"environment threads was .*, is {more}"):
            prune(source, out)
    identity = manifest.read_manifest(manifest.journal_of(out)).identity
    for name in (*VERSIONS, "threads", "device", "forward_dtype", "processor"):
        assert name in identity["environment"]
        change_manifest(out, identity=identity | {"environment": identity["environment"] | {name: "other"}})
        with pytest.raises(ValueError, match=f"environment {name} was other, is"):
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
    with pytest.raises(ValueError, match="'~nobody-here/x' can't be a path"):
        prune(source, out, resume=False, overwrite=True, offload_dir="~nobody-here/x")
    out.mkdir()
    for name in ("notes.txt", "README.md"):
        (out / name).write_text("the user's own")
        with pytest.raises(ValueError, match=f"holds {name}, which was not there when the run began: move it"):
            prune(source, out)
        assert (out / name).read_text() == "the user's own"
        (out / name).unlink()
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_another_run_in_place_of_one_that_was_cut_off_when_all_was_moved(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(folder, "_remove_if_done", lambda *_: None)
        patched.setattr(HeldFolder, "remove", lambda *_: None)
        prune(source, out, seed=7)
    with monkeypatch.context() as patched:
        stop_at(patched, TWO_BLOCKS + 3, KeyboardInterrupt())  # what may be replaced is recorded first
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, overwrite=True)
    assert "2 finished blocks" in manifest.unfinished(out).progress
    prune(source, out)
    check_as_if_never_stopped(source, out)


def test_overwriting_an_unfinished_run_takes_no_file_that_is_none_of_its(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, TWO_BLOCKS, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prune(source, out)
    out.mkdir()
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
    for spelled in (source, source / ".." / source.name):  # the files decide, and not their names
        assert prune(spelled, tmp_path / "out").sparsity == 0.5
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
    path = manifest.journal_of(out) / manifest.MANIFEST
    whole = path.read_text()
    for damage in ("{", whole.replace('"blocks"', '"block"'), "[]", '{"blocks": 3}', "[" * 100_000):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"manifest\.json .*overwrite"):
            prune(source, out)
        assert "a damaged journal" in manifest.unfinished(out).progress
    path.write_text(whole)
    block = manifest.journal_of(out) / "block-00001.safetensors"
    bits = block.read_bytes()
    for damage in (bits[:-8], bits[:-8] + bytes(8)):
        block.write_bytes(damage)
        with pytest.raises(ValueError, match="block-00001.safetensors is damaged"):
            prune(source, out)
    path.write_text("{")
    prune(source, out, resume=False, overwrite=True)  # as the message says
    assert not manifest.journal_of(out).exists()


def test_two_runs_on_one_folder(source, tmp_path):
    out = tmp_path / "out"
    with folder.locked_journal(out), pytest.raises(ValueError, match="written by another run"):
        prune(source, out)
    prune(source, out)
    check_as_if_never_stopped(source, out)


@pytest.mark.long
def test_kill_at_random_moments(source, tmp_path):
    """The real command, killed as by a power cut, again and again until it gets through."""
    out, chance = tmp_path / "out", random.Random(0)
    arguments = ("prune", source / "model", out, "--calibration", source / "text.txt", *FLAGS)
    path = manifest.journal_of(out) / manifest.MANIFEST
    for kept in (0, 2):
        process = Command(*arguments)
        process.wait_for(lambda kept=kept: path.exists() and len(json.loads(path.read_text())["blocks"]) >= kept)
        time.sleep(chance.random() / 100)
        process.send(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    check_as_if_never_stopped(source, out)


def test_ctrl_c_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    from secateur.cli import app as cli

    stop_at(monkeypatch, TWO_BLOCKS, KeyboardInterrupt())
    arguments = ["prune", source / "model", tmp_path / "out", "--calibration", source / "text.txt", *FLAGS]
    monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "2 finished blocks are in" in capsys.readouterr().err


def test_figures_recorded_with_the_source_are_no_change_of_it(tmp_path):
    """`eval --record` on a pruned model that a stopped run prunes further."""
    save_checkpoint(tmp_path / "model")
    options = {"calibration": tokens(4), "solver": "magnitude"}
    secateur.prune(tmp_path / "model", tmp_path / "half", **options)
    with pytest.raises(Killed):
        secateur.prune(tmp_path / "half", tmp_path / "more", pattern="70%", progress=kill_at("prune", 1), **options)
    report = Report.load(tmp_path / "half")
    report.notices.append("another")
    report.save(tmp_path / "half")
    resumed = secateur.prune(tmp_path / "half", tmp_path / "more", pattern="70%", resume=True, **options)
    assert resumed.sparsity == pytest.approx(0.7, abs=0.01)


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
    before = sorted(path.name for path in tmp_path.iterdir())
    found = secateur.dry_run(tmp_path / "model", tmp_path / "new", calibration=tmp_path / "text.txt", **SETTINGS)
    assert found.disk_bytes > 2.5 * whole.stat().st_size, "the model, a shard, and experts in another layout"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    prune(tmp_path, tmp_path / "sharded", resume=False, max_shard_size="20KB")  # less than a layer's experts
    names = [path.name for path in (tmp_path / "sharded").glob("*.safetensors")]
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / "sharded" / file).items()}
    expected = load_file(whole)
    assert len(names) > 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def one_digit_more(path, name):
    """Change a digit of a number in a JSON file, which stays as valid as it was."""
    text = path.read_text()
    at = text.index(f'"{name}"') + len(name) + 2
    at += re.search(r"[0-8](?=[\d.,\]])", text[at:]).start()
    path.write_text(f"{text[:at]}{int(text[at]) + 1}{text[at + 1 :]}")


@pytest.mark.parametrize(
    ("file", "name"), [(manifest.MANIFEST, "seconds"), ("allocation-0.json", "patterns"), ("own-words.json", "windows")]
)
def test_a_digit_that_changed_in_the_journal_is_found(source, tmp_path, monkeypatch, file, name):
    out, own = tmp_path / "out", {"settings": {"calibration.own_words": 1}}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "prune_block", lambda *_: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            prune(source, out, **own)
    one_digit_more(manifest.journal_of(out) / file, name)
    with pytest.raises(ValueError, match=f"{file} (is damaged|has another SHA-256)"):
        prune(source, out, **own)


def test_a_damaged_block_ends_a_run_before_the_next_one_is_pruned(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch)
    flip_a_bit(manifest.journal_of(tmp_path / "out") / "block-00001.safetensors")
    monkeypatch.setattr(loop, "prune_block", lambda *_: pytest.fail("a block was pruned on damaged weights"))
    with pytest.raises(ValueError, match="block-00001.safetensors"):
        prune(source, tmp_path / "out")


def test_a_block_that_is_damaged_before_the_model_is_saved_is_found(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def damaged(*arguments, **options):
        flip_a_bit(manifest.journal_of(out) / "block-00000.safetensors")
        return write_checkpoint(*arguments, **options)

    monkeypatch.setattr(run, "write_checkpoint", damaged)
    with pytest.raises(ValueError, match="block-00000.safetensors"):
        prune(source, out)
    assert not out.exists()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_model_that_draws_random_numbers_goes_on_to_the_same_bits(source, tmp_path, monkeypatch):
    """As the hashes of an attention are: in each block, whether it is pruned or replayed."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: (y := forward(self, x)) + 0.1 * y.std() * torch.randn_like(y)
    )
    prune(source, tmp_path / "reference", resume=False)
    interrupted(source, tmp_path / "out", monkeypatch)
    prune(source, tmp_path / "out")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("out", "reference"))
    assert ours.read_bytes() == theirs.read_bytes()
