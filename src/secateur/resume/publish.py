"""From finished blocks to the finished model, shard by shard, in the journal.

The file of a block goes as soon as whole shards hold it, so the disk never holds a model of many blocks twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from secateur.errors import SecateurError
from secateur.packed.files import file_names
from secateur.resume.block_files import check_digest, map_from_file, names_in
from secateur.resume.block_store import JournalledBlocks
from secateur.resume.manifest import SAVED, RunManifest, damaged
from secateur.resume.put_in_place import FINISHED, put_in_place
from secateur.runtime import distributed
from secateur.storage.checkpoint_files import DENSE_STEM, PACKED_STEM
from secateur.storage.file_records import FileRecord, damage
from secateur.storage.held_folder import HeldFolder
from secateur.storage.json_files import read_json

OUTCOME = "outcome.json"
_MADE = re.compile(r"\d{5,}-.+\.safetensors")  # a shard's file before the number of files is known


def read_outcome(manifest: RunManifest) -> dict[str, Any] | None:
    """The report and the plan of shards; None while there are blocks to prune.

    Raises:
        SecateurError: a damaged file.
    """
    if not manifest.state.outcome:
        return None
    path = manifest.folder / OUTCOME
    check_digest(path, manifest.state.outcome)
    return read_json(path)


class Publisher:
    """Saves the finished model and puts it in OUT's place. Rank 0 alone writes."""

    def __init__(self, manifest: RunManifest, blocks: JournalledBlocks, out: Path) -> None:
        """Publish the blocks of a run to a folder."""
        self.manifest, self.blocks, self.out = manifest, blocks, out

    @property
    def folder(self) -> Path:
        """Where the finished model is written before it gets its place."""
        return self.manifest.folder / FINISHED

    @property
    def num_whole_shards(self) -> int:
        """Shards that are written."""
        return len(self.manifest.state.shards)

    def keep_outcome(self, outcome: dict[str, Any]) -> None:
        """Record that every block is finished: a resumed run only has to save.

        Args:
            outcome: plain data, with the list `shards` of the tensors in each.

        Raises:
            OSError: the disk is full or not writable.
        """
        self.manifest.held.write(OUTCOME, json.dumps(outcome) + "\n")
        self.manifest.update(outcome=self.manifest.held.record(OUTCOME).sha256)

    def restore(self, model: nn.Module, pruned: Collection[str], shards: Sequence[Collection[str]]) -> None:
        """Verify what is written, and map the blocks that other processes finished and no whole shard holds.

        Args:
            model: the dense model.
            pruned: parameters that the run has pruned, without `.weight`.
            shards: the model's tensors in each, as planned.

        Raises:
            SecateurError: a damaged block or shard, or pruned weights that no file holds.

        Cost: one read of the journal.
        """
        self._check_shards(len(shards))
        held = {_parameter(name) for shard in shards[: self.num_whole_shards] for name in shard}
        parameters = {_parameter(name): parameter for name, parameter in model.named_parameters()}
        for block, digest in self.manifest.state.blocks.items():
            path = self.blocks.path_of(block)
            if digest == SAVED:
                self.manifest.held.remove(path.name)
                continue
            check_digest(path, digest)
            names = names_in(path)
            if block not in self.blocks.passed:
                map_from_file(path, {name: parameters[name] for name in names if name in parameters})
            held.update(names)
        if lost := sorted({*pruned} - held):
            raise damaged(self.manifest.folder, f"{lost[0]} is in no file")

    def _check_shards(self, planned: int) -> None:
        """Check the shards that are written, under the names that they have now."""
        shards, final = self.manifest.state.shards, final_names(self.manifest.state.shards)
        if len(shards) > planned:
            raise damaged(self.manifest.folder, "more shards than planned")
        for shard in shards:
            for made, record in shard.items():
                name = final[made] if len(shards) == planned and not (self.folder / made).exists() else made
                if found := damage(self.folder, name, record):
                    raise damaged(self.folder / made, found)

    def keep_shard(self, model: nn.Module, names: Collection[str], folder: str) -> None:
        """Make a shard durable, and let go of the blocks that it holds, on the disk too.

        Args:
            model: the model.
            names: its tensors in the shard.
            folder: a folder in `folder` with the shard's files, and what is written along; it is emptied.
        """
        with self.manifest.held.subfolder(FINISHED) as finished:
            made = self._move_shard(finished, folder)
        held, state = {_parameter(name) for name in names}, self.manifest.state
        files = {block: self.blocks.path_of(block) for block, digest in state.blocks.items() if digest != SAVED}
        names_of = {block: names_in(path) for block, path in files.items()}
        inside = [block for block in files if held.issuperset(names_of[block])]
        self.manifest.update(shards=[*state.shards, made], blocks=state.blocks | dict.fromkeys(inside, SAVED))
        parameters = {_parameter(name): parameter for name, parameter in model.named_parameters()}
        for block in inside:
            for name in names_of[block]:
                _let_go(parameters[name])
            self.manifest.held.remove(files[block].name)

    def _move_shard(self, finished: HeldFolder, folder: str) -> dict[str, FileRecord]:
        made = {}
        with finished.subfolder(folder) as scratch:
            for name in scratch.names():
                new = f"{self.num_whole_shards:05d}-{name}" if name.endswith(".safetensors") else name
                scratch.flush_file(name)
                if new != name:
                    made[new] = scratch.record(name)
                scratch.rename(name, new, finished)
        finished.remove_empty_folder(folder)
        finished.flush()
        return made

    def name_shards(self) -> dict[str, FileRecord]:
        """Give the shards' files their final names, now that their number is known; their records. Safe to repeat."""
        shards, final = self.manifest.state.shards, final_names(self.manifest.state.shards)
        with self.manifest.held.subfolder(FINISHED) as finished:
            for made, name in final.items():
                if finished.is_file(made):
                    finished.rename(made, name)
            for name in finished.names():
                if _MADE.fullmatch(name):  # of a shard that a killed process did not record
                    finished.remove(name)
            finished.flush()
        return {final[made]: record for shard in shards for made, record in shard.items()}

    def publish(self, model: nn.Module, write: Callable[[], dict[str, FileRecord]]) -> None:
        """Let `write` complete the finished model in `folder`, and put it in OUT's place.

        Args:
            model: the model.
            write: returns the records of the finished model's files.

        Raises:
            SecateurError: the disk is full or not writable, or OUT may not be replaced; blocks and whole shards are
                kept, and so is what OUT held.
        """
        if distributed.is_main():
            self._write(write)
            put_in_place(self.manifest.held, self.out, self.manifest.state)
        else:
            for parameter in model.parameters():  # a file that is mapped keeps its space on the disk
                _let_go(parameter)
        distributed.barrier()

    def _write(self, write: Callable[[], dict[str, FileRecord]]) -> None:
        journal = self.manifest.held
        try:
            if not self.manifest.state.outcome:
                journal.remove_folder(FINISHED)
            with journal.subfolder(FINISHED) as finished:
                finished.remove_partial()
                files = write()
                for name in files:
                    finished.flush_file(name)
                finished.flush()
            journal.flush()
            self.manifest.update(files=files)
        except (OSError, SafetensorError) as error:
            raise SecateurError(f"{self.out} could not be saved ({error})") from error


def final_names(shards: Iterable[Collection[str]]) -> dict[str, str]:
    """Names of the finished model's weight files, as transformers gives them, by those of the shards' files."""
    made = [name for shard in shards for name in shard]
    stem = PACKED_STEM if any(f"-{PACKED_STEM}" in name for name in made) else DENSE_STEM
    return dict(zip(made, file_names(stem, len(made)), strict=True))


def _parameter(name: str) -> str:
    """Name of a tensor without `.weight`."""
    return name.removesuffix(".weight")


def _let_go(parameter: nn.Parameter) -> None:
    """Drop a parameter's content, and the mapping of its file."""
    parameter.data = parameter.data.new_empty(0)
