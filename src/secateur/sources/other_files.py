"""Files of a checkpoint that are copied as they are: tokenizer, chat template, generation config, licence, notice."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from secateur.errors import SecateurError
from secateur.runtime.messages import one_line
from secateur.storage.checkpoint_files import CARD, CHECKPOINT_FILES, METADATA, RECIPE_FILE, REPORT_FILE
from secateur.storage.file_records import is_plain_name
from secateur.storage.paths import real_path

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".ot"}
MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".py"}  # of files that decide what a model computes
REWRITTEN = {CARD, "config.json", METADATA}  # read, and written anew
NOT_COPIED = REWRITTEN | {RECIPE_FILE, REPORT_FILE}


def model_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that decide what the model computes, by name. The report of a run does not."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.is_file()]
    return [path for path in files if path.name != METADATA]


def copy_other_files(source: Path, target: Path) -> None:
    """Copy the source's other files as they are: tokenizer, chat template, generation config, licence, notice."""
    for path in copied_files(source):
        copy_file(path, target)


def copy_file(path: Path, target: Path) -> None:
    """Copy a file's content to a folder, with its permissions."""
    copied = target / path.name
    copied.unlink(missing_ok=True)  # of an earlier process, and perhaps read-only
    with path.open("rb") as file, copied.open("wb") as copy:
        shutil.copyfileobj(file, copy)
    copied.chmod(path.stat().st_mode & 0o666)


def copied_files(source: Path) -> list[Path]:
    """Files of a checkpoint that are copied to the pruned one. A link that leaves its folder is none of them."""
    return [path for path in sorted(source.iterdir()) if _is_copied(path) and _stays_inside(path, source)]


def check_links(source: Path) -> list[str]:
    """Notices of what in a checkpoint's folder is not copied: sub-folders, and links that leave it.

    Raises:
        SecateurError: the checkpoint needs such a file.
    """
    notices = []
    for path in sorted(source.iterdir()):
        if path.is_file() and not is_plain_name(path.name):
            notices.append(f"{one_line(path.name)} has a name that can't be recorded: it is not copied")
        if not (_is_copied(path) or path.name in REWRITTEN) or _stays_inside(path, source):
            continue
        if any(fnmatchcase(path.name, name) for name in (*CHECKPOINT_FILES, *REWRITTEN)):
            raise SecateurError(
                f"{path} is a link to {os.path.realpath(path)}, outside of the model's folder: what it leads to would "
                f"be published with the pruned model. Replace the link by a copy"
            )
        notices.append(f"{path.name} is a link that leaves the model's folder: it is not copied")
    if folders := [one_line(path.name) for path in sorted(source.iterdir()) if _is_folder(path)]:
        notices.append(f"{', '.join(folders)}: sub-folders of the model are not copied")
    return notices


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))


def _is_copied(path: Path) -> bool:
    weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    others = path.name in NOT_COPIED or path.name.startswith(".")
    return path.is_file() and is_plain_name(path.name) and not weights and not others


def _stays_inside(path: Path, source: Path) -> bool:
    """Whether a file lies in the model's folder, or in its part of the hub's cache, whose files are links."""
    folder = real_path(source)
    places = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        places.append(folder.parent.parent / "blobs")
    return any(place in real_path(path).parents for place in places)
