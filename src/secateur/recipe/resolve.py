"""From what a user asks for (a recipe by name, file or object, and single options) to one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.recipe.declare import RecipeError, plain
from secateur.recipe.files import RecipeFile, read_recipe
from secateur.recipe.patterns import NM, check_asked_pattern, parse_pattern
from secateur.recipe.presets import DEFAULT_PRESET, PRESETS, preset_settings
from secateur.recipe.recipe import Recipe
from secateur.recipe.settings import apply_settings, check_kind_of_pattern, stated_settings, value_at
from secateur.recipe.solvers import plain_solver
from secateur.storage.paths import user_path

SHORTCUTS = {  # keyword and flag -> option of the recipe
    "pattern": "pattern",
    "solver": "solver",
    "calibration": "calibration.source",
    "text_field": "calibration.text_field",
    "samples": "calibration.samples",
    "seq_len": "calibration.seq_len",
    "seed": "seed",
    "max_memory": "max_memory",
}


def resolve_recipe(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **shortcuts: Any,
) -> Recipe:
    """The recipe of a run.

    Args:
        recipe: a recipe, its data, the name of a preset or of a file. None is the preset `balanced`, or the solver
            alone where one is named. What a `Recipe` has by default is open, apart from its pattern and its solver.
        settings: options by dotted name, which win over the recipe.
        include: globs; only these matrices are pruned, and of them none that is dense by default, such as routers.
        exclude: globs; these matrices stay dense.
        shortcuts: options by the names of `SHORTCUTS`, None = not given. They may fill in what the recipe leaves open,
            and may not contradict it.

    Raises:
        RecipeError: an unknown name or option, a wrong value, or a shortcut that contradicts the recipe.
    """
    given = {SHORTCUTS[name]: value for name, value in shortcuts.items() if value is not None}
    if not isinstance(settings, Mapping | None):
        raise RecipeError(f"‹settings› is {settings!r}: give a dictionary, such as {{'refit.rate': 0.01}}")
    settings = dict(settings or {})
    data, file = _stated(recipe, given, settings)
    made_for = recipe.pattern if isinstance(recipe, Recipe) else data.get("pattern")
    for option, value in given.items():
        data = _filled_in(data, file, recipe, option, value)
    data = apply_settings(data, settings)
    added = _rules(include, exclude, bool(data.get("rules")))
    if added:
        data["rules"] = [*_rules_of(data), *added]
    for stated in (data, *_rules_of(data)):
        check_asked_pattern(stated.get("pattern") if isinstance(stated, Mapping) else None)
    found = Recipe.from_dict(data) if file is None else file.recipe(data)
    changed = {name.partition(".")[0] for name in settings}
    if made_for is not None:
        check_kind_of_pattern(made_for, found, changed)
    elif file is not None and "allocation" not in changed:
        _check_asked_mix(found)
    _check_allocation(found)
    return found


def _check_asked_mix(recipe: Recipe) -> None:
    """Check that a recipe whose file names no pattern mixes n:m patterns only where the user asks for it.

    Raises:
        RecipeError: its allocation would mix them.
    """
    if isinstance(recipe.pattern, NM) and recipe.allocation is not None:
        raise RecipeError(
            f"the recipe names no pattern, and its allocation would mix {recipe.pattern} with others, which no "
            f"hardware speeds up: make a recipe for it (secateur recipe NAME --pattern {recipe.pattern}), or ask for "
            f"the mix with ‹settings.allocation.rule={recipe.allocation.rule}›",
            ("allocation",),
        )


def _check_allocation(recipe: Recipe) -> None:
    """Check that an allocation can do anything.

    Raises:
        RecipeError: at n:m, it may mix the pattern with no other one.
    """
    pattern, allocation = recipe.pattern, recipe.allocation
    if isinstance(pattern, NM) and allocation is not None and len(pattern.near(allocation.spread)) == 1:
        raise RecipeError(
            f"an allocation with a spread of {allocation.spread:g} mixes {pattern} with no other pattern: raise the "
            f"spread, or leave the allocation out",
            ("allocation", "spread"),
        )


def _stated(
    recipe: Recipe | str | Path | Mapping[str, Any] | None, given: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], RecipeFile | None]:
    """What the recipe says, as data, and the file that it comes from."""
    if isinstance(recipe, Recipe):
        own = {"pattern": str(recipe.pattern), "solver": plain_solver(recipe.solver)}
        return stated_settings(recipe) | own, None
    if isinstance(recipe, Mapping):
        return dict(recipe), None
    if recipe is None:
        if {"solver", "solver.name"} & {*given, *settings}:
            return {}, None
        recipe = DEFAULT_PRESET
    if not isinstance(recipe, str | Path):
        raise RecipeError(
            f"recipe is a {type(recipe).__name__}: give a Recipe, a preset's name, a file or a dictionary"
        )
    if str(recipe) not in PRESETS and (Path(recipe).suffix or user_path(recipe).exists()):
        file = read_recipe(user_path(recipe))
        return dict(file.data), file
    pattern = settings.get("pattern", given.get("pattern", "50%"))
    return preset_settings(str(recipe), parse_pattern(pattern)), None


def _filled_in(data: dict[str, Any], file: RecipeFile | None, recipe: Any, option: str, value: Any) -> dict[str, Any]:
    """The data with an option that it leaves open.

    Raises:
        RecipeError: it says something else.
    """
    stated = value_at(data, option)
    if stated is None:
        return apply_settings(data, {option: value})
    if _same(option, stated, value):
        return data
    place = file.place(tuple(option.split("."))) if file is not None else f"the recipe {recipe}"
    place = "the recipe" if isinstance(recipe, Recipe | Mapping) else place
    shortcut = next(name for name, known in SHORTCUTS.items() if known == option)
    raise RecipeError(
        f"{place} says {option}: {_short(stated)}, and ‹{shortcut}={_short(value)}› contradicts it: leave one out, or "
        f"change the recipe with ‹settings.{option}={_short(value)}›",
        tuple(option.split(".")),
    )


def _same(option: str, stated: Any, value: Any) -> bool:
    """Whether two spellings of an option mean the same. A solver's name agrees with any options of that solver."""
    if option == "solver" and isinstance(value, str) and isinstance(stated, Mapping):
        return stated.get("name") == value
    try:
        ours, theirs = (plain(Recipe.from_dict(apply_settings({}, {option: each}))) for each in (stated, value))
    except SecateurError:  # a wrong value is named when the whole recipe is checked
        return stated == value
    return ours == theirs


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"])
    return str(getattr(value, "name", value))


def _rules_of(data: Mapping[str, Any]) -> list[Any]:
    rules = data.get("rules") or []
    return list(rules) if isinstance(rules, list | tuple) else [rules]  # what is wrong is named with the whole recipe


def _rules(include: Sequence[str], exclude: Sequence[str], with_others: bool) -> list[dict[str, Any]]:
    """Rules for what `include` and `exclude` name."""
    if include and with_others:
        raise RecipeError("‹include› can't be combined with a recipe's rules: write a rule for the others instead")
    only = [{"match": "*", "dense": True}, {"match": list(include), "dense": "auto"}] if include else []
    return only + ([{"match": list(exclude), "dense": True}] if exclude else [])
