"""The files of a packed folder: `packed.safetensors`, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import SecateurError, errors_within
from secateur.packed.container import NAMES, SafetensorsWriter
from secateur.packed.encoding import HEADER, MAGIC, Compression, Header, decode, encode, is_encoded, read_header
from secateur.packed.layout import PackedTensor, unpack
from secateur.storage.checkpoint_files import PACKED_INDEX, PACKED_WEIGHTS

METHOD, FORMAT_VERSION = "secateur", 1
HEADER_METADATA = {"format": "pt", "secateur": str(FORMAT_VERSION)}


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


def write_weights(path: Path, entries: Iterable[Entry], compression: Compression) -> None:
    """Write one file, with one tensor in memory at a time.

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
    with SafetensorsWriter(path, declared, HEADER_METADATA) as writer:
        for entry in in_order:
            content = entry.read()
            if isinstance(content, PackedTensor):
                writer.write_encoded(entry.name, encode(content, compression))
            else:
                writer.write_dense(entry.name, content)


def file_names(stem: str, number: int) -> list[str]:
    """Names of one weight file, or of several, as transformers gives them."""
    if number == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{each:05d}-of-{number:05d}.safetensors" for each in range(1, number + 1)]


def write_index(path: Path, files: Iterable[str], parameters: int | None = None) -> None:
    """Write the index of several safetensors files next to it, as transformers does.

    Args:
        path: of the index.
        files: their names.
        parameters: weights of the model, where they are known.

    Raises:
        OSError: the disk is full or not writable.
    """
    size, weight_map = 0, {}
    for name in files:
        file = path.with_name(name)
        with safe_open(file, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), name)
        with file.open("rb") as content:
            size += file.stat().st_size - 8 - int.from_bytes(content.read(8), "little")
    metadata = {"total_size": size} | ({} if parameters is None else {"total_parameters": parameters})
    index = {"metadata": metadata, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_headers(path: str | Path) -> dict[str, tuple[Header, int]]:
    """The header and the size of every packed tensor in a file. Reads no weights.

    Raises:
        SecateurError: a damaged file.
    """
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:  # torch may make tensors without content just now
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = file.get_slice(name)
                if part.get_dtype() != "U8" or len(part.get_shape()) != 1:
                    continue
                size = part.get_shape()[0]
                if size >= HEADER.size and (start := part[: HEADER.size].tobytes()).startswith(MAGIC):
                    with errors_within(f"{path}: {name}"):
                        found[name] = (read_header(start, size), size)
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"{path} is damaged or incomplete, or can't be read ({error})") from error
    return found


def dense(tensor: Tensor, name: str) -> Tensor:
    """A tensor of a packed file, unpacked where it is packed.

    Raises:
        SecateurError: it is damaged.
    """
    if not is_encoded(tensor):
        return tensor
    with errors_within(name):
        return unpack(decode(tensor))


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (folder / PACKED_WEIGHTS).is_file() or (folder / PACKED_INDEX).is_file()


def bytes_of(files: Iterable[Path]) -> int:
    """Bytes of files in all."""
    return sum(path.stat().st_size for path in files)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
