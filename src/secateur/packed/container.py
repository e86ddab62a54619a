"""safetensors files that are written one tensor at a time, with the header last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from secateur.packed.encoding import aligned

NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
Piece = memoryview | bytes


class SafetensorsWriter:
    """Write one safetensors file. Its header is written last, to space that was kept for it.

    Tensors that are packed have to come first, so that each begins at a multiple of 64 bytes, as kernels want; dense
    ones then by the size of their elements, the largest first.
    """

    def __init__(self, path: Path, entries: Iterable[tuple[str, str, int]], metadata: dict[str, str]) -> None:
        """Open the file and keep space for the header.

        Args:
            path: of the file.
            entries: name, dtype as in the header, and number of dimensions of every tensor that will come.
            metadata: of the header.

        Raises:
            OSError: it can't be written.
        """
        huge = 10**15
        longest = {name: _entry(dtype, [huge] * ndim, huge, huge) for name, dtype, ndim in entries}
        self._reserved = aligned(8 + len(_json({"__metadata__": metadata, **longest}))) - 8
        self._metadata, self._header, self._position = metadata, {}, 0
        self._file = path.open("xb")
        self._file.seek(8 + self._reserved)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write_header()
        finally:
            self._file.close()

    def write_encoded(self, name: str, pieces: list[Piece]) -> None:
        """Write a packed tensor, as bytes."""
        self._write(name, "U8", [sum(map(len, pieces))], pieces)

    def write_dense(self, name: str, tensor: Tensor) -> None:
        """Write a tensor as it is."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        self._write(name, NAMES[tensor.dtype], list(tensor.shape), [raw.numpy().data])

    def _write(self, name: str, dtype: str, shape: list[int], pieces: list[Piece]) -> None:
        start = self._position
        for piece in pieces:
            self._file.write(piece)
            self._position += len(piece)
        self._header[name] = _entry(dtype, shape, start, self._position)

    def _write_header(self) -> None:
        content = _json({"__metadata__": self._metadata, **self._header})
        assert len(content) <= self._reserved
        self._file.flush()
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + content.ljust(self._reserved))


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _json(header: dict[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
