"""Folders that are written whole: next to their place, and put there at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.errors import SecateurError
from secateur.storage.held_folder import HeldFolder, make_folders
from secateur.storage.paths import real_path


def check_new_folder(folder: Path, out: Path) -> None:
    """Check that `out` is a new or empty folder, not the working folder, and not in one that is read.

    Raises:
        SecateurError: it is not.
    """
    place = real_path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SecateurError(f"{out} exists and is not an empty folder: choose another one")
    if place == real_path(Path.cwd()):
        raise SecateurError(f"{out} is the working folder, which must stay: choose another folder")
    if real_path(folder) in (place, *place.parents):
        raise SecateurError(f"{out} lies in {folder}, which is read: choose another folder")


def publish_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder next to `out`, and put it there when it is whole.

    Raises:
        SecateurError: `out` can't be written, or something came to it meanwhile.
    """
    place = real_path(out)
    try:
        make_folders(place.parent)
        with HeldFolder(place.parent) as parent:
            partial_name = parent.new_name()
            try:
                with parent.subfolder(partial_name) as folder:
                    write(folder.path)
                    for name in folder.names():
                        folder.flush_file(name)
                    folder.flush()
                parent.rename(partial_name, place.name)
                parent.flush()
            finally:
                parent.remove_folder(partial_name)
    except OSError as error:
        raise SecateurError(f"{out} could not be written ({error.strerror or error})") from error
