"""SHA-256 and size of files: what tells a file that is whole from one that is damaged, or that somebody changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written.

    Args:
        sha256: of its content, in hexadecimal.
        bytes: its size.
    """

    sha256: str
    bytes: int


Records = Mapping[str, FileRecord]


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Follows links: for files that are only read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: Path | str, dir_fd: int | None = None) -> FileRecord:
    """The record of a regular file. Cost: one read of it.

    Raises:
        OSError: it is gone, can't be read, or is something else, such as a link.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)  # a pipe would block
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        return FileRecord(hashlib.file_digest(file, "sha256").hexdigest(), status.st_size)


def damage(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file of a folder, in words; None where it is what was recorded. Cost: one read of it."""
    path = folder / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a regular file"
        if status.st_size != record.bytes:
            return f"{path} has {status.st_size:,} bytes, {record.bytes:,} are recorded"
        found = record_of(path)
    except OSError as error:
        return f"{path} is gone" if isinstance(error, FileNotFoundError) else f"{path} can't be read ({error.strerror})"
    return None if found == record else f"{path} has another SHA-256 than recorded"


def first_damage(folder: Path, records: Records) -> str | None:
    """What is wrong with the first file that is not what was recorded. Cost: one read of every file."""
    return next((found for name, record in records.items() if (found := damage(folder, name, record))), None)


def read_records(data: Any) -> dict[str, FileRecord]:
    """Records from plain data (name -> `sha256` and `bytes`).

    Raises:
        SecateurError: data of another form, or a name that is not a plain file name.
    """
    if not isinstance(data, dict):
        raise SecateurError("the records of files are not a mapping")
    found = {}
    for name, record in data.items():
        if not is_plain_name(name):
            raise SecateurError(f"{name!r} is not a plain file name")
        digest, size = (record.get(key) if isinstance(record, dict) else None for key in ("sha256", "bytes"))
        if not isinstance(digest, str) or not isinstance(size, int):
            raise SecateurError(f"the record of {name} lacks its sha256 or bytes")
        found[name] = FileRecord(digest, size)
    return found


def is_plain_name(name: object) -> bool:
    """Whether this names a file of a folder, and nothing elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not {*"/\\"} & {*name}
