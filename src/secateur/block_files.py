"""The file of a finished block: its pruned tensors by the names of their matrices, and its figures in the header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from secateur import durable, parallel


def check_bits(path: Path, digest: str) -> None:
    """Raise ValueError where a file isn't what was written. Cost: one read of it."""
    if not path.is_file() or durable.digest_of(path) != digest:
        raise ValueError(f"{path} is damaged (its bits changed): start again with --overwrite")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, mapped.

    Raises:
        ValueError: a damaged file, or one that doesn't hold what is looked for (KeyError, TypeError).
    """
    if not parallel.is_first() and not path.exists():
        raise ValueError(f"{path} is not here: OUT must lie on a disk that all processes share")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): start again with --overwrite") from error


def names_in(path: Path) -> list[str]:
    """The matrices (or stacks of experts) that the file holds. Raises ValueError: a damaged file."""
    with opened(path) as file:
        return list(file.keys())


def adopt(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let parameters be those of the file, mapped.

    Raises:
        ValueError: a file that is damaged, or holds others than these.
    """
    with opened(path) as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
            raise KeyError("it doesn't hold the matrices of its block")
        for name, parameter in parameters.items():
            parameter.data = file.get_tensor(name)
