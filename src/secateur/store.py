"""The journal of a run: every finished block is on disk before the next begins, so that a run that was cut off goes on.

`OUT/.secateur/` holds one file a block (its tensors, with its figures in the header) and one manifest. Files are
written and flushed first, and the manifest is replaced last: what it doesn't name never happened. The finished model is
made in the same folder and moved to `OUT` when the manifest says that it is whole; then the journal goes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur import parallel
from secateur.model import Block
from secateur.report import BlockFigures, BlockReport, MatrixReport
from secateur.residence import InMemory, Residence

FOLDER = ".secateur"
MANIFEST, LOCK, FINISHED = "manifest.json", "lock", "finished"
LAST_MOVED = "config.json"  # without it a folder is no model, so none is half one


@dataclass(eq=False)
class Journal:
    """What a run has finished, as a store for the engine; made by `open_journal`.

    Where several processes share the run, the first alone writes, and the others read what it wrote.

    Args:
        overwrite: what lies here may be replaced by another run.
        identity: what a run that goes on must share with the one that began, as nested plain data.
        blocks: SHA-256 of each finished block's file, by the block's name; the files are numbered in this order.
        seconds: time spent by the processes before this one.
        replaces: the files that `OUT` held when the run began.
        files: of the finished model, once that is whole.
        storage_of: from a parameter's name and its own dtype to the one it is saved in.
        residence: where the model's weights are.
        notices: what the user should know of how the run went on.
    """

    folder: Path
    overwrite: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    replaces: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    storage_of: Callable[[str, torch.dtype], torch.dtype] = lambda _name, own: own
    residence: Residence = field(default_factory=InMemory)
    notices: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    _done: set[str] = field(default_factory=set)  # blocks that this process is past

    def begin(self, identity: dict[str, Any]) -> None:
        """State what the run is; one that began otherwise is forgotten where it may be overwritten.

        Raises:
            ValueError: the run that began here was another one; every difference is named.
        """
        if parallel.is_first():
            self._begin(json.loads(json.dumps(identity)))
        state = (self.identity, self.blocks, self.seconds, self.notices)
        self.identity, self.blocks, self.seconds, self.notices = parallel.from_first(state)

    def _begin(self, identity: dict[str, Any]) -> None:
        begun_by, go_on = (each.get("environment", {}).get("processes", 1) for each in (self.identity, identity))
        differences = list(_differences(self.identity, identity)) if self.identity else []
        if self.identity and begun_by != go_on:  # torchrun gives each process other threads than one alone has
            apart = ("environment processes ", "environment threads ")
            differences = [difference for difference in differences if not difference.startswith(apart)]
        if self.identity and begun_by != go_on and not differences:
            self.notices.append(
                f"{begun_by} processes began this run and {go_on} go on with it: the model is that of an uninterrupted "
                f"run to the rounding of sums, not to the bit"
            )
        if differences and not self.overwrite:
            raise ValueError(
                f"{self.folder.parent} holds an unfinished run that differs: {'; '.join(differences)}. Go on with "
                f"what it began with, or start again with --overwrite"
            )
        if differences or not self.identity:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self.blocks, self.files, self.seconds, self.notices = {}, [], 0.0, []
            self.replaces = sorted(path.name for path in self.folder.parent.iterdir() if path.is_file())
        self.identity = identity

    @contextmanager
    def using(self, block: Block) -> Iterator[None]:
        """Copies of the block's weights; once the run has passed a block, those of its file."""
        with self.residence.using(block):
            yield
        if block.name in self._done:
            self._adopt(block)

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """As the residence says."""
        return self.residence.running(model)

    def finished(self, block: Block) -> BlockFigures | None:
        """The figures of a block that an earlier process finished.

        Raises:
            ValueError: a damaged file.
        """
        if block.name not in self.blocks:
            return None
        if digest_of(self._path(block)) != self.blocks[block.name]:
            raise ValueError(f"{self._path(block)} is damaged (its bits changed): start again with --overwrite")
        with self._file(block) as file:
            figures = json.loads(file.metadata()["figures"])
            refit = figures["refit"]
            matrices = [MatrixReport(**matrix) for matrix in figures["matrices"]]
            self._done.add(block.name)
            return BlockFigures(matrices, None if refit is None else BlockReport(**refit), figures["chunk"])

    def _adopt(self, block: Block) -> None:
        """Let the block's parameters be those of its file, mapped.

        Raises:
            ValueError: a file that is damaged or doesn't fit the block.
        """
        parameters = _parameters(block)
        with self._file(block) as file:
            held = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in held}
            if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
                raise KeyError(f"it doesn't hold the matrices of {block.name}")
            for name, parameter in parameters.items():
                parameter.data = file.get_tensor(name)

    def _path(self, block: Block) -> Path:
        return self.folder / f"block-{list(self.blocks).index(block.name):05d}.safetensors"

    @contextmanager
    def _file(self, block: Block) -> Iterator[Any]:
        path = self._path(block)
        if not parallel.is_first() and not path.exists():
            raise ValueError(f"{path} is not here: OUT must lie on a disk that all processes share")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): start again with --overwrite") from error

    def commit(self, block: Block, figures: BlockFigures) -> None:
        """Make a finished block durable.

        Raises:
            ValueError: the disk is full or not writable; the blocks before it are kept.
        """
        if parallel.is_first():
            self._write_block(block, figures)
        self.blocks = parallel.from_first(self.blocks)
        self._done.add(block.name)

    def _write_block(self, block: Block, figures: BlockFigures) -> None:
        try:
            self.blocks[block.name] = ""
            path = self._path(block)
            save_file(self._tensors(block), path, metadata={"figures": json.dumps(asdict(figures))})
            _flush(path)
            self.blocks[block.name] = digest_of(path)
            self._write_manifest()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{block.name} could not be written to {self.folder} ({error})") from error

    def finish(self, write: Callable[[Path], None]) -> None:
        """Move the model that `write` makes in a folder to `OUT`, which then holds nothing else.

        Raises:
            ValueError: the disk is full or not writable; the blocks are kept, and so is what `OUT` held, unless the
                model was whole and only the move was stopped: `publish` then completes it.
        """
        if parallel.is_first():
            self._write_model(write)
        parallel.wait()

    def _write_model(self, write: Callable[[Path], None]) -> None:
        made = self.folder / FINISHED
        try:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            write(made)
            for path in made.iterdir():
                _flush(path)
            _flush(made)
            self.files = sorted(path.name for path in made.iterdir())
            self._write_manifest()
            self.publish()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder.parent} could not be saved ({error})") from error

    def publish(self) -> None:
        """Move the finished model's files to `OUT` in place of those that it held. Safe to repeat.

        Raises:
            ValueError: a file of the finished model is gone.
        """
        made, out = self.folder / FINISHED, self.folder.parent
        if gone := [name for name in self.files if not (made / name).exists() and not (out / name).exists()]:
            raise ValueError(f"{self.folder} is damaged ({gone[0]} is gone): start again with --overwrite")
        if (made / LAST_MOVED).exists():
            (out / LAST_MOVED).unlink(missing_ok=True)
            _flush(out)
        for name in {*self.replaces} - {*self.files}:
            (out / name).unlink(missing_ok=True)
        for name in sorted(self.files, key=lambda name: name == LAST_MOVED):
            if (made / name).exists():
                if name == LAST_MOVED:
                    _flush(out)
                (made / name).replace(out / name)
        _flush(out)

    def close(self) -> None:
        """Remove the journal where its run is finished, or nothing was; the manifest goes after what it names."""
        published = self.files and not any((self.folder / FINISHED / name).exists() for name in self.files)
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
        manifest = {
            "identity": self.identity,
            "blocks": self.blocks,
            "seconds": self.spent,
            "replaces": self.replaces,
            "files": self.files,
            "notices": self.notices,
        }
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    @property
    def spent(self) -> float:
        """Seconds of work so far, of every process that took part."""
        return self.seconds + time.perf_counter() - self.started

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
    earlier = Journal(journal.folder)
    try:
        _read_manifest(earlier)
        if earlier.files:
            earlier.publish()
    except ValueError:
        if not journal.overwrite:
            raise
        return
    if resume:
        for name in ("identity", "blocks", "seconds", "replaces", "files", "notices"):
            setattr(journal, name, getattr(earlier, name))


