"""The files of a packed folder: `packed.safetensors`, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import SecateurError
from secateur.packed.container import NAMES, SafetensorsWriter
from secateur.packed.encoding import HEADER, MAGIC, Compression, Header, decode, encode, is_encoded, read_header
from secateur.packed.layout import PackedTensor, unpack

METHOD, FORMAT_VERSION = "secateur", 1
WEIGHTS, INDEX = "packed.safetensors", "packed.safetensors.index.json"  # nothing but secateur looks for these
METADATA = {"format": "pt", "secateur": str(FORMAT_VERSION)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written.

    Args:
        name: of the tensor.
        dtype, ndim: of the dense tensor.
        is_packed: whether it is packed.
        nbytes: of the content, before it is coded.
        read: gives the tensor, dense or packed, when its turn comes.
    """

    name: str
    dtype: torch.dtype
    ndim: int
    is_packed: bool
    nbytes: int
    read: Callable[[], Tensor | PackedTensor]


def write_weights(path: Path, entries: Iterable[Entry], compression: Compression) -> list[str]:
    """Write one file, with one tensor in memory at a time; returns the names of its tensors.

    Raises:
        OSError: the disk is full or not writable.
        SecateurError: a tensor of a dtype that safetensors files can't hold.
    """
    in_order = sorted(entries, key=lambda entry: (not entry.is_packed, -entry.dtype.itemsize, entry.name))
    for entry in in_order:
        if entry.dtype not in NAMES:
            raise SecateurError(f"{entry.name} is {entry.dtype}, which this can't write")
    shapes = [("U8", 1) if entry.is_packed else (NAMES[entry.dtype], entry.ndim) for entry in in_order]
    declared = [(entry.name, *shape) for entry, shape in zip(in_order, shapes, strict=True)]
    with SafetensorsWriter(path, declared, METADATA) as writer:
        for entry in in_order:
            content = entry.read()
            if isinstance(content, PackedTensor):
                writer.write_encoded(entry.name, encode(content, compression))
            else:
                writer.write_dense(entry.name, content)
    return [entry.name for entry in in_order]


def write_index(path: Path, shards: Mapping[str, list[str]]) -> None:
    """Write the index of several files: names of tensors by file."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    size = sum(path.with_name(file).stat().st_size for file in shards)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_headers(path: str | Path) -> dict[str, tuple[Header, int]]:
    """The header and the size of every packed tensor in a file. Reads no weights.

    Raises:
        SecateurError: a damaged file.
    """
    found, name = {}, ""
    try:
        with safe_open(path, framework="numpy") as file:  # torch may make tensors without content just now
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = file.get_slice(name)
                if part.get_dtype() != "U8" or len(part.get_shape()) != 1:
                    continue
                start, size = part[: HEADER.size].tobytes(), part.get_shape()[0]
                if start.startswith(MAGIC):
                    found[name] = (read_header(start, size), size)
    except SafetensorError as error:
        raise SecateurError(f"{path} is damaged or incomplete ({error})") from error
    except SecateurError as error:
        raise SecateurError(f"{path}: {name}: {error.raw}") from error
    return found


def dense(tensor: Tensor, name: str) -> Tensor:
    """A tensor of a packed file, unpacked where it is packed.

    Raises:
        SecateurError: it is damaged.
    """
    if not is_encoded(tensor):
        return tensor
    try:
        return unpack(decode(tensor))
    except SecateurError as error:
        raise SecateurError(f"{name}: {error.raw}") from error
