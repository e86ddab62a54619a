"""What `secateur compare` wrote to benchmarks/results/compare: reading it, and what the page's parts make of it."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

from pages import RESULTS

from secateur.comparison.cell import DIGEST
from secateur.comparison.results import Comparison
from secateur.comparison.table import tables

COMPARISONS = RESULTS / "compare"
MAIN = "wikitext2"
COLOURS = {"sparsegpt": "#8fb3d9", "fast": "#a5d6a7", "balanced": "#4caf50", "best": "#1b5e20"}


def read(name: str) -> Comparison:
    """A comparison, its model and texts by name alone."""
    found = Comparison(**json.loads((COMPARISONS / name / "compare.json").read_text(encoding="utf-8")))
    settings = found.settings
    texts = [text.partition(DIGEST)[0] for text in settings["texts"]]
    named = {name: settings[name].partition(DIGEST)[0] for name in ("model", "calibration")} | {"texts": texts}
    return replace(found, settings=settings | named)


def names() -> list[str]:
    return sorted(
        (path.parent.name for path in COMPARISONS.glob("*/compare.json")), key=lambda name: (name != MAIN, name)
    )


def cells(comparison: Comparison, recipe: str, pattern: str) -> dict[str, dict[str, Any]]:
    """Seed -> cell."""
    return {
        key.rsplit(" ", 2)[2]: cell
        for key, cell in comparison.cells.items()
        if key != "dense" and key.rsplit(" ", 2)[:2] == [recipe, pattern]
    }


def patterns_of(comparison: Comparison) -> list[str]:
    return list(tables(comparison))


def recipes_of(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(key.rsplit(" ", 2)[0] for key in comparison.cells if key != "dense"))


def gap_closed(comparison: Comparison, recipe: str, pattern: str, text: str) -> list[float]:
    """(ppl_sparsegpt - ppl_ours) / (ppl_sparsegpt - ppl_dense) for each seed that both were run with."""
    dense = comparison.cells["dense"]["perplexity"][text]
    base, ours = cells(comparison, "sparsegpt", pattern), cells(comparison, recipe, pattern)
    return [
        (base[seed]["perplexity"][text] - ours[seed]["perplexity"][text]) / (base[seed]["perplexity"][text] - dense)
        for seed in ours
        if seed in base
    ]


def spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
