"""A comparison as papers print it: one row a recipe, one column a figure and pattern; dense in the first row.

Figures are means over seeds, with the sample standard deviation where there are several.
"""

from __future__ import annotations

import csv
import io
import statistics

from secateur.comparison.results import DENSE, Comparison
from secateur.evaluation.tasks import headline

LOWER_IS_BETTER = ("layer error", "seconds", "memory GB")  # and perplexities and divergences


def columns_of(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Cell key -> column -> figure, for every figure that a table shows."""
    found: dict[str, dict[str, float]] = {}
    for key, cell in comparison.cells.items():
        figures = {f"ppl {text}": value for text, value in cell["perplexity"].items()}
        figures |= {f"KL {text}": value for text, value in cell.get("divergence", {}).items()}
        figures |= {f"top-1 {text}": value for text, value in cell.get("top1_agreement", {}).items()}
        for task, values in cell.get("tasks", {}).items():
            figures[task] = headline(values)
        for name, column, unit in (
            ("layer_error", "layer error", 1.0),
            ("seconds", "seconds", 1.0),
            ("peak_memory", "memory GB", 1e9),
        ):
            if cell.get(name) is not None:
                figures[column] = cell[name] / unit
        found[key] = figures
    return found


def tables(comparison: Comparison) -> dict[str, list[list[str]]]:
    """Pattern -> a table: the header, the dense row, then a row a recipe. Unstructured patterns come first."""
    figures = columns_of(comparison)
    keys = [key.rsplit(" ", 2) for key in comparison.cells if key != DENSE]
    patterns = sorted({pattern for _, pattern, _ in keys}, key=lambda pattern: (":" in pattern, pattern))
    hidden = members(comparison)
    return {pattern: _table(figures, [key for key in keys if key[1] == pattern], hidden) for pattern in patterns}


def _table(figures: dict[str, dict[str, float]], keys: list[list[str]], hidden: set[str]) -> list[list[str]]:
    recipes = list(dict.fromkeys(recipe for recipe, _, _ in keys))
    every = [DENSE, *(" ".join(key) for key in keys)]
    columns = list(dict.fromkeys(name for key in every for name in figures.get(key, {}) if name not in hidden))
    columns.sort(key=lambda name: name in LOWER_IS_BETTER)  # stable: these go last
    rows = [["recipe", "seeds", *columns]]
    if DENSE in figures:
        rows.append(
            [DENSE, "", *(_cell(name, [figures[DENSE][name]]) if name in figures[DENSE] else "" for name in columns)]
        )
    for recipe in recipes:
        mine = [figures[" ".join(key)] for key in keys if key[0] == recipe]
        rows.append(
            [recipe, str(len(mine)), *(_cell(name, [cell[name] for cell in mine if name in cell]) for name in columns)]
        )
    return rows


def members(comparison: Comparison) -> set[str]:
    """Tasks that the harness ran as members of a group that was asked for; a table shows the group alone."""
    cells = comparison.cells.values()
    ran = {task for cell in cells for task in cell.get("tasks", {})}
    return ran - {task for cell in cells for task in cell.get("tasks_asked", cell.get("tasks", ()))}


def _cell(name: str, values: list[float]) -> str:
    """Mean, and the spread over seeds where there is one."""
    if not values:
        return ""
    digits = {"layer error": 4, "seconds": 0, "memory GB": 2}.get(name, 2 if name.startswith("ppl ") else 4)
    mean = f"{statistics.mean(values):.{digits}f}"
    spread = len(values) > 1 and name not in ("seconds", "memory GB")
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if spread else mean


def to_csv(comparison: Comparison) -> str:
    """One line a cell, nothing averaged."""
    figures = columns_of(comparison)
    columns = list(dict.fromkeys(name for cell in figures.values() for name in cell))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["recipe", "pattern", "seed", *columns])
    for key, cell in figures.items():
        name = [DENSE, "", ""] if key == DENSE else key.rsplit(" ", 2)
        writer.writerow([*name, *(cell.get(column, "") for column in columns)])
    return text.getvalue()
