"""What the scripts that write the pages share: Markdown tables, pictures, and writing or checking files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


@contextmanager
def picture(path: Path) -> Iterator[Any]:
    """Axes to draw on, which are then written as SVG: the same bytes for the same drawing."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
