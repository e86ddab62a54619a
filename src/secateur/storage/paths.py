"""Paths that users type."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.errors import SecateurError


def user_path(name: str | Path) -> Path:
    """A path with `~` expanded, of which every file function works.

    Raises:
        SecateurError: no path, the home of an unknown user, or a name that no file can have.
    """
    if not isinstance(name, str | Path):
        raise SecateurError(f"a path is expected, not a {type(name).__name__}")
    path = Path(name)
    try:
        path = path.expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (RuntimeError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SecateurError(f"{str(name)[:80]!r} can't be a path: {reason}") from error
    return path


def real_path(path: Path) -> Path:
    """The absolute path with every link followed; a loop of links stays as it is."""
    return Path(os.path.realpath(path))
