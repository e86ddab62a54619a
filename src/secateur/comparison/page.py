"""A comparison as a page: perplexity against time as a chart, and tables with the change against dense."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup

from secateur.comparison.cell import DIGEST
from secateur.comparison.results import DENSE, Comparison
from secateur.comparison.table import LOWER_IS_BETTER, columns_of, tables, to_csv
from secateur.reporting.charts import Series, chart
from secateur.reporting.page import render
from secateur.storage.held_folder import write_durably


def to_html(comparison: Comparison) -> str:
    """A page that stands alone."""
    sections = [
        (pattern, _marked(comparison, pattern, rows), _charts(comparison, pattern))
        for pattern, rows in tables(comparison).items()
    ]
    return render(
        "compare.html.j2",
        title=f"{comparison.settings['model'].partition(DIGEST)[0]} after pruning",
        sections=sections,
        settings=_without_empty(comparison.settings),
        environment=_without_empty(comparison.environment),
        command=comparison.command,
    )


def write_pages(comparison: Comparison, out: Path) -> None:
    """Write `compare.csv` and `compare.html`."""
    write_durably(out / "compare.csv", to_csv(comparison))
    write_durably(out / "compare.html", to_html(comparison))


def _marked(comparison: Comparison, pattern: str, rows: list[list[str]]) -> list[list[tuple[str, str, bool]]]:
    """The rows of a pattern's table; each cell is its text, its change against dense, and whether it is the best."""
    means, names = _means(comparison, pattern), rows[0]
    dense = columns_of(comparison).get(DENSE, {})
    best = {name: _best(name, means) for name in names[2:]}
    marked = []
    for row in rows[1:]:
        recipe = row[0]
        cells = [(text, "", False) for text in row[:2]]
        for name, text in zip(names[2:], row[2:], strict=True):
            value, reference = means.get(recipe, {}).get(name), dense.get(name)
            change = f"{value / reference - 1:+.0%}" if value is not None and reference and recipe != DENSE else ""
            cells.append((text, change, value is not None and len(means) > 1 and value == best[name]))
        marked.append(cells)
    return [[(name, "", False) for name in names], *marked]


def _means(comparison: Comparison, pattern: str) -> dict[str, dict[str, float]]:
    """Recipe -> column -> mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, figures in columns_of(comparison).items():
        if key == DENSE:
            continue
        recipe, of_pattern, _seed = key.rsplit(" ", 2)
        if of_pattern == pattern:
            for name, value in figures.items():
                found.setdefault(recipe, {}).setdefault(name, []).append(value)
    return {
        recipe: {name: statistics.mean(values) for name, values in columns.items()} for recipe, columns in found.items()
    }


def _best(name: str, means: dict[str, dict[str, float]]) -> float | None:
    values = [columns[name] for columns in means.values() if name in columns]
    if not values:
        return None
    if name.startswith(("ppl ", "KL ")) or name in LOWER_IS_BETTER:
        return min(values)
    return max(values) if max(values) <= 1 else None  # an accuracy; of another metric the better end is not known


def _charts(comparison: Comparison, pattern: str) -> list[tuple[str, Markup]]:
    """Perplexity against seconds of pruning, a chart a text."""
    means, dense = _means(comparison, pattern), columns_of(comparison).get(DENSE, {})
    texts = [name for name in next(iter(means.values()), {}) if name.startswith("ppl ")]
    found = []
    for text in texts:
        points = [
            (recipe, columns["seconds"], columns[text])
            for recipe, columns in means.items()
            if "seconds" in columns and text in columns
        ]
        if points:
            name = text.removeprefix("ppl ")
            labels, seconds, values = zip(*points, strict=True)
            series = [Series(name, seconds, values, labels, is_line=False)]
            alt = f"Perplexity on {name} against seconds of pruning"
            found.append(
                (
                    name,
                    chart(
                        series, "seconds of pruning", "perplexity", is_log_x=True, reference=dense.get(text), alt=alt
                    ),
                )
            )
    return found


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in values.items() if value is not None}
