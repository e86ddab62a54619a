"""What a run may replace: the files of a checkpoint, and nothing else that lies in the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from secateur.errors import SecateurError
from secateur.reporting.report import read_metadata
from secateur.resume.manifest import journal_of
from secateur.storage.checkpoint_files import CHECKPOINT_FILES, METADATA, WEIGHT_FILES
from secateur.storage.file_records import FileRecord, Records, damage, record_of
from secateur.storage.json_files import read_json
from secateur.storage.paths import real_path, user_path


def check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """Check that nothing that a run reads lies where it writes.

    Args:
        out: an absolute path.
        inputs: files and folders that the run reads, with the files that links in such a folder lead to.

    Raises:
        SecateurError: something does.
    """
    ours = (out, journal_of(out))  # may lie in an input's folder, where an earlier process has put them
    read = [*inputs, Path.cwd()]
    entries = [entry for folder in inputs if folder.is_dir() for entry in folder.iterdir()]
    read += [entry for entry in entries if entry.is_symlink() or real_path(entry) not in ours]
    for kept in read:
        found = real_path(kept)
        for place in ours:
            if place == found or place in found.parents:
                raise SecateurError(f"{place} is or holds {kept}, which must stay: write to another folder")


def check_outside_model(out: Path, model: str) -> None:
    """Check that `out` is not the model's folder, nor in it, where `model` names a folder.

    Raises:
        SecateurError: it is.
    """
    named = user_path(model)
    folder, place = real_path(named), real_path(out)
    if folder.is_dir() and folder in (place, *place.parents):
        raise SecateurError(f"{out} lies in the model's folder {named}: write to a folder outside of it")


def check_place(out: Path) -> None:
    """Check that a folder can be made at `out`. Writes nothing.

    Raises:
        SecateurError: it can't.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise SecateurError(f"{out} is a file: give a folder to write to")
    if out.is_dir() and not os.access(out, os.W_OK | os.X_OK):
        raise SecateurError(f"{out} can't be replaced: it is not writable")
    if out == out.parent or out.is_mount():
        raise SecateurError(
            f"{out} is where a disk is mounted: the finished model takes its place by a rename, so name a folder in it"
        )
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise SecateurError(f"{out} can't be written: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SecateurError(f"{out} can't be written: {above} is not writable, and a run works there, next to OUT")


def check_may_replace(out: Path, overwrite: bool) -> dict[str, FileRecord]:
    """The records of what `out` holds, which a run may replace. Cost: one read of them.

    Raises:
        SecateurError: it may not.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return {}
    if not overwrite:
        raise SecateurError(f"{out} exists and is not empty: choose another folder, or pass ‹overwrite› to replace it")
    recorded = recorded_files(out)
    if not recorded and not _is_checkpoint(out):
        raise SecateurError(
            f"{out} holds neither {METADATA} nor config.json with weights, so it is not a model, and is not overwritten"
        )
    for path in sorted(out.iterdir()):
        if why := _why_foreign(path, recorded):
            raise SecateurError(f"{out} holds {path.name}, {why}: it is not overwritten. Move it, or choose another")
    return {path.name: record_of(path) for path in sorted(out.iterdir())}


def recorded_files(out: Path) -> Records:
    """The files that `secateur.json` records; none where there is no such file, or a damaged one."""
    try:
        return read_metadata(out).files if (out / METADATA).is_file() else {}
    except SecateurError:
        return {}


def _is_checkpoint(out: Path) -> bool:
    if not any(fnmatchcase(path.name, name) for path in out.iterdir() for name in WEIGHT_FILES):
        return False
    try:
        config = read_json(out / "config.json")
    except SecateurError:
        return False
    return bool(config.get("model_type") or config.get("architectures"))


def _why_foreign(path: Path, recorded: Records) -> str | None:
    """Why a file is not one that a run may replace."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return "a folder, as no checkpoint of ours does"
    if not stat.S_ISREG(mode):
        return "a link or another special file"
    if any(fnmatchcase(path.name, name) for name in CHECKPOINT_FILES):
        return None
    if path.name not in recorded:
        return "which is not a file of a checkpoint"
    return (
        None if damage(path.parent, path.name, recorded[path.name]) is None else "which was changed since it was saved"
    )


def check_unchanged(out: Path, replaces: Records) -> None:
    """Check that `out` holds what the run may replace, and nothing else. Cost: two reads of it at most.

    Raises:
        SecateurError: something else is there, or a file was changed.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.is_symlink() or (os.path.lexists(out) and not out.is_dir()):
        raise SecateurError(f"{out} is not a folder any more: move it, then go on with ‹resume›")
    recorded = recorded_files(out)
    for name in names:
        if name not in replaces:
            raise SecateurError(f"{out} holds {name}, which was not there when the run began: move it, then ‹resume›")
        if why := _why_foreign(out / name, recorded):  # whatever the journal says
            raise SecateurError(f"{out} holds {name}, {why}: move it, then ‹resume›")
        if found := damage(out, name, replaces[name]):
            raise SecateurError(f"{found}, since the run began: move it, then ‹resume›")
