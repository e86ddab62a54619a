"""JSON from files that may be damaged or hostile, and JSON that carries its own digest."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

SEAL = "sha256"
MAX_DEPTH = 64


def parse_json(text: str) -> Any:
    """A value from JSON text that holds finite numbers and valid Unicode.

    Raises:
        SecateurError: it does not, or is nested too deeply.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a character can't be written
    except RecursionError as error:
        raise SecateurError("it is nested too deeply") from error
    if _is_deep(value):
        raise SecateurError("it is nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested more deeply than any file that we read."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for node in level
            if isinstance(node, dict | list)
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise SecateurError(f"{text} is not a finite number")
    return value


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        why: what is said of a missing file.

    Raises:
        SecateurError: the file is missing, no JSON, or no object.
    """
    if not path.is_file():
        raise SecateurError(f"{path} is missing{f': {why}' if why else ''}")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SecateurError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise SecateurError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SecateurError(f"{path} must hold a JSON object")
    return value


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data with its own digest, which `is_sealed` checks."""
    plain = json.loads(json.dumps(data, allow_nan=False))
    return plain | {SEAL: _digest(plain)}


def is_sealed(data: dict[str, Any]) -> bool:
    """Whether data is as it was when it was sealed."""
    return data.get(SEAL) == _digest({name: value for name, value in data.items() if name != SEAL})


def _digest(data: dict[str, Any]) -> str:
    plain = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()
