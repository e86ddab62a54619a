"""The journal of a run: every finished block is on disk before the next begins, so that a run that was cut off goes on.

`OUT/.secateur/` holds one file a block (its tensors, with its figures in the header) and one manifest. Files are
written and flushed first, and the manifest is replaced last: what it doesn't name never happened. The finished model is
made in the same folder, shard by shard. The file of a block goes as soon as a shard that holds it all is whole, so that
no disk has to hold a model of many blocks twice. It is moved to `OUT` when the manifest says that it is whole, and then
the journal goes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur import durable, parallel
from secateur.block_files import adopt, check_bits, names_in, opened
from secateur.lockstep import Lockstep
from secateur.manifest import FOLDER, MANIFEST, SAVED, Manifest, differences_of, read_manifest
from secateur.model import Block
from secateur.report import BlockFigures, BlockReport, MatrixReport
from secateur.residence import InMemory, Residence

LOCK, OUTCOME, FINISHED = "lock", "outcome.json", "finished"
LAST_MOVED = "config.json"  # without it a folder is no model, so none is half one


@dataclass(eq=False)
class Journal:
    """What a run has finished, as a store for the engine; made by `open_journal`.

    Where several processes share the run, the first alone writes, and the others read what it wrote.

    Args:
        overwrite: what lies here may be replaced by another run.
        manifest: what has happened so far; its seconds are those of the processes before this one.
        storage_of: from a parameter's name and its own dtype to the one it is saved in.
        residence: where the model's weights are.
    """

    folder: Path
    overwrite: bool = False
    manifest: Manifest = field(default_factory=Manifest)
    storage_of: Callable[[str, torch.dtype], torch.dtype] = lambda _name, own: own
    residence: Residence = field(default_factory=InMemory)
    started: float = field(default_factory=time.perf_counter)
    _done: set[str] = field(default_factory=set)  # blocks that this process is past

    def begin(self, identity: dict[str, Any]) -> None:
        """State what the run is; one that began otherwise is forgotten where it may be overwritten.

        Raises:
            ValueError: the run that began here was another one; every difference is named.
        """
        if parallel.is_first():
            self._begin(json.loads(json.dumps(identity)))
        self.manifest = parallel.from_first(self.manifest)

    def _begin(self, identity: dict[str, Any]) -> None:
        before = self.manifest.identity
        begun_by, go_on = (each.get("environment", {}).get("processes", 1) for each in (before, identity))
        differences = list(differences_of(before, identity)) if before else []
        if before and begun_by != go_on:  # torchrun gives each process other threads than one alone has
            apart = ("environment processes ", "environment threads ")
            differences = [difference for difference in differences if not difference.startswith(apart)]
        if self.manifest.outcome:  # nothing is left to compute
            differences = [difference for difference in differences if not difference.startswith("environment ")]
        if before and begun_by != go_on and not differences:
            self.manifest.notices.append(
                f"{begun_by} processes began this run and {go_on} go on with it: the model is that of an uninterrupted "
                f"run to the rounding of sums, not to the bit"
            )
        if differences and not self.overwrite:
            raise ValueError(
                f"{self.folder.parent} holds an unfinished run that differs: {'; '.join(differences)}. Go on with "
                f"what it began with, or start again with --overwrite"
            )
        if differences or not before:
            self._forget()
            there = sorted(path.name for path in self.folder.parent.iterdir() if path.is_file())
            self.manifest = Manifest(replaces=there)
        self.manifest.identity = identity

    def _forget(self) -> None:
        """Remove what an earlier run wrote here, the manifest first."""
        manifest = self.folder / MANIFEST
        try:
            if manifest.exists():
                manifest.unlink()
                durable.flush(self.folder)
            shutil.rmtree(self.folder / FINISHED, ignore_errors=True)
            for path in (*self.folder.glob("block-*.safetensors"), self.folder / OUTCOME):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} can't be written ({error})") from error

    @contextmanager
    def using(self, block: Block) -> Iterator[None]:
        """Copies of the block's weights; once the run has passed a block, those of its file."""
        with self.residence.using(block):
            yield
        if block.name in self._done:
            adopt(self._path(block.name), _parameters(block))

    def running(self, model: nn.Module) -> AbstractContextManager[Lockstep]:
        """As the residence says."""
        return self.residence.running(model)

    def finished(self, block: Block) -> BlockFigures | None:
        """The figures of a block that an earlier process finished.

        Raises:
            ValueError: a damaged file.
        """
        if block.name not in self.manifest.blocks:
            return None
        path = self._path(block.name)
        check_bits(path, self.manifest.blocks[block.name])
        with opened(path) as file:
            figures = json.loads(file.metadata()["figures"])
            refit = figures["refit"]
            matrices = [MatrixReport(**matrix) for matrix in figures["matrices"]]
            self._done.add(block.name)
            return BlockFigures(matrices, None if refit is None else BlockReport(**refit), figures["chunk"])

    def _path(self, block: str) -> Path:
        return self.folder / f"block-{list(self.manifest.blocks).index(block):05d}.safetensors"

    def commit(self, block: Block, figures: BlockFigures) -> None:
        """Make a finished block durable.

        Raises:
            ValueError: the disk is full or not writable; the blocks before it are kept.
        """
        if parallel.is_first():
            self._write_block(block, figures)
        self.manifest.blocks = parallel.from_first(self.manifest.blocks)
        self._done.add(block.name)

    def _write_block(self, block: Block, figures: BlockFigures) -> None:
        try:
            self.manifest.blocks[block.name] = "being written"
            path = self._path(block.name)
            save_file(self._tensors(block), path, metadata={"figures": json.dumps(asdict(figures))})
            durable.flush(path)
            self.manifest.blocks[block.name] = durable.digest_of(path)
            self._write_manifest()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{block.name} could not be written to {self.folder} ({error})") from error

    def outcome(self) -> dict[str, Any] | None:
        """What `keep_outcome` was given by this or an earlier process; None while there are blocks to prune.

        Raises:
            ValueError: a damaged file.
        """
        if not self.manifest.outcome:
            return None
        path = self.folder / OUTCOME
        check_bits(path, self.manifest.outcome)
        return json.loads(path.read_text(encoding="utf-8"))

    def keep_outcome(self, outcome: dict[str, Any]) -> None:
        """State that every block is finished: a run that goes on has only to save.

        Args:
            outcome: plain data, among it the list `shards` of the tensors that will be in each.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = self.folder / OUTCOME
        durable.write_whole(path, json.dumps(outcome) + "\n")
        self.manifest.outcome = durable.digest_of(path)
        self._write_manifest()

    def restore(self, model: nn.Module, pruned: Collection[str], shards: Sequence[Collection[str]]) -> None:
        """Give the model the blocks that other processes than this one finished, but for those in whole shards.

        Args:
            pruned: the matrices (or stacks of experts) that the run has pruned.
            shards: the model's tensors in each, as planned.

        Raises:
            ValueError: a damaged block or shard, or a block of which neither has the weights.
        """
        for files in self.manifest.shards:
            for name, digest in files.items():
                check_bits(self.folder / FINISHED / name, digest)
        held = {_matrix_of(name) for shard in shards[: len(self.manifest.shards)] for name in shard}
        parameters = {_matrix_of(name): parameter for name, parameter in model.named_parameters()}
        for block, digest in self.manifest.blocks.items():
            path = self._path(block)
            if digest == SAVED:
                path.unlink(missing_ok=True)
                continue
            names = names_in(path)
            if block not in self._done:
                check_bits(path, digest)
                adopt(path, {name: parameters[name] for name in names if name in parameters})
            held.update(names)
        if lost := sorted({*pruned} - held):
            raise ValueError(f"{self.folder} is damaged ({lost[0]} is in no file): start again with --overwrite")

    def keep_shard(self, model: nn.Module, names: Collection[str], paths: Collection[Path]) -> None:
        """Make a shard of the finished model durable, and let go of the blocks that it holds, on the disk too.

        Args:
            names: the model's tensors in it.
            paths: its files, in the folder that `finish` gives.
        """
        for path in paths:
            durable.flush(path)
        durable.flush(self.folder / FINISHED)
        held = {_matrix_of(name) for name in names}
        files = {block: self._path(block) for block, digest in self.manifest.blocks.items() if digest != SAVED}
        inside = {block: path for block, path in files.items() if held.issuperset(names_in(path))}
        weights = [path for path in paths if path.suffix == ".safetensors"]
        self.manifest.shards.append({path.name: durable.digest_of(path) for path in weights})
        self.manifest.blocks |= dict.fromkeys(inside, SAVED)
        self._write_manifest()
        parameters = {_matrix_of(name): parameter for name, parameter in model.named_parameters()}
        for path in inside.values():
            for name in names_in(path):
                _let_go(parameters[name])
            path.unlink()

    def finish(self, model: nn.Module, write: Callable[[Path], dict[str, str]]) -> None:
        """Move what `write` makes of the model in a folder to `OUT`, which then holds nothing else.

        Args:
            write: returns the name in `OUT` of each file in the folder, where it finds the shards that are whole.

        Raises:
            ValueError: the disk is full or not writable; the blocks and whole shards are kept, and so is what `OUT`
                held, unless the model was whole and only the move was stopped: `publish` then completes it.
        """
        if parallel.is_first():
            self._write_model(write)
        else:
            for parameter in model.parameters():  # a file that is mapped keeps its place on the disk
                _let_go(parameter)
        parallel.wait()

    def _write_model(self, write: Callable[[Path], dict[str, str]]) -> None:
        made = self.folder / FINISHED
        try:
            if not self.manifest.outcome:
                shutil.rmtree(made, ignore_errors=True)
            made.mkdir(exist_ok=True)
            files = write(made)
            for name in files:
                durable.flush(made / name)
            durable.flush(made)
            self.manifest.files = files
            self._write_manifest()
            self.publish()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder.parent} could not be saved ({error})") from error

    def publish(self) -> None:
        """Move the finished model's files to `OUT` in place of those that it held. Safe to repeat.

        Raises:
            ValueError: a file of the finished model is gone, or the disk is not writable.
        """
        try:
            self._move()
        except OSError as error:
            raise ValueError(f"{self.folder.parent} could not be saved ({error})") from error

    def _move(self) -> None:
        made, out, files = self.folder / FINISHED, self.folder.parent, self.manifest.files
        if gone := [name for here, name in files.items() if not (made / here).exists() and not (out / name).exists()]:
            raise ValueError(f"{self.folder} is damaged ({gone[0]} is gone): start again with --overwrite")
        if (made / LAST_MOVED).exists():
            (out / LAST_MOVED).unlink(missing_ok=True)
            durable.flush(out)
        for name in {*self.manifest.replaces} - {*files.values()}:
            (out / name).unlink(missing_ok=True)
        for here, name in sorted(files.items(), key=lambda file: file[1] == LAST_MOVED):
            if (made / here).exists():
                if name == LAST_MOVED:
                    durable.flush(out)
                (made / here).replace(out / name)
        durable.flush(out)

    def close(self) -> None:
        """Remove the journal where its run is finished, or nothing was; the manifest goes after what it names."""
        files = self.manifest.files
        published = files and not any((self.folder / FINISHED / name).exists() for name in files)
        if (self.folder / MANIFEST).exists() and not published:
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (MANIFEST, LOCK):
                path.unlink()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _write_manifest(self) -> None:
        replace(self.manifest, seconds=self.spent).write(self.folder)

    @property
    def spent(self) -> float:
        """Seconds of work so far, of every process that took part."""
        return self.manifest.seconds + time.perf_counter() - self.started

    def _tensors(self, block: Block) -> dict[str, Tensor]:
        """The block's pruned parameters, in the narrower of the dtypes that they are held and saved in."""
        tensors = {}
        for name, parameter in _parameters(block).items():
            own, saved = parameter.dtype, self.storage_of(name, parameter.dtype)
            dtype = saved if torch.finfo(saved).bits < torch.finfo(own).bits else own
            tensors[name] = parameter.data.to(device="cpu", dtype=dtype).contiguous()
        return tensors


