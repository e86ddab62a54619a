"""The header of a GGUF file, checked before any parser allocates or loops by what it says.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_ELEMENTS = 1 << 22  # of all arrays; a vocabulary of 256,000 tokens with its merges has a fifth
MAX_DIMENSIONS = 4
SMALLEST_TENSOR, SMALLEST_PAIR = 24, 13  # bytes of their entries


def check_gguf(path: Path) -> dict[str, int]:
    """Check that everything that a GGUF file announces is in it. Cost: one read of its header.

    Returns:
        the number of weights of each tensor, by its name.

    Raises:
        SecateurError: something is missing, it is of another version than 2 or 3, or its rotary positions are scaled.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(content).check()
    except OSError as error:
        raise SecateurError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise SecateurError(f"{path} can't be read as a GGUF model: {error}") from error


class _Header:
    """A cursor in a file's bytes. Every method raises SecateurError or struct.error for what is not in the file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.elements = content, 0, 0

    def check(self) -> dict[str, int]:
        magic, version, tensors, pairs = self.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise SecateurError("it does not begin as a little-endian GGUF file of version 2 or 3")
        if tensors * SMALLEST_TENSOR + pairs * SMALLEST_PAIR > len(self.content):
            raise SecateurError(
                f"{tensors:,} tensors and {pairs:,} values are announced, more than the file has room for"
            )
        values = dict(self.pair() for _ in range(pairs))
        if (parts := values.get("split.count", 1)) not in (0, 1):  # 0 is what a merged file says
            raise SecateurError(f"it is one of {parts} parts of a model: merge them first (llama-gguf-split --merge)")
        found = [self.tensor() for _ in range(tensors)]
        self.check_tensors(found, values.get("general.alignment", 32))
        _check_counts(values, len(found))
        _check_scaling(values)
        return {name: elements for name, elements, _, _ in found}

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.content, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.content) - self.at:
            raise SecateurError(f"a text of {length:,} bytes is announced, more than the file has")
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8", errors="replace")

    def pair(self) -> tuple[str, Any]:
        name, (kind,) = self.text(), self.take("I")
        return name, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind != ARRAY:
            raise SecateurError(f"a value has the unknown type {kind}")
        element, length = self.take("IQ")
        self.elements += length
        if self.elements > MAX_ELEMENTS or element == ARRAY:
            raise SecateurError(f"an array of {length:,} elements of type {element} is announced")
        for _ in range(length):
            self.value(element)
        return None

    def tensor(self) -> tuple[str, int, int, int]:
        """Name, number of elements, type and offset."""
        name, (dimensions,) = self.text(), self.take("I")
        if dimensions > MAX_DIMENSIONS:
            raise SecateurError(f"{name} has {dimensions} dimensions")
        shape = self.take(f"{dimensions}Q")
        kind, offset = self.take("IQ")
        return name, prod(shape), kind, offset

    def check_tensors(self, tensors: list[tuple[str, int, int, int]], alignment: Any) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise SecateurError(f"the alignment is {alignment!r}, which is not a power of two")
        start = -(-self.at // alignment) * alignment
        for name, elements, kind, offset in tensors:
            if kind not in list(GGML_QUANT_SIZES):
                raise SecateurError(f"{name} has the unknown type {kind}")
            block, size = GGML_QUANT_SIZES[kind]  # pyright: ignore[reportArgumentType] - an IntEnum
            if elements % block or start + offset + elements // block * size > len(self.content):
                raise SecateurError(f"{name} is larger than what the file holds: the download may be incomplete")


def _check_scaling(values: dict[str, Any]) -> None:
    """Check that rotary positions are not scaled: transformers drops that from every architecture but gpt-oss."""
    kind = values.get("general.architecture")
    scaling, factor = (values.get(f"{kind}.rope.scaling.{name}") for name in ("type", "factor"))
    is_scaled = (scaling, factor) != (None, None) and scaling != "none" and factor not in (0, 1)
    if kind != "gpt-oss" and is_scaled:
        raise SecateurError(
            f"its rotary positions are scaled ({scaling or 'linear'}), which transformers does not read from GGUF "
            f"files: give the original checkpoint"
        )


def _check_counts(values: dict[str, Any], tensors: int) -> None:
    """Check the number of blocks: each has a tensor at least."""
    for name, value in values.items():
        if name.endswith(("block_count", "expert_count")) and isinstance(value, int) and value > max(tensors, 1024):
            raise SecateurError(f"{name} is {value:,}, but the file has {tensors:,} tensors")
