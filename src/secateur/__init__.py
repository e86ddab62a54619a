"""secateur: one-shot pruning of foundation models without retraining.

The public API. Names are imported when first used, so `import secateur` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import coverage_of, evaluate, inspect, prune, solve
    from secateur.pattern import NM, Pattern, Unstructured, parse_pattern
    from secateur.report import Report
    from secateur.solvers import Solved

__version__ = "0.1.0"
__all__ = [
    "NM",
    "Pattern",
    "Report",
    "Solved",
    "Unstructured",
    "coverage_of",
    "evaluate",
    "inspect",
    "parse_pattern",
    "prune",
    "solve",
]

_HOME = {
    "NM": "secateur.pattern",
    "Pattern": "secateur.pattern",
    "Report": "secateur.report",
    "Solved": "secateur.solvers",
    "Unstructured": "secateur.pattern",
    "coverage_of": "secateur.api",
    "evaluate": "secateur.api",
    "inspect": "secateur.api",
    "parse_pattern": "secateur.pattern",
    "prune": "secateur.api",
    "solve": "secateur.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
