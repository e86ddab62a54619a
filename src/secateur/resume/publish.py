"""From finished blocks to the finished model: shard by shard into the journal, then moved to OUT.

The file of a block goes as soon as whole shards hold it, so the disk never holds a model of many blocks twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from secateur.errors import SecateurError
from secateur.resume.block_files import check_digest, map_from_file, names_in
from secateur.resume.block_store import JournalledBlocks
from secateur.resume.manifest import SAVED, Manifest, RunManifest
from secateur.runtime import distributed
from secateur.runtime.atomic_files import atomic_write, fsync, sha256

OUTCOME, FINISHED = "outcome.json", "finished"
LAST_MOVED = "config.json"  # without it a folder is not a model, so a half-moved folder never is


def read_outcome(manifest: RunManifest) -> dict[str, Any] | None:
    """The report and the plan of shards; None while there are blocks to prune.

    Raises:
        SecateurError: a damaged file.
    """
    if not manifest.state.outcome:
        return None
    path = manifest.folder / OUTCOME
    check_digest(path, manifest.state.outcome)
    return json.loads(path.read_text(encoding="utf-8"))


class Publisher:
    """Saves the finished model and moves it to OUT. Rank 0 alone writes."""

    def __init__(self, manifest: RunManifest, blocks: JournalledBlocks) -> None:
        """Publish the blocks of a run."""
        self.manifest, self.blocks = manifest, blocks

    @property
    def folder(self) -> Path:
        """Where the finished model is written before it is moved."""
        return self.manifest.folder / FINISHED

    @property
    def num_whole_shards(self) -> int:
        """Shards that are written."""
        return len(self.manifest.state.shards)

    @property
    def weight_files(self) -> list[str]:
        """Names of the files of whole shards, in order."""
        return [name for shard in self.manifest.state.shards for name in shard]

    def keep_outcome(self, outcome: dict[str, Any]) -> None:
        """Record that every block is finished: a resumed run only has to save.

        Args:
            outcome: plain data, with the list `shards` of the tensors in each.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = self.manifest.folder / OUTCOME
        atomic_write(path, json.dumps(outcome) + "\n")
        self.manifest.update(outcome=sha256(path))

    def restore(self, model: nn.Module, pruned: Collection[str], shards: Sequence[Collection[str]]) -> None:
        """Map the blocks that other processes finished, except those that are in whole shards.

        Args:
            model: the dense model.
            pruned: parameters that the run has pruned, without `.weight`.
            shards: the model's tensors in each, as planned.

        Raises:
            SecateurError: a damaged block or shard, or pruned weights that no file holds.
        """
        for files in self.manifest.state.shards:
            for name, digest in files.items():
                check_digest(self.folder / name, digest)
        held = {_parameter(name) for shard in shards[: self.num_whole_shards] for name in shard}
        parameters = {_parameter(name): parameter for name, parameter in model.named_parameters()}
        for block, digest in self.manifest.state.blocks.items():
            path = self.blocks.path_of(block)
            if digest == SAVED:
                path.unlink(missing_ok=True)
                continue
            names = names_in(path)
            if block not in self.blocks.passed:
                check_digest(path, digest)
                map_from_file(path, {name: parameters[name] for name in names if name in parameters})
            held.update(names)
        if lost := sorted({*pruned} - held):
            raise SecateurError(
                f"{self.manifest.folder} is damaged ({lost[0]} is in no file): start again with ‹overwrite›"
            )

    def keep_shard(self, model: nn.Module, names: Collection[str], paths: Collection[Path]) -> None:
        """Make a shard durable, and let go of the blocks that it holds, on the disk too.

        Args:
            model: the model.
            names: its tensors in the shard.
            paths: the shard's files, in `folder`.
        """
        for path in paths:
            fsync(path)
        fsync(self.folder)
        held, state = {_parameter(name) for name in names}, self.manifest.state
        files = {block: self.blocks.path_of(block) for block, digest in state.blocks.items() if digest != SAVED}
        inside = {block: path for block, path in files.items() if held.issuperset(names_in(path))}
        weights = [path for path in paths if path.suffix == ".safetensors"]
        self.manifest.update(
            shards=[*state.shards, {path.name: sha256(path) for path in weights}],
            blocks=state.blocks | dict.fromkeys(inside, SAVED),
        )
        parameters = {_parameter(name): parameter for name, parameter in model.named_parameters()}
        for path in inside.values():
            for name in names_in(path):
                _let_go(parameters[name])
            path.unlink()

    def publish(self, model: nn.Module, write: Callable[[], dict[str, str]]) -> None:
        """Let `write` complete the finished model in `folder`, and move it to OUT, which then holds nothing else.

        Args:
            model: the model.
            write: returns the name in OUT of each file in `folder`.

        Raises:
            SecateurError: the disk is full or not writable; blocks and whole shards are kept, and so is what OUT held,
                unless the model was whole and only the move was stopped: a resumed run completes it.
        """
        if distributed.is_main():
            self._write_and_move(write)
        else:
            for parameter in model.parameters():  # a file that is mapped keeps its space on the disk
                _let_go(parameter)
        distributed.barrier()

    def _write_and_move(self, write: Callable[[], dict[str, str]]) -> None:
        try:
            if not self.manifest.state.outcome:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            files = write()
            for name in files:
                fsync(self.folder / name)
            fsync(self.folder)
            self.manifest.update(files=files)
        except (OSError, SafetensorError) as error:
            raise SecateurError(f"{self.manifest.folder.parent} could not be saved ({error})") from error
        move_finished_files(self.manifest.folder, self.manifest.state)


def move_finished_files(folder: Path, manifest: Manifest) -> None:
    """Move the finished model's files to OUT in place of those that it held. Safe to repeat.

    Raises:
        SecateurError: a file of the finished model is gone, or the disk is not writable.
    """
    try:
        _move(folder / FINISHED, folder.parent, manifest)
    except OSError as error:
        raise SecateurError(f"{folder.parent} could not be saved ({error})") from error


def _move(finished: Path, out: Path, manifest: Manifest) -> None:
    files = manifest.files
    gone = [name for here, name in files.items() if not (finished / here).exists() and not (out / name).exists()]
    if gone:
        raise SecateurError(f"{finished.parent} is damaged ({gone[0]} is gone): start again with ‹overwrite›")
    if (finished / LAST_MOVED).exists():
        (out / LAST_MOVED).unlink(missing_ok=True)
        fsync(out)
    for name in {*manifest.replaces} - {*files.values()}:
        (out / name).unlink(missing_ok=True)
    for here, name in sorted(files.items(), key=lambda file: file[1] == LAST_MOVED):
        if (finished / here).exists():
            if name == LAST_MOVED:
                fsync(out)
            (finished / here).replace(out / name)
    fsync(out)


def _parameter(name: str) -> str:
    """Name of a tensor without `.weight`."""
    return name.removesuffix(".weight")


def _let_go(parameter: nn.Parameter) -> None:
    """Drop a parameter's content, and the mapping of its file."""
    parameter.data = parameter.data.new_empty(0)
