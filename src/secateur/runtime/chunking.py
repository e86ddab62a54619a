"""Size of the largest temporary of the mathematics: rows are worked on in chunks that fit.

Conjugate gradients stop when every row of a chunk is done, so another chunk size changes a result, within the solver's
tolerance. A run records the size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# Bytes of the largest temporary. On a CPU malloc recycles this much without new page faults, and caches hold it.
DEFAULT = {"cpu": 16 << 20}
DEFAULT_ON_DEVICE = 256 << 20
MIN_CHUNK_BYTES = 1 << 16

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


def chunk_bytes(device: torch.device) -> int:
    """Bytes that the largest temporary may take on a device."""
    usual, limit = DEFAULT.get(device.type, DEFAULT_ON_DEVICE), _limit.get()
    return usual if limit is None else min(usual, limit)


@contextmanager
def max_chunk_bytes(limit: int | None) -> Iterator[None]:
    """Within this context the largest temporary takes at most `limit` bytes; None = the default of the device."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)
