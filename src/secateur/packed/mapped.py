"""Memory of files that are mapped."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

DONT_NEED = 4  # MADV_DONTNEED of Linux and macOS


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is mapped from a file and was read for the last time.

    transformers maps a file as a whole, so the bytes that were decoded would stay in memory for as long as another
    tensor of the file is used. A tensor that is not a part of a larger storage comes from elsewhere, and stays as it is.
    """
    if tensor.untyped_storage().nbytes() <= tensor.nbytes:
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # only pages that hold nothing else
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)
