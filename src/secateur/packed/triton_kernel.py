"""Products with packed matrices on a GPU, by Triton (extra `gpu`): for batches of 1 to 8, as in decoding.

Untested on a GPU so far: it is correct in Triton's interpreter, and `benchmarks/gpu.py` measures it. So layers do not
use it yet: on a GPU they are dense.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.packed.layout import COLUMNS, ROWS, PackedTensor

MAX_BATCH = 8
SPLIT_BLOCKS = 256  # blocks of a panel that one program multiplies
STEP_BLOCKS = 32  # blocks that it expands at a time


def split_offsets(packed: PackedTensor) -> Int[Tensor, "panels splits"]:
    """Index of the first value of each part of a panel. Cost: one read of the masks; once a matrix."""
    panels, blocks = packed.masks.shape
    bits = torch.arange(32, device=packed.masks.device, dtype=torch.int32)
    counts = ((packed.masks[..., None] >> bits) & 1).sum(-1)
    starts = counts.reshape(-1).cumsum(0) - counts.reshape(-1)
    return starts.view(panels, blocks)[:, ::SPLIT_BLOCKS].contiguous()


def multiply(
    x: BFloat16[Tensor, "batch columns"],
    packed: PackedTensor,
    offsets: Int[Tensor, "panels splits"],
    bias: BFloat16[Tensor, " rows"] | None = None,
) -> BFloat16[Tensor, "batch rows"]:
    """`x W^T + bias` for a packed matrix with values of bfloat16 or int8, with sums in float32.

    Args:
        x: up to 8 inputs, on the device of the matrix.
        packed: a matrix, checked by `layout.check`.
        offsets: its `split_offsets`.
        bias: added before the sums are rounded.

    Raises:
        SecateurError: more inputs.

    Cost: one read of the matrix.
    """
    batch, columns = x.shape
    if batch > MAX_BATCH:
        raise SecateurError(f"this product is for 1 to {MAX_BATCH} inputs, and there are {batch}")
    panels, blocks = packed.masks.shape
    splits = offsets.shape[1]
    sizes: Any = {"SPLIT": SPLIT_BLOCKS, "STEP": STEP_BLOCKS, "BATCH": batch, "ROWS": ROWS, "COLUMNS": COLUMNS}
    sums = torch.empty(splits, batch, panels * ROWS, dtype=torch.float32, device=x.device)
    _multiply_part[(panels, splits)](
        x.contiguous(), packed.masks, packed.values, offsets, sums, columns, blocks, panels, batch,
        **sizes,
    )  # fmt: skip
    total: Float[Tensor, "batch rows"] = sums.sum(0)[:, : packed.rows]
    if packed.scales is not None:
        total = total * packed.scales
    return (total if bias is None else total + bias.float()).to(torch.bfloat16)


@triton.jit
def _multiply_part(
    x, masks, values, offsets, sums, columns, blocks, panels, batch,
    SPLIT: tl.constexpr, STEP: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of one panel over one part of its blocks, of every input."""
    panel, part = tl.program_id(0), tl.program_id(1)
    first = tl.load(offsets + panel * tl.num_programs(1) + part)
    bit = tl.arange(0, ROWS * COLUMNS)
    row = tl.arange(0, ROWS)
    for i in tl.static_range(BATCH):
        start = first
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for step in range(0, SPLIT, STEP):
            block = part * SPLIT + step + tl.arange(0, STEP)
            mask = tl.load(masks + panel * blocks + block, mask=block < blocks, other=0)
            kept = (mask[:, None] >> bit[None, :]) & 1
            count = tl.sum(kept, axis=1)
            before = tl.cumsum(count, axis=0) - count
            index = start + before[:, None] + tl.cumsum(kept, axis=1) - kept
            value = tl.load(values + index, mask=kept == 1, other=0).to(tl.float32)
            column = block[:, None] * COLUMNS + bit[None, :] % COLUMNS
            factor = tl.load(x + i * columns + column, mask=column < columns, other=0).to(tl.float32)
            by_bit = tl.sum(value * factor, axis=0)
            total += tl.sum(tl.reshape(by_bit, (ROWS, COLUMNS)), axis=1)
            start += tl.sum(count, axis=0)
        tl.store(sums + (part * batch + i) * panels * ROWS + panel * ROWS + row, total)
