"""Options by dotted name, as `--set refit.rate=0.01` and `compare` write them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from secateur.errors import SecateurError, nearest
from secateur.recipe.declare import RecipeError, fields_of, plain, unknown_option
from secateur.recipe.patterns import NM
from secateur.recipe.recipe import CalibrationText, Recipe
from secateur.recipe.solvers import SOLVERS, plain_solver
from secateur.recipe.steps import Allocation, BlockRefit, ChannelPermutation, DenseTarget, SwapRefinement

P = ParamSpec("P")
T = TypeVar("T")

SECTIONS: dict[str, type] = {
    "target": DenseTarget,
    "refine": SwapRefinement,
    "refit": BlockRefit,
    "allocation": Allocation,
    "permutation": ChannelPermutation,
}


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs; a value is read as YAML, so numbers, true, null and lists are that.

    Raises:
        RecipeError: a text without a name, an equals sign or a value, or a name given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise RecipeError(f"{text!r} is not a setting: write NAME=VALUE, such as refit.rate=0.01")
        if name.strip() in settings:
            raise RecipeError(f"{name.strip()} is set twice")
        settings[name.strip()] = read_value(value)
    return settings


def read_value(text: str) -> Any:
    """A value as YAML reads it; anything else is text."""
    try:
        return plain_data(YAML(typ="safe", pure=True).load(text))
    except YAMLError:
        return text


def plain_data(value: Any) -> Any:
    """Nested YAML containers as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, list) else value


def apply_settings(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with some options replaced.

    A section that was off is turned on by an option of it, and off by `none`. A solver that is named anew starts from
    its defaults. The order of the settings does not matter.

    Raises:
        RecipeError: a name that the recipe does not have.
    """
    data = copy.deepcopy(dict(recipe))
    for name in sorted(settings, key=lambda name: ("." in name, name != "solver.name")):
        value = settings[name]
        section, dot, option = name.partition(".")
        if section not in fields_of(Recipe):
            if places := _dotted(name):
                raise RecipeError(
                    f"the recipe has no option {name!r} outside of its sections: write {' or '.join(places)}"
                )
            raise RecipeError(unknown_option(section, "", Recipe, (section,)), (section,))
        if not dot:
            data[section] = None if value == "none" and section in SECTIONS else value
            continue
        if "." in option or section not in (*SECTIONS, "solver", "calibration"):
            raise RecipeError(f"{name} is not an option of a recipe: write SECTION.OPTION=VALUE", (section,))
        held = _section(section, data.get(section))
        if name == "solver.name" and held.get("name") != value:
            held = {}
        data[section] = held | {option: value}
    return data


def check_kind_of_pattern(made_for: Any, found: Recipe, changed: set[str]) -> None:
    """Check that steps of a recipe that were not changed are still for the kind of pattern that they were made for.

    Raises:
        RecipeError: an allocation or a refit for unstructured patterns, and now n:m, or the reverse.
    """
    is_same = (":" in str(made_for)) == isinstance(found.pattern, NM)
    kept = [name for name in ("allocation", "refit") if getattr(found, name) is not None and name not in changed]
    if kept and not is_same:
        raise RecipeError(
            f"the recipe was made for {made_for}, and its {' and '.join(kept)} do not suit "
            f"{found.pattern}: name the preset, or make a new recipe (secateur recipe NAME --pattern "
            f"{found.pattern}, or Recipe.preset(NAME, {str(found.pattern)!r}))",
            ("pattern",),
        )


def _section(name: str, value: Any) -> dict[str, Any]:
    """A section of a recipe's data as a dictionary; what is not said of a solver is the default one's."""
    if value is None:
        return {"name": Recipe().solver.name} if name == "solver" else {}
    if name == "solver" and isinstance(value, str):
        return {"name": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_solver(value) if name == "solver" else plain(value)
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} is {value!r}: it must be a mapping of options", (name,))
    return dict(value)


def stated_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says other than the defaults, as data."""
    values, defaults = plain(recipe), plain(Recipe())
    stated = {name: value for name, value in values.items() if value != defaults[name]}
    if "calibration" in stated:
        usual = defaults["calibration"]
        stated["calibration"] = {name: value for name, value in values["calibration"].items() if value != usual[name]}
    return stated


def value_at(data: Mapping[str, Any], name: str) -> Any:
    """The option of a dotted name; None where the data does not have it, or only by default."""
    section, dot, option = name.partition(".")
    found = data.get(section)
    if not dot:
        return found
    if isinstance(found, CalibrationText):
        found = stated_settings(Recipe(calibration=found)).get("calibration")
    return found.get(option) if isinstance(found, Mapping) else None


def checks_names(function: Callable[P, T]) -> Callable[P, T]:
    """Name the nearest argument for a misspelt one."""
    known = list(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if unknown := [name for name in kwargs if name not in known]:
            raise SecateurError(
                f"{function.__name__}() has no argument {unknown[0]!r}: its arguments are {', '.join(known)}"
                f"{nearest(unknown[0], known)}{_as_setting(unknown[0])}"
            )
        return function(*args, **kwargs)

    return checked


def _as_setting(name: str) -> str:
    """A hint for an option of a section, given as an argument."""
    if name == "sparsity":
        return " (write pattern='50%')"
    places = _dotted(name) or [name] * (name in fields_of(Recipe))
    written = " or ".join(f"settings={{'{place}': ...}}" for place in places)
    return f" (write {written})" if places else ""


def _dotted(name: str) -> list[str]:
    """The dotted names of an option in the sections that have it."""
    sections = SECTIONS | {"calibration": CalibrationText}
    places = [f"{section}.{name}" for section, kind in sections.items() if name in fields_of(kind)]
    return places + ["solver." + name] * any(name in fields_of(kind) for kind in SOLVERS.values())
