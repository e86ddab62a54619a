"""The presets `fast`, `balanced` and `best`: recipes that trade time for accuracy (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.errors import nearest
from secateur.recipe.declare import RecipeError
from secateur.recipe.patterns import NM, Pattern, is_severe, parse_pattern
from secateur.recipe.recipe import Recipe

DEFAULT_PRESET = "balanced"
# Correcting errors of earlier blocks in full overfits where they are large (docs/decisions.md).
REFIT_STRENGTH = 0.6
# Two epochs of the field's 128 x 2048 tokens with those that the model writes: the time of a run stays within reach.
BEST_REFIT_TOKENS = 600_000
# From 60% on four epochs of them, which pay at 70%. At n:m they were not tried (docs/decisions.md).
SEVERE_REFIT_TOKENS = 1_200_000


def fast(_pattern: Pattern) -> dict[str, Any]:
    """The paper's joint removal alone, with a Hessian that is shrunk."""
    return {"solver": {"name": "mrp"}, "shrinkage": "auto"}


def balanced(pattern: Pattern) -> dict[str, Any]:
    """A short joint mask search, a short block refit, and for unstructured patterns an allocation."""
    refit = {"epochs": 1, "rate": 0.00625} | _strength(pattern)
    solver = {"name": "admm", "search_iterations": 4, "tolerance": 0.02}
    if isinstance(pattern, NM):
        return {"solver": solver, "shrinkage": "auto", "refit": refit}
    allocation = {"rule": "curve", "tokens": 4096}
    return {"solver": solver, "shrinkage": "auto", "refit": refit, "allocation": allocation}


def best(pattern: Pattern) -> dict[str, Any]:
    """Joint mask search, a longer block refit, text of the model's own, and for unstructured patterns an allocation.

    At n:m patterns there is no allocation: mixed patterns don't run on hardware made for one. The time goes to the
    search.
    """
    many_zeros = is_severe(pattern) and not isinstance(pattern, NM)
    max_tokens = SEVERE_REFIT_TOKENS if many_zeros else BEST_REFIT_TOKENS
    refit = {"epochs": 4, "max_tokens": max_tokens, "step_tokens": 1024, "val_fraction": 0.125}
    refit |= {"prediction_blocks": 1} | _strength(pattern)
    found = {"shrinkage": "auto", "calibration": {"own_words": "auto"}, "refit": refit}
    if isinstance(pattern, NM):
        return found | {"solver": {"name": "admm", "search_iterations": 24}}
    solver = {"name": "admm", "search_iterations": 12, "penalty_start": 0.4}
    return found | {"solver": solver, "allocation": {"rule": "curve"}}


def _strength(pattern: Pattern) -> dict[str, Any]:
    return {"strength": REFIT_STRENGTH} if is_severe(pattern) else {}


PRESETS: dict[str, Callable[[Pattern], dict[str, Any]]] = {"fast": fast, "balanced": balanced, "best": best}


def preset(name: str, pattern: str | float | Pattern) -> Recipe:
    """A preset's recipe at a pattern.

    Raises:
        RecipeError: an unknown preset.
    """
    return Recipe.from_dict(preset_settings(name, parse_pattern(pattern)) | {"pattern": pattern})


def preset_settings(name: str, pattern: Pattern) -> dict[str, Any]:
    """What a preset says, as part of a recipe's data."""
    if name not in PRESETS:
        raise RecipeError(
            f"unknown recipe {name!r}: choose {', '.join(PRESETS)}, or a file{nearest(name, list(PRESETS))}"
        )
    return PRESETS[name](pattern)
