"""The compiled products (kernels.c): found, chosen by the CPU's features, and called.

They are built when secateur is installed where there is a C compiler. Without them, packed matrices are unpacked to
dense ones. `SECATEUR_KERNELS` may name a lower level: `none`, `avx2`, `avx512`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from secateur.errors import SecateurError

LEVELS = ("none", "avx2", "avx512", "amx")
LIBRARY = Path(__file__).with_name("_kernels.so")
VARIABLE = "SECATEUR_KERNELS"
# Larger batches unpack some rows at a time, and leave the product to torch: from there on, arithmetic decides.
MAX_BATCH = {"avx2": 8, "avx512": 16, "amx": 512}
TILE_BYTES = 1 << 22  # of unpacked rows
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built, or can't be loaded here."""
    if not LIBRARY.is_file():
        return None
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:  # built for another machine
        return None
    found.secateur_multiply.argtypes = [
        ctypes.c_int, POINTER, POINTER, POINTER, POINTER, NUMBER, NUMBER, POINTER, NUMBER, POINTER, POINTER,
        ctypes.c_int,
    ]  # fmt: skip
    found.secateur_unpack.argtypes = [
        ctypes.c_int, POINTER, POINTER, POINTER, POINTER, NUMBER, NUMBER, NUMBER, POINTER, ctypes.c_int,
    ]  # fmt: skip
    return found


@cache
def level() -> str:
    """The level that is used: `none`, `avx2`, `avx512` or `amx`.

    Raises:
        SecateurError: `SECATEUR_KERNELS` names another.
    """
    wanted = os.environ.get(VARIABLE, LEVELS[-1])
    if wanted not in LEVELS:
        raise SecateurError(f"{VARIABLE} is {wanted!r}: it must be one of {', '.join(LEVELS)}")
    found = library()
    return LEVELS[0 if found is None else min(found.secateur_level(), LEVELS.index(wanted))]


def cpu_features() -> list[str]:
    """What the kernels look for, of what this CPU has."""
    known = ("avx2", "fma", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    return [name for name in known if name in flags]


def description() -> str:
    """The level that is used, or why there is none."""
    if not LIBRARY.is_file():
        return "none: they were not built, since there was no C compiler, or this is not x86-64 Linux"
    if library() is None:
        return "none: they were built for another machine"
    return level() if level() != "none" else f"none: the CPU has no AVX2, or {VARIABLE} turns them off"


def multiply(
    x: BFloat16[Tensor, "... width"],
    masks: Int[Tensor, "panels blocks"],
    values: Tensor,
    offsets: Int[Tensor, " offsets"],
    rows: int,
    columns: int,
    bias: BFloat16[Tensor, " rows"] | None = None,
    scales: Float[Tensor, " rows"] | None = None,
) -> BFloat16[Tensor, "... rows"]:
    """`x W^T + bias` for a packed W, on the CPU, with sums in float32.

    Args:
        x: inputs.
        masks: of a packed matrix, checked by `layout.check`.
        values: its kept values, bfloat16 or int8, with padding.
        offsets: its `offsets()`.
        rows: outputs.
        columns: inputs.
        bias: added before the sums are rounded.
        scales: of the rows of int8 values.

    Raises:
        SecateurError: inputs or a bias of another size or dtype, which would be read beyond their end.

    Cost: one read of W for a small batch; above `MAX_BATCH`, W is unpacked in tiles.
    """
    if x.shape[-1] != columns:
        raise SecateurError(f"the inputs have {x.shape[-1]} columns, and the packed matrix has {columns}")
    if x.dtype != torch.bfloat16:
        raise SecateurError(f"the kernels take inputs in {torch.bfloat16}, not {x.dtype}")
    check_bias(bias, rows)
    bias = None if bias is None else bias.contiguous()
    inputs = x.reshape(-1, columns).contiguous()
    batch = len(inputs)
    out = torch.empty((*x.shape[:-1], rows), dtype=torch.bfloat16, device="cpu")
    name = level()
    found = library()
    assert found is not None
    if batch > MAX_BATCH[name]:
        _multiply_unpacked(inputs, masks, values, offsets, out.view(batch, rows), bias, scales)
        return out
    failed = found.secateur_multiply(
        LEVELS.index(name), masks.data_ptr(), values.data_ptr(), offsets.data_ptr(),
        None if scales is None else scales.data_ptr(), rows, columns, inputs.data_ptr(), batch,
        None if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a copy of a layer's inputs")
    return out


def check_bias(bias: Tensor | None, rows: int) -> None:
    """Check that a kernel can read a bias.

    Raises:
        SecateurError: it has another size or dtype, or is elsewhere.
    """
    if bias is None or (bias.shape == (rows,) and bias.dtype == torch.bfloat16 and bias.is_cpu):
        return
    raise SecateurError(
        f"the bias has the shape {tuple(bias.shape)} and is {bias.dtype} on {bias.device}; a packed matrix of {rows} "
        f"rows takes {torch.bfloat16} on the CPU"
    )


def unpack_rows(
    masks: Int[Tensor, "panels blocks"],
    values: Tensor,
    offsets: Int[Tensor, " offsets"],
    columns: int,
    start: int,
    stop: int,
    scales: Float[Tensor, " rows"] | None = None,
) -> Tensor:
    """Rows of a packed matrix with values of two bytes, or of int8, then as bfloat16. `start` is a multiple of 16."""
    out = torch.empty(stop - start, columns, dtype=values.dtype if scales is None else torch.bfloat16, device="cpu")
    found = library()
    assert found is not None
    found.secateur_unpack(
        LEVELS.index(level()), masks.data_ptr(), values.data_ptr(), offsets.data_ptr(),
        None if scales is None else scales.data_ptr(), columns, start, stop, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _multiply_unpacked(
    x: Tensor, masks: Tensor, values: Tensor, offsets: Tensor, out: Tensor, bias: Tensor | None, scales: Tensor | None
) -> None:
    rows, columns = out.shape[1], x.shape[1]
    step = max(16, TILE_BYTES // (2 * columns) // 16 * 16)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        tile = unpack_rows(masks, values, offsets, columns, start, stop, scales)
        out[:, start:stop] = torch.nn.functional.linear(x, tile, None if bias is None else bias[start:stop])