class Unfinished(NamedTuple):
    """How far a run has come, in words, and the files that it replaces or writes."""

    progress: str
    files: set[str]


def unfinished(out: Path) -> Unfinished | None:
    """The unfinished run that `out` holds, if it holds one."""
    if not (out / FOLDER / MANIFEST).is_file():
        return None
    journal = Journal(out / FOLDER)
    try:
        _read_manifest(journal)
    except ValueError:  # whoever goes on with it is told why
        return Unfinished(f"a damaged journal is in {out / FOLDER}", set())
    return Unfinished(
        f"{len(journal.blocks)} finished blocks are in {out / FOLDER}", {*journal.replaces, *journal.files}
    )


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(journal: Journal) -> None:
    """Take over what an earlier process wrote, if it wrote anything."""
    path = journal.folder / MANIFEST
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        journal.identity, journal.seconds = dict(found["identity"]), float(found["seconds"])
        journal.blocks = {str(block): str(digest) for block, digest in found["blocks"].items()}
        journal.replaces, journal.files = ([str(name) for name in found[key]] for key in ("replaces", "files"))
        journal.notices = [str(notice) for notice in found["notices"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): start again with --overwrite") from error
    plain = re.compile(r"[^/\\]*[^/\\.][^/\\]*")
    if foreign := [name for name in (*journal.files, *journal.replaces) if not plain.fullmatch(name)]:
        raise ValueError(f"{path} names {foreign[0]!r}, which is no plain file name: start again with --overwrite")


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """The parameters that hold the block's pruned matrices, each once."""
    return {matrix.name.partition("[")[0]: matrix.parameter for matrix in block.matrices}


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name: before, now ...` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, and wait until it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
