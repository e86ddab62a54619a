"""Options by dotted name, as `--set refit.rate=0.01` and `compare` write them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from secateur.errors import SecateurError, nearest
from secateur.recipe.declare import RecipeError, fields_of, plain, unknown_option
from secateur.recipe.recipe import Recipe
from secateur.recipe.solvers import SOLVERS
from secateur.recipe.steps import Allocation, BlockRefit, DenseTarget, SwapRefinement

P = ParamSpec("P")
T = TypeVar("T")

SECTIONS: dict[str, type] = {
    "target": DenseTarget,
    "refine": SwapRefinement,
    "refit": BlockRefit,
    "allocation": Allocation,
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
    """A value as YAML reads it; what is no YAML is text."""
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
    its defaults.

    Raises:
        RecipeError: a name that the recipe does not have.
    """
    data = copy.deepcopy(dict(recipe))
    for name, value in settings.items():
        section, dot, option = name.partition(".")
        if section not in fields_of(Recipe):
            raise RecipeError(unknown_option(section, "", Recipe, (section,)), (section,))
        if not dot:
            data[section] = None if value == "none" and section in SECTIONS else value
            continue
        if "." in option or section not in (*SECTIONS, "solver", "calibration"):
            raise RecipeError(f"{name} is not an option of a recipe: write SECTION.OPTION=VALUE", (section,))
        before = data.get(section)
        held = {"name": before} if isinstance(before, str) else dict(before) if isinstance(before, Mapping) else {}
        if name == "solver.name" and held.get("name") != value:
            held = {}
        data[section] = held | {option: value}
    return data


def stated_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says other than the defaults, as data."""
    defaults = plain(Recipe())
    return {name: value for name, value in plain(recipe).items() if value != defaults[name]}


def value_at(data: Mapping[str, Any], name: str) -> Any:
    """The option of a dotted name; None where the data does not have it."""
    section, dot, option = name.partition(".")
    found = data.get(section)
    if not dot:
        return found
    return found.get(option) if isinstance(found, Mapping) else None


def describe_error(error: SecateurError) -> str:
    """The dotted name of a wrong option, for a message."""
    return ".".join(map(str, error.location)) if isinstance(error, RecipeError) else ""


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
    places = [section for section, kind in SECTIONS.items() if name in fields_of(kind)]
    places += ["solver"] if any(name in fields_of(kind) for kind in SOLVERS.values()) else []
    places = places or ([""] if name in fields_of(Recipe) else [])
    return f" (write settings={{'{f'{places[0]}.{name}'.lstrip('.')}': ...}})" if places else ""
