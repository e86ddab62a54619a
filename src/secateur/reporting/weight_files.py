"""What the weight files of a folder show: their size, what packing gives, and pictures of a few masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from secateur.models.matrices import parameter_of
from secateur.packed.files import dense
from secateur.reporting.charts import picture_of_mask
from secateur.reporting.figures import MatrixReport
from secateur.storage.checkpoint_files import PACKED_STEM

SIDE = 64  # rows and columns of a picture
PICTURES = 4
ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class MaskPicture:
    """The upper left corner of a mask, as a data URI."""

    name: str
    sparsity: float
    uri: str


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of a folder.

    Args:
        bytes: of all of them.
        packed_bytes: what the weights take when they are packed, in memory; None where they are already.
        pictures: of a few masks.
    """

    bytes: int
    packed_bytes: int | None
    pictures: list[MaskPicture]


def read_weight_files(folder: Path, matrices: Sequence[MatrixReport]) -> WeightFiles | None:
    """Figures and pictures of a folder's weight files; None where there are none.

    Args:
        folder: of a pruned model, packed or not.
        matrices: of the run.

    Raises:
        SafetensorError, SecateurError: damaged files.

    Cost: a read of the files' headers, and of at most four matrices.
    """
    paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file() and not path.is_symlink())
    if not paths:
        return None
    is_packed = any(path.name.startswith(PACKED_STEM) for path in paths)
    wanted: dict[str, list[MatrixReport]] = {}
    for matrix in examples(matrices):
        wanted.setdefault(parameter_of(matrix.name), []).append(matrix)
    pictures: dict[str, MaskPicture] = {}
    sizes: dict[int, int] = {}  # bytes of tensors by the bytes of an element
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = file.get_slice(key)
                itemsize = ITEMSIZES.get(part.get_dtype(), 0)
                sizes[itemsize] = sizes.get(itemsize, 0) + itemsize * math.prod(part.get_shape())
                for matrix in wanted.get(key.removesuffix(".weight"), ()):
                    stored = dense(file.get_tensor(key), key) if is_packed else part
                    pictures[matrix.name] = _picture(matrix, stored)
    total = sum(path.stat().st_size for path in paths)
    main_size = max(sizes, key=lambda size: sizes[size], default=0)
    saved = sum(_saved_by_packing(matrix, main_size) for matrix in matrices)
    in_order = [pictures[each.name] for each in examples(matrices) if each.name in pictures]
    return WeightFiles(total, None if is_packed else total - saved, in_order)


def examples(matrices: Sequence[MatrixReport]) -> list[MatrixReport]:
    """Matrices to picture: those with the fewest and most zeros, the largest layer error, and the middle one."""
    if not matrices:
        return []
    found = [
        min(matrices, key=lambda matrix: matrix.sparsity),
        max(matrices, key=lambda matrix: matrix.sparsity),
        max(matrices, key=lambda matrix: matrix.relative_error),
        matrices[len(matrices) // 2],
    ]
    return list({matrix.name: matrix for matrix in found}.values())[:PICTURES]


def _saved_by_packing(matrix: MatrixReport, itemsize: int) -> int:
    """Bytes that a bitmask and the kept values need less than the dense matrix."""
    return max(0, matrix.zeros * itemsize - matrix.rows * matrix.columns // 8)


def _picture(matrix: MatrixReport, stored: Any) -> MaskPicture:
    """Of a stored matrix, or of one in a stack; a tensor, or a slice of a file."""
    _, bracket, index = matrix.name.partition("[")
    corner = stored[int(index.rstrip("]")), :SIDE, :SIDE] if bracket else stored[:SIDE, :SIDE]
    kept = corner != 0
    kept = kept if matrix.input_dim == 1 else kept.T
    return MaskPicture(matrix.name, matrix.sparsity, picture_of_mask(kept.numpy()))
