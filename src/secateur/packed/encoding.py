"""A packed tensor as bytes: a header of 64 bytes, then masks and values, plain or entropy-coded.

Plain bytes can be mapped from a file and used as they lie. Coded bytes are smaller: the values are cut into planes (the
first bytes of all, then the second bytes of all), since exponents repeat and mantissas do not, and go through zstd with
the masks. docs/format.md has every field.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from torch import Tensor

from secateur.errors import SecateurError
from secateur.packed.layout import VALUE_PADDING, PackedTensor, check, panels_and_blocks

MAGIC, VERSION = b"SECATEUR", 1
HEADER = struct.Struct("<8sHBBBBBBQQQQQII")
ALIGNMENT = 64
DTYPES = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32}
INT8 = 4
CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.int8: INT8}
PLAIN, ZSTD = 0, 1
LEVEL = 3  # of zstd: higher levels gain less than 1% of these bytes, at several times the cost
MAX_WINDOW = 1 << 23
MAX_EXPANSION = 2  # of coded bytes; what would shrink further is kept plain, so no small file takes much memory
MAX_DIMENSION = 1 << 40
CHUNK = 1 << 20

Compression = Literal["zstd", "none"]


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes say.

    Args:
        shape: of the dense tensor.
        dtype: of the dense tensor.
        values_dtype: of the values: `dtype`, or int8.
        transposed: see `PackedTensor`.
        coding: `PLAIN` or `ZSTD`.
        kept: number of values.
        stored: bytes that follow the header, without the padding at the end.
        crc32: of those bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values_dtype: torch.dtype
    transposed: bool
    coding: int
    kept: int
    stored: int
    crc32: int

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks."""
        panels, blocks = panels_and_blocks(self.shape, self.transposed)
        return 4 * panels * blocks

    @property
    def value_bytes(self) -> int:
        """Bytes of the values."""
        return self.kept * self.values_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, one for each row."""
        rows = self.shape[-1] if self.transposed else self.shape[-2]
        return 4 * math.prod(self.shape[:-2]) * rows if self.values_dtype == torch.int8 else 0

    @property
    def coded_bytes(self) -> int:
        """Bytes that coding shrinks: masks, scales and values."""
        return self.mask_bytes + self.scale_bytes + self.value_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def plain_bytes(self) -> int:
        """Bytes of the plain form without the header."""
        parts = (self.mask_bytes, self.scale_bytes, self.value_bytes)
        return sum(map(aligned, parts)) + VALUE_PADDING


def aligned(size: int) -> int:
    """A size rounded up to a multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode(packed: PackedTensor, compression: Compression = "zstd") -> list[memoryview | bytes]:
    """The bytes of a packed tensor, in pieces whose total is a multiple of 64.

    Cost: with zstd, about 0.5 s for 100 MB on one core.
    """
    masks = packed.masks.numpy().data.cast("B")
    values = packed.values.view(torch.uint8).numpy().data[: packed.kept * packed.values.itemsize]
    scales = memoryview(b"") if packed.scales is None else packed.scales.numpy().data.cast("B")
    if compression == "zstd":
        coded = _coded([masks, scales], values, packed.values.itemsize)
        if MAX_EXPANSION * len(coded) >= len(masks) + len(scales) + len(values) > len(coded):
            return _with_header(packed, ZSTD, [coded])
    pieces = [piece for part in (masks, scales, values) for piece in (part, bytes(aligned(len(part)) - len(part)))]
    return _with_header(packed, PLAIN, [*pieces, bytes(VALUE_PADDING)])


def _coded(parts: list[memoryview], values: memoryview, itemsize: int) -> bytes:
    planes = np.frombuffer(values, np.uint8).reshape(-1, itemsize)
    size = sum(map(len, parts)) + len(values)
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compressobj(size=size)
    pieces = [compressor.compress(part) for part in parts]
    pieces += [compressor.compress(planes[:, byte].tobytes()) for byte in range(itemsize)]
    return b"".join([*pieces, compressor.flush()])


def _with_header(packed: PackedTensor, coding: int, pieces: list[memoryview | bytes]) -> list[memoryview | bytes]:
    crc32, stored = 0, sum(map(len, pieces))
    for piece in pieces:
        crc32 = zlib.crc32(piece, crc32)
    dimensions = (*packed.shape, *[0] * (3 - len(packed.shape)))
    fields = (
        MAGIC, VERSION, CODES[packed.dtype], CODES[packed.values.dtype], coding, packed.transposed, len(packed.shape),
        0, *dimensions, packed.kept, stored, crc32,
    )  # fmt: skip
    return [sealed_header(fields), *pieces, bytes(aligned(stored) - stored)]


def sealed_header(fields: Sequence[Any]) -> bytes:
    """A header of all its fields but the last, which is a checksum of the bytes before it."""
    content = HEADER.pack(*fields, 0)
    return content[:-4] + zlib.crc32(content[:-4]).to_bytes(4, "little")


