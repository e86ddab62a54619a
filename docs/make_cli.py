"""Write docs/cli.md from the commands' own declarations: `python docs/make_cli.py`, or `--check` that it is current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from pages import write_or_check

from secateur.cli import app

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """The page: one section a command, one row an argument or option."""
    parts = [
        "# Commands",
        "Written by `python docs/make_cli.py`; do not edit. Errors in what you ask for end with exit code 2.",
    ]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        usage = " ".join(param.metavar or param.name.upper() for param in command.params if is_argument(param))
        rows = [row(param) for param in command.params if param.name != "help"]
        parts += [
            f"## secateur {name} {usage}".rstrip(),
            command.help,
            "\n".join(["| | | default |", "|---|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def is_argument(param: Any) -> bool:
    return param.param_type_name == "argument"


def row(param: Any) -> str:
    """One table row; nothing is shown as the default of switches and of options without one."""
    spelled = param.metavar if is_argument(param) else ", ".join(param.opts)
    silent = param.default is None or param.default is False or param.required
    default = "" if silent else f"`{param.default}`"
    return f"| `{spelled}` | {param.help} | {default} |"


if __name__ == "__main__":
    write_or_check({PAGE: page()})
