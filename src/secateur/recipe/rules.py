"""Which rule holds for a matrix: the last one that matches its name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from secateur.errors import SecateurError
from secateur.recipe.patterns import Pattern
from secateur.recipe.recipe import Recipe, Rule

NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class MatrixRecipe:
    """What a recipe says of one matrix.

    Args:
        pattern: its pattern.
        own_pattern: whether a rule names that pattern; an allocation leaves it as it is.
        solver: the options of its solver.
    """

    pattern: Pattern
    own_pattern: bool
    solver: Any


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a matrix's name, or equals it: experts' names have brackets, a set for globs."""
    return name == glob or fnmatchcase(name, glob)


def rule_for(recipe: Recipe, name: str) -> Rule | None:
    """The last rule that matches a matrix."""
    found = [rule for rule in recipe.rules if any(matches(name, glob) for glob in rule.match)]
    return found[-1] if found else None


def matrix_recipe(recipe: Recipe, name: str) -> MatrixRecipe:
    """Pattern and solver of a matrix."""
    rule = rule_for(recipe, name)
    if rule is None:
        return MatrixRecipe(recipe.pattern, False, recipe.solver)
    pattern = recipe.pattern if rule.pattern is None else rule.pattern
    return MatrixRecipe(pattern, rule.pattern is not None, recipe.solver if rule.solver is None else rule.solver)


def check_rules_match(rules: Sequence[Rule], names: Collection[str]) -> None:
    """Check that every glob matches a matrix.

    Raises:
        SecateurError: one does not; the message lists the nearest names.
    """
    for glob in dict.fromkeys(glob for rule in rules for glob in rule.match):
        if not any(matches(name, glob) for name in names):
            for wider in (f"{glob}.*", f"*.{glob}.*", f"*.{glob}", f"*{glob}*"):
                if any(matches(name, wider) for name in names):
                    raise SecateurError(f"no matrix matches {glob!r}, as a glob is on the whole name: write {wider!r}")
            near = get_close_matches(glob, list(names), n=NAMES_IN_MESSAGE, cutoff=0.0)
            raise SecateurError(
                f"no matrix matches {glob!r}: rules, ‹include› and ‹exclude› are globs on names; the nearest are "
                f"{', '.join(near)}"
            )
