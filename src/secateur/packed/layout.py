"""A sparse matrix as a bitmask and its kept values, in the order that the kernels read.

A *panel* is 16 rows. A *block* is a panel's 16 rows x 2 columns, with one bit a weight: bit `2 * row + column` of a
32-bit mask. Kept values follow each other panel by panel, block by block, in the order of the bits. docs/format.md says
why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import SecateurError
from secateur.numerics.int8 import LARGEST, from_int8, scales_of, to_int8
from secateur.packed import kernels

ROWS, COLUMNS = 16, 2  # of a block
VALUE_PADDING = 64  # bytes that kernels may read after the last value
Values = Literal["same", "int8"]
SMALLEST = torch.finfo(torch.float32).tiny
WORTH = 0.9  # of a tensor's bytes, at most, for it to be packed
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class PackedTensor:
    """A matrix (rows, columns), or a stack of some (stack, rows, columns), without its zeros.

    Args:
        shape: of the dense tensor as it is stored.
        dtype: of the dense tensor: bfloat16, float16 or float32.
        transposed: the stored matrix is (columns, rows), as in GPT-2's `Conv1D`.
        masks: one 32-bit mask a block, of every panel of every matrix of the stack.
        values: kept values with `VALUE_PADDING` bytes after them, in `dtype` or in int8.
        kept: number of values.
        scales: what int8 values of each row of each matrix are multiplied by; None for values in `dtype`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    masks: Int[Tensor, "panels blocks"]
    values: Tensor
    kept: int
    scales: Float[Tensor, " rows"] | None = None

    @property
    def stack(self) -> int:
        """Number of matrices."""
        return math.prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Outputs of a matrix."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def columns(self) -> int:
        """Inputs of a matrix."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of masks, values, scales and offsets."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.masks.nbytes + self.values.nbytes + scales + 8 * (len(self.masks) + 1)

    def offsets(self) -> Int[Tensor, " offsets"]:
        """Index of the first value of each panel, and the number of values."""
        counts = _popcounts(self.masks)
        return torch.from_numpy(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def panels_and_blocks(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Number of panels of all matrices, and of blocks in a panel, of a tensor's shape."""
    rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    return math.prod(shape[:-2]) * -(-rows // ROWS), -(-columns // COLUMNS)


def packed_size(tensor: Tensor) -> int:
    """Bytes that a dense tensor would take when it is packed; its own where it can't be."""
    if tensor.dtype not in BITS or tensor.ndim not in (2, 3) or not tensor.numel():
        return tensor.nbytes
    kept = int(torch.count_nonzero(tensor.contiguous().view(BITS[tensor.dtype])))
    return 4 * math.prod(panels_and_blocks(tuple(tensor.shape), False)) + kept * tensor.itemsize


def is_worth_packing(tensor: Tensor) -> bool:
    """Whether packing saves at least a tenth of a tensor's bytes."""
    return packed_size(tensor) <= WORTH * tensor.nbytes > 0


def pack(tensor: Tensor, transposed: bool = False) -> PackedTensor:
    """Pack a dense tensor, bit for bit: a weight is kept unless all its bits are zero, so -0.0 is kept.

    Args:
        tensor: bfloat16, float16 or float32, of two or three dimensions.
        transposed: its matrices are (columns, rows).

    Cost: about four copies of the tensor.
    """
    bits = tensor.detach().contiguous().view(BITS[tensor.dtype])
    arranged = _arranged(bits, transposed)
    is_kept = arranged != 0
    masks, found = _masks_of(is_kept), arranged[is_kept]
    values = _with_padding(torch.from_numpy(found)).view(tensor.dtype)
    return PackedTensor(tuple(tensor.shape), tensor.dtype, transposed, masks, values, len(found))


def pack_int8(tensor: Tensor, transposed: bool = False) -> PackedTensor:
    """Pack a dense tensor with its kept values rounded to int8, symmetric, with one scale a row (`scales_of`).

    Weights that a run with `values: int8` saved come back bit for bit. A kept value that rounds to 0 stays in the mask.

    Args:
        tensor: bfloat16, float16 or float32, of two or three dimensions, finite.
        transposed: its matrices are (columns, rows).

    Raises:
        SecateurError: a value that is not finite.
    """
    if not tensor.isfinite().all():
        raise SecateurError("it holds values that are not finite, which int8 can't: keep them by ‹values=same›")
    matrices = tensor.detach().mT if transposed else tensor.detach()
    scales = scales_of(matrices)
    bits = tensor.detach().contiguous().view(BITS[tensor.dtype])
    is_kept = _arranged(bits, transposed) != 0
    found = _arranged(to_int8(matrices, scales), False)[is_kept]
    values = _with_padding(torch.from_numpy(found))
    return PackedTensor(
        tuple(tensor.shape), tensor.dtype, transposed, _masks_of(is_kept), values, len(found), scales.reshape(-1)
    )


def pack_int8_where_exact(tensor: Tensor, transposed: bool = False) -> PackedTensor:
    """Pack a dense tensor, bit for bit: with int8 values where it was rounded to such, else as `pack` does."""
    if tensor.isfinite().all():
        packed = pack_int8(tensor, transposed)
        assert packed.scales is not None
        if (packed.scales[packed.scales > 0] < SMALLEST).any():  # some kernels take denormal weights for zeros
            return pack(tensor, transposed)
        bits = BITS[tensor.dtype]
        if torch.equal(unpack(packed).view(bits), tensor.detach().contiguous().view(bits)):
            return packed
    return pack(tensor, transposed)


def _arranged(bits: Tensor, transposed: bool) -> np.ndarray:
    """The weights (panels, blocks, 16 rows, 2 columns), with zeros beyond the matrix."""
    matrices = bits.mT if transposed else bits
    stack, rows, columns = math.prod(bits.shape[:-2]), *matrices.shape[-2:]
    panels, blocks = panels_and_blocks(tuple(bits.shape), transposed)
    padded = bits.new_zeros(stack, -(-rows // ROWS) * ROWS, blocks * COLUMNS)
    padded[:, :rows, :columns] = matrices.reshape(stack, rows, columns)
    return padded.view(panels, ROWS, blocks, COLUMNS).transpose(1, 2).contiguous().numpy()


def _masks_of(is_kept: np.ndarray) -> Int[Tensor, "panels blocks"]:
    masks = np.packbits(is_kept.reshape(-1), bitorder="little").view("<i4").reshape(is_kept.shape[:2])
    return torch.from_numpy(masks)


def _with_padding(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(VALUE_PADDING // values.itemsize)])


def unpack(packed: PackedTensor) -> Tensor:
    """The dense tensor, bit for bit; of int8 values, their products with the scales, rounded to the dtype.

    Cost: two copies of it with a kernel, about four without.
    """
    if _is_unpacked_by_kernel(packed) and kernels.level() != "none":
        matrices = _unpack_by_kernel(packed)
    else:
        matrices = _unpack_by_numpy(packed)
    if packed.transposed:
        matrices = matrices.mT
    return matrices.new_empty(packed.shape).copy_(matrices.reshape(packed.shape))


def _is_unpacked_by_kernel(packed: PackedTensor) -> bool:
    return packed.values.itemsize == 2 or (packed.scales is not None and packed.dtype == torch.bfloat16)


def _unpack_by_kernel(packed: PackedTensor) -> Tensor:
    panels = len(packed.masks) // packed.stack
    offsets, columns = packed.offsets(), packed.columns
    scales = [None] * packed.stack if packed.scales is None else packed.scales.view(packed.stack, -1)
    return torch.stack([
        kernels.unpack_rows(
            packed.masks[number * panels :][:panels], packed.values, offsets[number * panels :], columns, 0,
            packed.rows, scales[number],
        )
        for number in range(packed.stack)
    ])  # fmt: skip


def _unpack_by_numpy(packed: PackedTensor) -> Tensor:
    stored = packed.values if packed.scales is not None else packed.values.view(BITS[packed.dtype])
    panels, blocks = packed.masks.shape
    arranged = np.zeros((panels, blocks, ROWS, COLUMNS), dtype=np.dtype(f"i{stored.itemsize}"))
    arranged[_bits_of(packed.masks)] = stored[: packed.kept].numpy()
    padded = torch.from_numpy(arranged).transpose(1, 2).reshape(packed.stack, -1, blocks * COLUMNS)
    matrices = padded[:, : packed.rows, : packed.columns]
    if packed.scales is None:
        return matrices.view(packed.dtype)
    return from_int8(matrices, packed.scales.view(packed.stack, packed.rows), packed.dtype)


def is_mapped(encoded: Tensor, packed: PackedTensor) -> bool:
    """Whether the masks lie in the encoded tensor, and so in the file that it may be mapped from."""
    return encoded.untyped_storage().data_ptr() == packed.masks.untyped_storage().data_ptr()


def check(packed: PackedTensor) -> None:
    """Check that masks and values fit: as many bits as values, and none outside of the matrix.

    Raises:
        SecateurError: they don't fit.

    Cost: one read of masks, and of int8 values.
    """
    count = int(_popcounts(packed.masks).sum(dtype=np.int64))
    if count != packed.kept:
        raise SecateurError(f"its masks have {count:,} bits, but it holds {packed.kept:,} values")
    if len(packed.values) * packed.values.itemsize < packed.kept * packed.values.itemsize + VALUE_PADDING:
        raise SecateurError("its values end too early")
    if packed.scales is not None:
        if not packed.scales.isfinite().all():
            raise SecateurError("its scales are not finite")
        if (packed.values[: packed.kept] < -LARGEST).any():  # sums of the kernels would overflow
            raise SecateurError(f"its 8-bit values go beyond -{LARGEST}")
    panels_of_one = max(1, len(packed.masks) // max(1, packed.stack))
    last_panels = packed.masks[panels_of_one - 1 :: panels_of_one].numpy().view(np.uint32)
    if (rows := packed.rows % ROWS) and (last_panels >> np.uint32(COLUMNS * rows)).any():
        raise SecateurError("its masks have bits below the last row")
    if packed.columns % COLUMNS and (packed.masks[:, -1].numpy().view(np.uint32) & np.uint32(0xAAAAAAAA)).any():
        raise SecateurError("its masks have bits after the last column")


def _bits_of(masks: Int[Tensor, "panels blocks"]) -> np.ndarray:
    panels, blocks = masks.shape
    bits = np.unpackbits(masks.contiguous().numpy().view(np.uint8).reshape(-1), bitorder="little")
    return bits.reshape(panels, blocks, ROWS, COLUMNS).view(bool)


def _popcounts(masks: Int[Tensor, "panels blocks"]) -> np.ndarray:
    """Number of kept values of each panel."""
    return np.bitwise_count(masks.numpy().view(np.uint32)).sum(axis=1, dtype=np.int64)
