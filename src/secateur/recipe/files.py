"""The recipe file: YAML 1.2 (where `2:4` is text), JSON, or the `secateur.json` of a finished run."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, ScalarEvent
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from secateur.recipe.declare import RecipeError, fields_of, plain
from secateur.recipe.recipe import Recipe
from secateur.recipe.settings import SECTIONS, plain_data
from secateur.recipe.solvers import SOLVERS

MAX_BYTES = 64 << 20  # a secateur.json has a few kB a matrix
MAX_DEPTH = 50
COMMENT_WIDTH = 100


@dataclass(frozen=True)
class RecipeFile:
    """What a file says, and where.

    Args:
        data: the recipe as plain data; what it leaves out has its default.
        lines: line of each option, from 1, by its location.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]

    def recipe(self, data: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of this file, or of changed data of it.

        Raises:
            RecipeError: the message names file, line and option.
        """
        try:
            return Recipe.from_dict(self.data if data is None else data)
        except RecipeError as error:
            raise RecipeError(f"{self.place(error.location)}: {error.raw}", error.location) from None

    def place(self, location: tuple[str | int, ...]) -> str:
        """File and line of an option, or of the section that it belongs to."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.lines:
                return f"{self.path}, line {self.lines[location[:end]]}"
        return str(self.path)


def read_recipe(path: Path) -> RecipeFile:
    """The content of a recipe file, not yet checked against the declarations.

    Raises:
        RecipeError: no such file, no YAML, or no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MB: it is not a recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path} can't be read: {reason}") from error
    try:
        if _depth(text) > MAX_DEPTH:
            raise RecipeError(f"{path} is nested too deeply: it is not a recipe")
        if ("&" in text and "*" in text) or "<<" in text:
            _check_no_alias(path, text)
        found = YAML(typ="rt", pure=True).load(text)
    except RecursionError as error:
        raise RecipeError(f"{path} is nested too deeply: it is not a recipe") from error
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = error.problem if isinstance(error, MarkedYAMLError) else str(error).splitlines()[0]
        raise RecipeError(f"{path}{where}: not valid YAML ({problem})") from error
    if not isinstance(found, CommentedMap):
        kind = "empty" if found is None else type(found).__name__.removeprefix("Commented").lower()
        raise RecipeError(f"{path} is not a recipe: it must be a mapping such as `pattern: 50%`, but it is {kind}")
    if "summary" in found and isinstance(found.get("recipe"), CommentedMap):  # a secateur.json
        found = found["recipe"]
    return RecipeFile(path, plain_data(found), dict(_lines(found)))


def _depth(text: str) -> int:
    """Brackets that are open at once, at most: YAML parsers take seconds for thousands."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_no_alias(path: Path, text: str) -> None:
    """Check that no value stands for another: a few lines of such can stand for more than memory holds."""
    for event in YAML(typ="rt", pure=True).parse(io.StringIO(text)):
        if isinstance(event, AliasEvent):
            raise RecipeError(f"{path}, line {event.start_mark.line + 1}: a recipe can't use YAML aliases (*name)")
        if isinstance(event, ScalarEvent) and event.value == "<<":
            raise RecipeError(f"{path}, line {event.start_mark.line + 1}: a recipe can't use YAML merge keys (<<)")


def _lines(node: Any, location: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], int]]:
    found: list[tuple[tuple[str | int, ...], int]] = []
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            here = (*location, str(key))
            found += [(here, node.lc.key(key)[0] + 1), *_lines(value, here)]
    elif isinstance(node, CommentedSeq):
        for index, value in enumerate(node):
            here = (*location, index)
            found += [(here, node.lc.item(index)[0] + 1), *_lines(value, here)]
    return found


def to_yaml(recipe: Recipe) -> str:
    """A whole recipe as YAML, with the help text of each option above it, and the defaults of sections that are off."""
    data = recipe.to_dict()
    root = _commented(data, Recipe)
    solver = SOLVERS.get(data["solver"]["name"])
    root["solver"] = _commented(data["solver"], solver, indent=2)
    for name, kind in (SECTIONS | {"calibration": type(recipe.calibration)}).items():
        if isinstance(data[name], dict):
            root[name] = _commented(data[name], kind, indent=2)
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    written = io.StringIO()
    yaml.dump(root, written)
    return written.getvalue()


def _commented(data: Mapping[str, Any], kind: type | None, indent: int = 0) -> CommentedMap:
    """A mapping whose options carry their help text as a comment."""
    mapping = CommentedMap()
    declared = {} if kind is None else fields_of(kind)
    for name, value in data.items():
        mapping[name] = _scalar(value)
        if name in declared and (help_text := declared[name].description):
            lines = textwrap.wrap(help_text, COMMENT_WIDTH - indent)
            if value is None and name in SECTIONS:
                lines.append(f"{name}: {_in_one_line(SECTIONS[name]())}")
            mapping.yaml_set_comment_before_after_key(name, before="\n".join(lines), indent=indent)
    return mapping


def _in_one_line(section: Any) -> str:
    """A section with its defaults."""
    return (
        "{" + ", ".join(f"{name}: {'null' if value is None else value}" for name, value in plain(section).items()) + "}"
    )


def _scalar(value: Any) -> Any:
    """Text that older YAML readers would take for a number, such as 2:4, in quotes."""
    if isinstance(value, dict):
        return CommentedMap({key: _scalar(item) for key, item in value.items()})
    if isinstance(value, list):
        return CommentedSeq([_scalar(item) for item in value])
    return DoubleQuotedScalarString(value) if isinstance(value, str) and ":" in value else value
