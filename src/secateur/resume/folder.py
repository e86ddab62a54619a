"""The journal's folder: locked while a run uses it, taken over from an earlier run, and removed when it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import SecateurError
from secateur.resume.manifest import FOLDER, MANIFEST, Manifest, RunManifest, differences, read_manifest
from secateur.resume.publish import FINISHED, OUTCOME, move_finished_files
from secateur.runtime import distributed
from secateur.runtime.atomic_files import fsync

LOCK = "lock"


@contextmanager
def locked_journal(out: Path) -> Iterator[Path]:
    """The journal's folder, which no other run may use within this context.

    Afterwards it is removed where the run is finished or nothing was done, with the folders that were made for it.

    Raises:
        SecateurError: another run holds the folder, or it can't be written.
    """
    folder = out / FOLDER
    if not distributed.is_main():
        distributed.barrier()
        yield folder
        return
    if folder.is_symlink():
        raise SecateurError(f"{folder} is a link: remove it, or choose another folder")
    made = [path for path in (folder, out, *out.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        raise SecateurError(f"{out} is being written by another run: wait for it, or choose another folder") from None
    except OSError as error:
        raise SecateurError(f"{out} can't be written: {error.strerror} ({error.filename})") from error
    try:
        distributed.barrier()
        yield folder
    finally:
        try:
            _remove_if_done(folder)
        finally:
            lock.release()
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def take_over(folder: Path, resume: bool, overwrite: bool) -> Manifest:
    """The manifest of the run to resume, empty where a new one begins.

    A model that an earlier process finished is moved to its place in any case.

    Raises:
        SecateurError: the manifest is damaged, and may not be overwritten.
    """
    found: Manifest | None = None
    if distributed.is_main():
        try:
            found = read_manifest(folder)
            if found.files:
                move_finished_files(folder, found)
        except SecateurError:
            if not overwrite:
                raise
            found = None
    found = distributed.broadcast_object(found)
    return found if resume and found is not None else Manifest()


def begin_run(folder: Path, before: Manifest, identity: dict[str, Any], overwrite: bool) -> RunManifest:
    """The manifest of a run that begins or is resumed; what lies there of another run is removed.

    Raises:
        SecateurError: the run to resume differs; the message names every difference.
    """
    state = before
    if distributed.is_main():
        state = _state_of(folder, before, json.loads(json.dumps(identity)), overwrite)
    return RunManifest(folder, distributed.broadcast_object(state))


def _state_of(folder: Path, before: Manifest, identity: dict[str, Any], overwrite: bool) -> Manifest:
    begun_by, resumed_by = (each.get("environment", {}).get("processes", 1) for each in (before.identity, identity))
    found = list(differences(before.identity, identity)) if before.identity else []
    if before.identity and begun_by != resumed_by:  # torchrun gives each process other threads than one alone has
        apart = ("environment processes ", "environment threads ")
        found = [difference for difference in found if not difference.startswith(apart)]
    if before.outcome:  # nothing is left to compute
        found = [difference for difference in found if not difference.startswith("environment ")]
    if found and not overwrite:
        raise SecateurError(
            f"{folder.parent} holds an unfinished run that differs: {'; '.join(found)}. Resume it with what it began "
            f"with, or start again with ‹overwrite›"
        )
    if found or not before.identity:
        _forget(folder)
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_file())
        return Manifest(identity=identity, replaces=there)
    notices = list(before.notices)
    if begun_by != resumed_by:
        notices.append(
            f"{begun_by} processes began this run and {resumed_by} resumed it: the model is that of an uninterrupted "
            f"run to the rounding of sums, not to the bit"
        )
    return Manifest(**{**vars(before), "identity": identity, "notices": notices})


def _forget(folder: Path) -> None:
    """Remove what an earlier run wrote, the manifest first."""
    manifest = folder / MANIFEST
    try:
        if manifest.exists():
            manifest.unlink()
            fsync(folder)
        shutil.rmtree(folder / FINISHED, ignore_errors=True)
        for path in (*folder.glob("block-*.safetensors"), folder / OUTCOME):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise SecateurError(f"{folder} can't be written ({error})") from error


def _remove_if_done(folder: Path) -> None:
    """Remove the journal of a run that is finished, or did nothing; the manifest goes after what it names."""
    if (folder / MANIFEST).exists():
        try:
            files = read_manifest(folder).files
        except SecateurError:  # the user decides
            return
        if not files or any((folder / FINISHED / name).exists() for name in files):
            return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (MANIFEST, LOCK):
            path.unlink()
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
