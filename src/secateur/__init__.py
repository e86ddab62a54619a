"""secateur: one-shot pruning of foundation models without retraining.

The public API. Names are imported when first used, so `import secateur` does not import torch. After it, transformers
loads packed models as any others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.packed.registration import register_with_transformers

if TYPE_CHECKING:
    from secateur.api.models import bench, env, evaluate, inspect, load, pack, push, unpack, write_report
    from secateur.api.pruning import coverage_of, dry_run, prune, solve
    from secateur.errors import SecateurError
    from secateur.models.semi_structured import to_semi_structured
    from secateur.recipe.patterns import NM, Pattern, Unstructured, parse_pattern
    from secateur.recipe.recipe import CalibrationText, Recipe, Rule
    from secateur.recipe.solvers import ADMM, MRP, Magnitude, SparseGPT, Wanda
    from secateur.recipe.steps import Allocation, BlockRefit, ChannelPermutation, DenseTarget, SwapRefinement
    from secateur.reporting.report import Report
    from secateur.runtime.progress import ProgressBars
    from secateur.solvers import Solved
    from secateur.training.keep_zeros import keep_zeros
    from secateur.training.trainer import KeepZerosCallback

__version__ = "0.1.0"

_HOME = {
    "ADMM": "secateur.recipe.solvers",
    "MRP": "secateur.recipe.solvers",
    "Magnitude": "secateur.recipe.solvers",
    "SparseGPT": "secateur.recipe.solvers",
    "Wanda": "secateur.recipe.solvers",
    "Allocation": "secateur.recipe.steps",
    "BlockRefit": "secateur.recipe.steps",
    "CalibrationText": "secateur.recipe.recipe",
    "ChannelPermutation": "secateur.recipe.steps",
    "DenseTarget": "secateur.recipe.steps",
    "NM": "secateur.recipe.patterns",
    "Pattern": "secateur.recipe.patterns",
    "ProgressBars": "secateur.runtime.progress",
    "Recipe": "secateur.recipe.recipe",
    "Report": "secateur.reporting.report",
    "Rule": "secateur.recipe.recipe",
    "SecateurError": "secateur.errors",
    "Solved": "secateur.solvers",
    "SwapRefinement": "secateur.recipe.steps",
    "Unstructured": "secateur.recipe.patterns",
    "bench": "secateur.api.models",
    "coverage_of": "secateur.api.pruning",
    "KeepZerosCallback": "secateur.training.trainer",
    "dry_run": "secateur.api.pruning",
    "env": "secateur.api.models",
    "evaluate": "secateur.api.models",
    "inspect": "secateur.api.models",
    "keep_zeros": "secateur.training.keep_zeros",
    "load": "secateur.api.models",
    "pack": "secateur.api.models",
    "parse_pattern": "secateur.recipe.patterns",
    "prune": "secateur.api.pruning",
    "push": "secateur.api.models",
    "solve": "secateur.api.pruning",
    "to_semi_structured": "secateur.models.semi_structured",
    "unpack": "secateur.api.models",
    "write_report": "secateur.api.models",
}

__all__ = [
    "ADMM",
    "MRP",
    "NM",
    "Allocation",
    "BlockRefit",
    "CalibrationText",
    "ChannelPermutation",
    "DenseTarget",
    "KeepZerosCallback",
    "Magnitude",
    "Pattern",
    "ProgressBars",
    "Recipe",
    "Report",
    "Rule",
    "SecateurError",
    "Solved",
    "SparseGPT",
    "SwapRefinement",
    "Unstructured",
    "Wanda",
    "bench",
    "coverage_of",
    "dry_run",
    "env",
    "evaluate",
    "inspect",
    "keep_zeros",
    "load",
    "pack",
    "parse_pattern",
    "prune",
    "push",
    "solve",
    "to_semi_structured",
    "unpack",
    "write_report",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
