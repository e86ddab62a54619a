"""A second reader of packed files, in numpy alone, written from docs/format.md.

Values stay as integers of their bits (uint16 or uint32), since numpy has no bfloat16; int8 values become float32.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import zstandard

HEADER = struct.Struct("<8sHBBBBBBQQQQQII")
SIZES = {1: 2, 2: 2, 3: 4, 4: 1}  # bytes of bfloat16, float16, float32, int8
INT8 = 4
ROWS, COLUMNS = 16, 2


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Every packed tensor of a file as a dense one, and every other as bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    entries = json.loads(content[8 : 8 + length])
    start, found = 8 + length, {}
    for name, entry in entries.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = content[start + first : start + last]
            packed = entry["dtype"] == "U8" and part[:8] == b"SECATEUR"
            found[name] = read_tensor(part) if packed else np.frombuffer(part, np.uint8)
    return found


def read_tensor(content: bytes) -> np.ndarray:
    """The dense tensor in the bytes of a packed one."""
    fields = HEADER.unpack_from(content)
    _, version, dtype, stored_as, coding, transposed, ndim, _, *sizes, kept, stored, crc32, header_crc32 = fields
    assert zlib.crc32(content[:60]) == header_crc32
    assert version == 1
    body = content[HEADER.size : HEADER.size + stored]
    assert zlib.crc32(body) == crc32
    shape, size, is_int8 = sizes[:ndim], SIZES[stored_as], stored_as == INT8
    assert is_int8 or stored_as == dtype
    rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    stack = int(np.prod(shape[:-2]))
    panels, blocks = -(-rows // ROWS), -(-columns // COLUMNS)
    mask_bytes = 4 * stack * panels * blocks
    scale_bytes = 4 * stack * rows * is_int8
    if coding == 1:
        plain = zstandard.ZstdDecompressor().decompress(body)
        masks, scales = plain[:mask_bytes], plain[mask_bytes : mask_bytes + scale_bytes]
        planes = np.frombuffer(plain[mask_bytes + scale_bytes :], np.uint8).reshape(size, kept)
        values = np.ascontiguousarray(planes.T).view(f"<u{size}")[:, 0]
    else:
        second = -(-mask_bytes // 64) * 64
        third = second + -(-scale_bytes // 64) * 64
        masks, scales = body[:mask_bytes], body[second : second + scale_bytes]
        values = np.frombuffer(body, f"<u{size}", kept, third)
    bits = np.unpackbits(np.frombuffer(masks, np.uint8), bitorder="little")
    arranged = np.zeros(bits.size, values.dtype)
    arranged[bits == 1] = values
    arranged = arranged.reshape(stack, panels, blocks, ROWS, COLUMNS).transpose(0, 1, 3, 2, 4)
    matrices = arranged.reshape(stack, panels * ROWS, blocks * COLUMNS)[:, :rows, :columns]
    if is_int8:
        factors = np.frombuffer(scales, "<f4").reshape(stack, rows, 1)
        matrices = matrices.view(np.int8).astype(np.float32) * factors
    return (matrices.transpose(0, 2, 1) if transposed else matrices).reshape(shape)