@contextmanager
def open_journal(out: Path, resume: bool, overwrite: bool = False) -> Iterator[Journal]:
    """The journal of a run that writes to `out`, which nobody else may meanwhile.

    Without `resume` it starts empty, but what lies there is only replaced when the new run begins. Afterwards it is
    gone where the run is finished or nothing was, and with it the folders that were made for it.

    Raises:
        ValueError: another run holds the folder, it can't be written, or its manifest is damaged.
    """
    folder = out / FOLDER
    if not parallel.is_first():
        parallel.wait()
        yield Journal(folder, overwrite)
        return
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link: remove it, or choose another folder")
    made = [path for path in (folder, out, *out.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{out} is being written by another run: wait for it, or choose another folder") from None
    except OSError as error:
        raise ValueError(f"{out} can't be written: {error.strerror} ({error.filename})") from error
    journal = Journal(folder, overwrite)
    try:
        _take_over(journal, resume)
        parallel.wait()
        yield journal
    finally:
        try:
            journal.close()
        finally:
            lock.release()
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _take_over(journal: Journal, resume: bool) -> None:
    """Read what an earlier process left; a model that it had finished is brought to its place whatever comes next."""
    try:
        manifest = read_manifest(journal.folder)
        if manifest.files:
            Journal(journal.folder, manifest=manifest).publish()
    except ValueError:
        if not journal.overwrite:
            raise
        return
    if resume:
        journal.manifest = manifest


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """The parameters that hold the block's pruned matrices, each once."""
    return {matrix.name.partition("[")[0]: matrix.parameter for matrix in block.matrices}


def _matrix_of(name: str) -> str:
    """The name of the matrix (or stack of experts) that a tensor of the model holds, if it does."""
    return name.removesuffix(".weight")


def _let_go(parameter: nn.Parameter) -> None:
    """Drop a parameter's content, and with it what is mapped for it."""
    parameter.data = parameter.data.new_empty(0)
