"""The journal's folder: locked while a run uses it, taken over from an earlier run, and removed when it is done."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.resume.kept import ORDER_FILE, OWN_WORDS_FILE
from secateur.resume.manifest import (
    MANIFEST,
    Manifest,
    RunManifest,
    differences,
    journal_of,
    progress_of,
    read_manifest,
    unfinished_error,
)
from secateur.resume.output_folder import check_may_replace, check_unchanged
from secateur.resume.publish import OUTCOME
from secateur.resume.put_in_place import FINISHED, REPLACED, bring_back, put_in_place
from secateur.runtime import distributed
from secateur.storage.held_folder import HeldFolder, make_folders

LOCK = "lock"
CONVERTED = r"converted-\d+"  # what a run that begins may have mapped already
_OURS = re.compile(
    rf"block-\d{{5,}}\.safetensors|allocation-\d+\.json|{CONVERTED}|reordered-\d+|{FINISHED}|{REPLACED}|"
    + "|".join(map(re.escape, (OUTCOME, OWN_WORDS_FILE, ORDER_FILE)))
)


@contextmanager
def locked_journal(out: Path) -> Iterator[HeldFolder | None]:
    """The journal of runs to `out`, which no other run may use within this context; None except on rank 0.

    Afterwards it is removed where the run is finished or nothing was done, with the folders that were made for it.

    Raises:
        SecateurError: another run holds the folder, or it can't be written.
    """
    if not distributed.is_main():
        distributed.barrier()
        yield None
        return
    journal, lock, made = _open(out)
    found = journal.is_file(MANIFEST)
    try:
        distributed.barrier()
        yield journal
    except BaseException as error:
        with suppress(SecateurError):  # the first error is the one that explains
            _leave(journal, lock, made, keep_replaces=found or not isinstance(error, Exception))
        raise
    _leave(journal, lock, made)


def _leave(journal: HeldFolder, lock: int, made: list[Path], keep_replaces: bool = False) -> None:
    """Unlock the journal; remove it where it is done, and the folders that were made for it where they are empty."""
    try:
        _remove_if_done(journal, keep_replaces)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    except OSError as error:
        raise SecateurError(f"{journal.path} is of no more use, but could not be removed ({error})") from error
    finally:
        os.close(lock)
        journal.close()


def _open(out: Path) -> tuple[HeldFolder, int, list[Path]]:
    """The journal, its lock, and the folders that were made for it."""
    path = journal_of(out)
    try:
        made = make_folders(out.parent)
        while True:
            if not path.is_dir():
                path.mkdir(exist_ok=True)  # another run may be as early
                with HeldFolder(out.parent) as parent:
                    parent.flush()
            try:
                journal = HeldFolder(path)
            except FileNotFoundError:  # its owner was done just now
                continue
            try:
                lock = journal.lock(LOCK)
            except OSError:
                still_there = journal.is_still_there()
                journal.close()
                if still_there:
                    raise
                continue
            if journal.is_still_there():  # its owner may have removed it, and was done
                return journal, lock, made
            os.close(lock)
            journal.close()
    except BlockingIOError:
        raise SecateurError(f"{out} is being written by another run: wait for it, or choose another folder") from None
    except OSError as error:
        raise SecateurError(f"{out} can't be written: {error.strerror} ({path})") from error


def take_over(journal: HeldFolder | None, out: Path, resume: bool, overwrite: bool) -> Manifest:
    """The manifest of the run to resume, empty where a new one begins.

    A model that an earlier process finished is put in its place in any case.

    Raises:
        SecateurError: the manifest is damaged, and may not be overwritten.
    """
    found: Manifest | None = None
    if journal is not None:
        try:
            journal.remove_partial()
            with HeldFolder(out.parent) as parent:
                bring_back(journal, parent, out)
            found = read_manifest(journal.path)
            if found.files:
                put_in_place(journal, out, found)
                forget(journal)
                found = None
        except OSError as error:
            raise SecateurError(f"{journal.path} can't be written ({error})") from error
        except SecateurError:
            if not overwrite:
                raise
            found = None
    found = distributed.broadcast_object(found)
    if found is not None and found.has_begun and not (resume or overwrite):
        raise unfinished_error(out, progress_of(found, out))
    return found if resume and found is not None else Manifest()


def check_out(journal: HeldFolder, out: Path, before: Manifest, overwrite: bool) -> Manifest:
    """Check what OUT holds, and return the manifest with the files that the run may replace.

    That is recorded before anything else, so a run that is killed while it loads is resumed without `overwrite`.

    Raises:
        SecateurError: OUT holds what may not be replaced, or the journal can't be written.
    """
    if before.has_begun and not overwrite:
        check_unchanged(out, before.replaces)
        return before
    state = replace(before, replaces=check_may_replace(out, overwrite))
    if state.replaces and not _holds_a_run(journal):
        _write(RunManifest(journal.path, state, journal))
    return state


def _holds_a_run(journal: HeldFolder) -> bool:
    """Whether there are blocks that a request which turns out to be wrong must not cost."""
    try:
        return bool(read_manifest(journal.path).identity)
    except SecateurError:  # it is damaged, and may be overwritten
        return False


def begin_run(
    journal: HeldFolder | None, out: Path, before: Manifest, identity: dict[str, Any], overwrite: bool
) -> RunManifest:
    """The manifest of a run that begins or is resumed; what lies there of another run is removed.

    Raises:
        SecateurError: the run to resume differs; the message names every difference.
    """
    state = before
    if journal is not None:
        state = _state_of(journal, out, before, json.loads(json.dumps(identity)), overwrite)
    manifest = RunManifest(journal_of(out), distributed.broadcast_object(state), journal)
    if journal is not None:
        _write(manifest)
    return manifest


def _write(manifest: RunManifest) -> None:
    try:
        manifest.update()
    except OSError as error:
        raise SecateurError(f"{manifest.folder} can't be written ({error})") from error


def _state_of(journal: HeldFolder, out: Path, before: Manifest, identity: dict[str, Any], overwrite: bool) -> Manifest:
    begun_by, resumed_by = (each.get("environment", {}).get("processes", 1) for each in (before.identity, identity))
    found = list(differences(before.identity, identity)) if before.identity else []
    found = [difference for difference in found if not difference.startswith("model name ")]  # the files decide
    if before.identity.get("calibration", {}).get("sha256") == identity["calibration"]["sha256"]:
        found = [difference for difference in found if not difference.startswith("calibration ")]
    if before.identity and begun_by != resumed_by:  # torchrun gives each process other threads than one alone has
        apart = ("environment processes ", "environment threads ")
        found = [difference for difference in found if not difference.startswith(apart)]
    if before.outcome:  # nothing is left to compute
        found = [difference for difference in found if not difference.startswith("environment ")]
    if found and not overwrite:
        raise SecateurError(
            f"{out} has an unfinished run that differs: {'; '.join(found)}. Resume it with what it began with, or "
            f"start again with ‹overwrite›"
        )
    if found or not before.identity:
        forget(journal, but=CONVERTED)
        return Manifest(identity=identity, replaces=before.replaces)
    notices = list(before.notices)
    if begun_by != resumed_by:
        notices.append(
            f"{begun_by} processes began this run and {resumed_by} resumed it: the model is that of an uninterrupted "
            f"run to the rounding of sums, not to the bit"
        )
    return replace(before, identity=identity, notices=notices)


def forget(journal: HeldFolder, but: str = "") -> None:
    """Remove what runs wrote to the journal, the manifest first. What is not ours stays.

    Args:
        journal: of the runs.
        but: a pattern of names that stay.

    Raises:
        SecateurError: the journal can't be written.
    """
    try:
        journal.remove_folder(MANIFEST)
        journal.flush()
        journal.remove_partial()
        for name in journal.names():
            if _OURS.fullmatch(name) and not re.fullmatch(but, name):
                journal.remove_folder(name)
    except OSError as error:
        raise SecateurError(f"{journal.path} can't be written ({error})") from error


def _remove_if_done(journal: HeldFolder, keep_replaces: bool) -> None:
    """Remove the journal of a run that is finished, or did nothing; `keep_replaces` keeps what it may replace."""
    try:
        manifest = read_manifest(journal.path)
    except SecateurError:  # the user decides
        return
    found = manifest.own_words or manifest.channel_order or manifest.allocation  # each may have taken hours
    if manifest.blocks or found or manifest.outcome or (manifest.replaces and (manifest.identity or keep_replaces)):
        return
    forget(journal)
    if journal.names() == [LOCK]:
        journal.remove(LOCK)
        with HeldFolder(journal.path.parent) as parent:
            parent.remove_empty_folder(journal.path.name)
            parent.flush()
