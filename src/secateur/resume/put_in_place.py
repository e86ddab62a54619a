"""The finished model takes the place of OUT in one step. OUT is the earlier model, or the new one, and nothing between.

Where the system can't exchange two folders, OUT is away for a moment; a resumed run then puts the model in its place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from secateur.errors import SecateurError
from secateur.resume.manifest import MANIFEST, Manifest, damaged
from secateur.resume.output_folder import check_unchanged
from secateur.runtime.messages import say
from secateur.storage.file_records import damage, first_damage
from secateur.storage.held_folder import HeldFolder

FINISHED, REPLACED = "finished", "replaced"


def put_in_place(journal: HeldFolder, out: Path, manifest: Manifest) -> None:
    """Verify the finished model, put it in OUT's place, and remove what OUT was. Safe to repeat.

    Raises:
        SecateurError: a damaged file, something in OUT that the run may not replace, or a disk that can't be written.
            OUT is then as it was.

    Cost: one read of the finished model, two of what OUT was.
    """
    try:
        with HeldFolder(out.parent) as parent:
            if not _is_in_place(out, manifest):
                _verify(journal, manifest)
                check_unchanged(out, manifest.replaces)
                _switch(journal, parent, out)
            for name in (FINISHED, REPLACED):
                _remove_replaced(journal, name, parent, out, manifest)
            journal.remove(MANIFEST)  # what is left of the journal is of no use
            journal.flush()
    except OSError as error:
        raise SecateurError(f"{out} could not be saved ({error})") from error


def bring_back(journal: HeldFolder, parent: HeldFolder, out: Path) -> None:
    """Bring back what OUT was, where a killed process had moved it away and put nothing in its place."""
    is_away = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    if journal.is_folder(REPLACED) and is_away:
        journal.rename(REPLACED, out.name, parent)
        parent.flush()


def _is_in_place(out: Path, manifest: Manifest) -> bool:
    """Whether OUT is the finished model. The user may have added a file since."""
    return first_damage(out, manifest.files) is None


def _verify(journal: HeldFolder, manifest: Manifest) -> None:
    if not journal.is_folder(FINISHED):
        raise SecateurError(f"{journal.path / FINISHED} is gone: start again with ‹overwrite›")
    with journal.subfolder(FINISHED) as finished:
        extra = [name for name in finished.names() if name not in manifest.files]
    found = first_damage(journal.path / FINISHED, manifest.files)
    if found or extra:
        raise damaged(journal.path, found or f"{extra[0]} is not recorded")


def _switch(journal: HeldFolder, parent: HeldFolder, out: Path) -> None:
    mode = stat.S_IMODE(out.stat().st_mode) if out.is_dir() else None
    exchanged = False
    if out.is_dir() and any(out.iterdir()):
        exchanged = journal.exchange(FINISHED, parent, out.name)
        if not exchanged:
            parent.rename(out.name, REPLACED, journal)
    if not exchanged:
        try:
            journal.rename(FINISHED, out.name, parent)  # in place of an empty folder, too
        except OSError:
            bring_back(journal, parent, out)
            raise
    if mode is not None:
        out.chmod(mode)
    parent.flush()
    journal.flush()


def _remove_replaced(journal: HeldFolder, name: str, parent: HeldFolder, out: Path, manifest: Manifest) -> None:
    """Remove the recorded files of what OUT was; what came to it at the last moment is kept next to OUT."""
    if not journal.is_folder(name):
        return
    with journal.subfolder(name) as replaced:
        for file, record in manifest.replaces.items():
            if damage(replaced.path, file, record) is None:
                replaced.remove(file)
    if not journal.remove_empty_folder(name):
        kept = out.with_name(f"{out.name}.kept-{os.urandom(4).hex()}")
        journal.rename(name, kept.name, parent)
        parent.flush()
        say(f"secateur: files that came to {out} while it was replaced are in {kept}")
