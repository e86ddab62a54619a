"""Crash-safe writes: temporary file, fsync, atomic rename."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and return when it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
