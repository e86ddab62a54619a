"""The cache of models that were made from other files: each with its digests, which every use verifies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from platformdirs import user_cache_path

from secateur.errors import SecateurError
from secateur.runtime.messages import say
from secateur.storage.file_records import FileRecord, first_damage, read_records
from secateur.storage.held_folder import HeldFolder, make_folders
from secateur.storage.json_files import is_sealed, read_json, sealed
from secateur.storage.paths import real_path, user_path

DIGESTS, LOCK = ".digests.json", ".lock"


def cache_folder() -> Path:
    """Where converted models are kept: $SECATEUR_CACHE, or the user's cache folder."""
    named = os.environ.get("SECATEUR_CACHE")
    return real_path(user_path(named) if named else user_cache_path("secateur"))


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of a model in the cache: made where there is none, and again where it is damaged.

    Args:
        name: of the folder.
        make: writes the model to an empty folder.

    Raises:
        SecateurError: the cache can't be written, or what `make` raises.

    Cost: one read of the model.
    """
    models = cache_folder() / "models"
    if _damage(models / name) is None:
        return models / name
    try:
        make_folders(models)
        with HeldFolder(models) as held:
            lock = held.lock(LOCK, wait=True)
            try:
                _make(held, name, make)
            finally:
                os.close(lock)
    except OSError as error:
        raise SecateurError(
            f"{name} could not be made in the cache {models} ({error}): if the cache can't be written, set "
            f"SECATEUR_CACHE to a folder that can"
        ) from error
    return models / name


def _make(models: HeldFolder, name: str, make: Callable[[Path], None]) -> None:
    """Make a model next to its place, then move it there whole."""
    models.remove_partial()
    if (found := _damage(models.path / name)) is None:  # another process was faster
        return
    if models.is_folder(name):
        say(f"secateur: {found}: the model is made again")
    partial = models.new_name()
    try:
        with models.subfolder(partial) as folder:
            make(folder.path)
            records = {file: folder.record(file) for file in folder.names()}
            for file in records:
                folder.flush_file(file)
            folder.write(DIGESTS, _digests(records))
        models.remove_folder(name)
        models.rename(partial, name)
        models.flush()
    finally:
        models.remove_folder(partial)


def _digests(records: dict[str, FileRecord]) -> str:
    return json.dumps(sealed({"files": {name: asdict(record) for name, record in records.items()}}), indent=1) + "\n"


def _damage(folder: Path) -> str | None:
    """What is wrong with a model of the cache, in words; None where it is whole."""
    if not folder.is_dir():
        return f"{folder} is not there"
    try:
        data = read_json(folder / DIGESTS)
        if not is_sealed(data):
            return f"{folder / DIGESTS} is damaged"
        return first_damage(folder, read_records(data.get("files")))
    except ValueError as error:
        return str(error)
