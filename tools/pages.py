"""What the scripts that write the pages share: Markdown tables, pictures, and writing or checking files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def read_result(name: str) -> Any:
    """The content of a JSON in benchmarks/results."""
    return json.loads((RESULTS / name).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Picture:
    """A picture of some data. It is up to date when it was drawn from the same data.

    Args:
        path: an SVG file.
        data: plain data that it shows.
        draw: draws the data on axes of matplotlib.
    """

    path: Path
    data: Any
    draw: Callable[[Any, Any], None]

    @property
    def digest(self) -> str:
        """SHA-256 of the data, which the file holds in its description."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    def is_current(self) -> bool:
        """Whether the file shows this data."""
        return self.path.is_file() and f"data {self.digest}" in self.path.read_text(encoding="utf-8")

    def write(self) -> None:
        """Draw the file: the same bytes for the same data and version of matplotlib."""
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams["svg.hashsalt"] = "secateur"
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        self.draw(axes, self.data)
        figure.savefig(self.path, metadata={"Date": None, "Description": f"data {self.digest}"})
        plt.close(figure)
