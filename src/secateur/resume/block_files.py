"""The file of a finished block: its pruned tensors by the names of their parameters, and its figures in the header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from secateur.errors import SecateurError
from secateur.resume.manifest import damaged
from secateur.runtime import distributed
from secateur.storage.file_records import record_of


def check_digest(path: Path, digest: str) -> None:
    """Check that a file is what was written. Cost: one read of it.

    Raises:
        SecateurError: it is gone or was changed.
    """
    try:
        found = record_of(path).sha256
    except OSError as error:
        raise damaged(path, error) from error
    if found != digest:
        raise damaged(path, "its bits changed")


@contextmanager
def open_block(path: Path) -> Iterator[Any]:
    """The file, mapped.

    Raises:
        SecateurError: it is damaged, or does not hold what is looked for (KeyError, TypeError in the context).
    """
    if not distributed.is_main() and not path.exists():
        raise SecateurError(f"{path} is not here: OUT must lie on a disk that all processes share")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


def names_in(path: Path) -> list[str]:
    """The parameters that the file holds, without `.weight`.

    Raises:
        SecateurError: a damaged file.
    """
    with open_block(path) as file:
        return list(file.keys())


def map_from_file(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Map parameters from the file.

    Raises:
        SecateurError: the file is damaged, or holds others than these.
    """
    with open_block(path) as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
            raise KeyError("it does not hold the matrices of its block")
        for name, parameter in parameters.items():
            parameter.data = file.get_tensor(name)
