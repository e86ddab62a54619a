"""Memory of files that are mapped."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED of Linux


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is mapped from a file and was read for the last time.

    transformers maps a file as a whole, so the bytes that were decoded would stay in memory for as long as another
    tensor of the file is used. Other tensors stay as they are; so do all where there is no /proc.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # only pages that hold nothing else
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and _lies_in_a_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


def _lies_in_a_file(first: int, last: int) -> bool:
    """Whether one mapping of a file holds all addresses from `first` to `last`."""
    if not _MAPS.exists():
        return False
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        area, _permissions, _offset, _device, inode, *_path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in area.split("-"))
        if start <= first and last <= end:
            return inode != "0"
    return False
