"""Sizes in bytes: `8GB`, `500MiB`, or a number."""

from __future__ import annotations

import re
from typing import Any

from secateur.errors import SecateurError

SMALLEST = 1000  # bytes that a number without a unit can mean
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: Any, option: str = "max_memory") -> int:
    """Bytes of a size such as `8GB`, `500 MiB` or 1000000.

    Raises:
        SecateurError: not a size, zero, or a number without a unit that can't be bytes.
    """
    text = str(size).strip().upper() if not isinstance(size, bool) else ""
    found = re.fullmatch(r"(\d+)\s*((?:[KMGT]I?)?)B?", text)
    if found is None or int(found[1]) == 0:
        raise SecateurError(f"‹{option}› is {size!r}; write a size such as 8GB, 500MiB or a number of bytes")
    if "B" not in text and not found[2] and int(found[1]) < SMALLEST:
        raise SecateurError(
            f"‹{option}› is {size}, which would be {size} bytes: write {size}GB, or {size}B if you mean it"
        )
    return int(found[1]) * UNITS[found[2]]
