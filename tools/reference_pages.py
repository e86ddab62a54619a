"""docs/cli.md from the commands, and docs/recipe.md from the declarations of the recipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import typer
from pages import DOCS, table
from ruamel.yaml import YAML

from secateur.cli.app import app
from secateur.recipe.declare import fields_of
from secateur.recipe.patterns import Unstructured
from secateur.recipe.presets import PRESETS, preset_settings
from secateur.recipe.recipe import CalibrationText, Recipe, Rule
from secateur.recipe.settings import SECTIONS
from secateur.recipe.solvers import SOLVERS

NOTE = "Written by `python tools/make_pages.py`; do not edit."


def pages() -> dict[Path, str]:
    """Both pages."""
    return {DOCS / "cli.md": commands_page(), DOCS / "recipe.md": recipe_page()}


def commands_page() -> str:
    """One section a command, one row an argument or flag."""
    parts = ["# Commands", f"{NOTE} Errors in what you ask for end with exit code 2."]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        usage = " ".join(param.metavar or param.name.upper() for param in command.params if is_argument(param))
        rows = [flag_row(param) for param in command.params if param.name != "help"]
        parts += [f"## secateur {name} {usage}".rstrip(), command.help, table(["", "", "default"], rows)]
    return "\n\n".join(parts) + "\n"


def is_argument(param: Any) -> bool:
    """Whether a parameter is positional."""
    return param.param_type_name == "argument"


def flag_row(param: Any) -> list[str]:
    """One row; switches and flags without a default have an empty last cell."""
    spelled = param.metavar if is_argument(param) else ", ".join(param.opts)
    if not is_argument(param) and not param.is_flag:
        spelled += f" {param.metavar}"
    silent = param.default is None or param.default is False or param.required
    return [f"`{escaped(spelled)}`", escaped(param.help), "" if silent else f"`{param.default}`"]


def recipe_page() -> str:
    """Every option of a recipe, from its declaration."""
    sections = {**SECTIONS, "calibration": CalibrationText}
    parts = [
        "# Recipes",
        f"{NOTE} A recipe is everything that decides which weights a run removes and what the others become. It is a "
        "YAML or JSON file, a `secateur.Recipe`, or the name of a preset.",
        "```\n"
        "secateur recipe balanced > mine.yaml           # a whole recipe, with the help text of every option\n"
        "secateur prune MODEL OUT --recipe mine.yaml --set refit.rate=0.01\n"
        "secateur recipe --schema                       # the JSON schema, for editors\n"
        "```",
        "Every run writes `recipe.yaml` next to the model. That file, or `secateur.json`, gives the same bits on the same "
        "machine. A flag may fill in what a recipe leaves open, and may not contradict it; `--set` changes it. An option of "
        "a section that is off turns the section on, and `--set refit=none` turns it off.",
        "## Rules",
        "Exceptions for matrices by name. The last rule that matches a matrix decides; what it leaves out is the recipe's. "
        "An allocation spreads zeros over the matrices that no rule gives a pattern. Routers, norms and learned queries "
        "stay dense unless a rule says `dense: false`.",
        "```yaml\npattern: 60%\nrules:\n"
        '- {match: "*.mlp.*", pattern: "2:4"}\n'
        '- {match: ["model.layers.0.*", "model.layers.29.*"], dense: true}\n```',
        options_table(Rule),
        "## Options",
        options_table(Recipe),
    ]
    for name, kind in sections.items():
        parts += [f"### {name}", first_line(kind), options_table(kind)]
    for name, kind in SOLVERS.items():
        parts += [f"### solver: {name}", first_line(kind)]
        parts += [options_table(kind)] if fields_of(kind) else ["No options."]
    parts += [
        "## Presets",
        "As they are at 50%. `secateur recipe NAME --pattern PATTERN` prints one for another pattern. From 60% on and "
        "at n:m, `balanced` and `best` have refit strength 0.6. From 60% on `best` has `max_tokens` 1200000. At n:m no preset has "
        "an allocation, and `best` has 24 search iterations and `penalty_start` 0.2.",
    ]
    for name, function in PRESETS.items():
        parts += [f"`{name}`: {(function.__doc__ or '').splitlines()[0]}", f"```yaml\n{short_yaml(name)}```"]
    return "\n\n".join(parts) + "\n"


def first_line(kind: type) -> str:
    """The summary line of a section."""
    return (kind.__doc__ or "").splitlines()[0]


def short_yaml(name: str) -> str:
    """What a preset says at 50%."""
    written = io.StringIO()
    YAML(typ="safe", pure=True).dump(preset_settings(name, Unstructured(0.5)), written)
    return written.getvalue()


def options_table(kind: type) -> str:
    """One row an option."""
    rows = [[f"`{name}`", escaped(field.description), default_of(field)] for name, field in fields_of(kind).items()]
    return table(["", "", "default"], rows)


def default_of(field: Any) -> str:
    """The default of an option, as it is written; sections show nothing."""
    value = field.default
    if value is None or value == () or field.is_required() or hasattr(value, "__pydantic_fields__"):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")
