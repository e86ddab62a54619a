"""What the scripts that write the pages share: Markdown tables, and writing or checking files."""

from __future__ import annotations

import sys
from pathlib import Path


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def write_or_check(pages: dict[Path, str]) -> None:
    """Write the pages; with `--check` on the command line end with the names of those that are out of date instead."""
    if "--check" in sys.argv:
        stale = [str(path) for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
        sys.exit(f"out of date: {', '.join(stale)}" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