def is_encoded(tensor: Tensor) -> bool:
    """Whether a tensor of a file holds a packed one."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 1 and _start(tensor).startswith(MAGIC)


def read_header(start: bytes, size: int) -> Header:
    """The header of an encoded tensor, checked against its size.

    Args:
        start: its first 64 bytes.
        size: number of all its bytes.

    Raises:
        SecateurError: it is something else, damaged, or of another version.
    """
    if len(start) < HEADER.size:
        raise SecateurError("it is too short for a packed tensor")
    fields = HEADER.unpack(start[: HEADER.size])
    magic, version, dtype, values, coding, transposed, ndim, zero, *dimensions, kept, stored, crc32, own_crc32 = fields
    if magic != MAGIC:
        raise SecateurError("it does not begin as a packed tensor does")
    if version != VERSION:
        raise SecateurError(f"it has version {version} of the format; this secateur reads version {VERSION}: upgrade")
    if zlib.crc32(start[: HEADER.size - 4]) != own_crc32:
        raise SecateurError("its header does not match its checksum")
    shape = tuple(dimensions[:ndim])
    is_known = dtype in DTYPES and values in (dtype, INT8) and coding in (PLAIN, ZSTD) and transposed in (0, 1)
    if not is_known or ndim not in (2, 3) or zero or any(dimensions[ndim:]):
        raise SecateurError("its header is damaged")
    if not all(0 < size < MAX_DIMENSION for size in shape) or kept > math.prod(shape):
        raise SecateurError(f"its header is damaged: {kept:,} values in the shape {shape}")
    values_dtype = torch.int8 if values == INT8 else DTYPES[dtype]
    header = Header(shape, DTYPES[dtype], values_dtype, bool(transposed), coding, kept, stored, crc32)
    if HEADER.size + aligned(stored) != size:
        raise SecateurError(f"it has {size:,} bytes; its header says {HEADER.size + aligned(stored):,}")
    needs = header.plain_bytes
    if coding == PLAIN and stored != needs:
        raise SecateurError(f"it stores {stored:,} bytes; its shape and values need {needs:,}")
    if coding == ZSTD and header.coded_bytes > MAX_EXPANSION * stored:
        raise SecateurError(f"its header is damaged: {stored:,} coded bytes can't hold the shape {shape}")
    return header


def decode(tensor: Tensor) -> PackedTensor:
    """The packed tensor in an encoded one. Plain bytes are not copied, where they lie at an aligned address.

    Args:
        tensor: one dimension of uint8, such as a mapped part of a file.

    Raises:
        SecateurError: damaged bytes, or masks and values that don't fit.

    Cost: one read; with zstd, about 0.5 s for 100 MB on one core.
    """
    header = read_header(_start(tensor), len(tensor))
    body = tensor[HEADER.size : HEADER.size + header.stored]
    if zlib.crc32(body.numpy().data) != header.crc32:
        raise SecateurError("its bytes do not match their checksum")
    panels, blocks = panels_and_blocks(header.shape, header.transposed)
    if header.coding == ZSTD:
        masks, scales, values = _decoded(body.numpy().data, header)
    else:
        second = aligned(header.mask_bytes)
        third = second + aligned(header.scale_bytes)
        masks = _at_aligned(body[: header.mask_bytes], 4)
        scales = _at_aligned(body[second : second + header.scale_bytes], 4)
        values = _at_aligned(body[third:], header.values_dtype.itemsize)
    packed = PackedTensor(
        header.shape,
        header.dtype,
        header.transposed,
        masks.view(torch.int32).view(panels, blocks),
        values.view(header.values_dtype),
        header.kept,
        scales.view(torch.float32) if header.scale_bytes else None,
    )
    check(packed)
    return packed


def _decoded(coded: memoryview, header: Header) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, scales and values of coded bytes. No more than they take and a chunk is allocated."""
    masks = torch.empty(header.mask_bytes, dtype=torch.uint8)
    scales = torch.empty(header.scale_bytes, dtype=torch.uint8)
    values = torch.zeros(header.value_bytes + VALUE_PADDING, dtype=torch.uint8)
    planes = values[: header.value_bytes].numpy().reshape(-1, header.values_dtype.itemsize)
    try:
        if zstandard.frame_content_size(coded) != header.coded_bytes:
            raise SecateurError("its coded bytes hold another number of bytes than its header says")
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(coded, read_size=CHUNK) as reader:
            _fill(reader, masks.numpy())
            _fill(reader, scales.numpy())
            for byte in range(header.values_dtype.itemsize):
                for start in range(0, header.kept, CHUNK):
                    chunk = np.empty(min(CHUNK, header.kept - start), np.uint8)
                    _fill(reader, chunk)
                    planes[start : start + CHUNK, byte] = chunk
    except zstandard.ZstdError as error:
        raise SecateurError(f"its coded bytes are damaged ({error})") from error
    return masks, scales, values


def _fill(reader: zstandard.ZstdDecompressionReader, target: np.ndarray) -> None:
    left = target.data.cast("B")
    while left:
        count = reader.readinto(left)
        if not count:
            raise SecateurError("its coded bytes end too early")
        left = left[count:]


def _at_aligned(part: Tensor, alignment: int) -> Tensor:
    is_aligned = part.storage_offset() % alignment == 0 and part.data_ptr() % alignment == 0
    return part if is_aligned else part.clone()


def _start(tensor: Tensor) -> bytes:
    return tensor[: HEADER.size].numpy().tobytes()
