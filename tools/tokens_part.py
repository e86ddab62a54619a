"""Accuracy against calibration tokens: a table and a picture of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from typing import Any

from comparisons import cells, gap_closed, names, read, spread
from pages import DOCS, Picture, table

from secateur.comparison.results import Comparison

# From few tokens to many.
FOLDERS = ("tokens-4k", "wikitext2", "protocol")
PATTERN, RECIPES = "50%", ("sparsegpt", "best")
LABELS = {"sparsegpt": "sparsegpt", "best": "best", "best+refit.epochs=1+refit.prediction_blocks=1": "best"}
COLOURS = {"sparsegpt": "#8fb3d9", "best": "#1b5e20"}
TEXTS = {"wikitext2-test.txt": "-", "austen.txt": "--"}


def found() -> dict[int, Comparison]:
    """Calibration tokens -> comparison, of those that are there."""
    there = [read(name) for name in FOLDERS if name in names()]
    return {each.settings["samples"] * each.settings["seq_len"]: each for each in there}


def perplexity(comparison: Comparison, label: str, text: str) -> float | None:
    """Mean over seeds; None where a recipe was not run."""
    recipes = [recipe for recipe, shown in LABELS.items() if shown == label]
    values = [cell["perplexity"][text] for recipe in recipes for cell in cells(comparison, recipe, PATTERN).values()]
    return statistics.mean(values) if values else None


def tokens_part() -> str:
    """A table and a picture."""
    rows = [row(tokens, comparison) for tokens, comparison in found().items()]
    if not rows:
        return ""
    head = ["tokens", *(f"{recipe}, {text}" for recipe in RECIPES for text in TEXTS)]
    head += [f"gap closed, {text}" for text in TEXTS]
    return f"""## More text

SmolLM2 at {PATTERN}, by the number of calibration tokens: [4k](#tokens-4k), [16k](#wikitext2), [262k](#protocol). `best` makes four epochs of
its refit over 4k and 16k tokens, and one over 262k. At 16k it is an older version.

![accuracy against tokens](tokens.svg)

{table(head, rows)}

"""


def row(tokens: int, comparison: Comparison) -> list[str]:
    """A row of the table."""
    shown = [perplexity(comparison, recipe, text) for recipe in RECIPES for text in TEXTS]
    ours = next(recipe for recipe, label in LABELS.items() if label == "best" and cells(comparison, recipe, PATTERN))
    gaps = [spread(gap_closed(comparison, ours, PATTERN, text)) for text in TEXTS]
    return [f"{tokens:,}", *("" if each is None else f"{each:.2f}" for each in shown), *gaps]


def tokens_picture() -> list[Picture]:
    """Perplexity against tokens; none where nothing was measured."""
    lines = {
        recipe: {text: [[tokens, perplexity(each, recipe, text)] for tokens, each in found().items()] for text in TEXTS}
        for recipe in RECIPES
    }
    dense = {text: next(iter(found().values())).cells["dense"]["perplexity"][text] for text in TEXTS} if found() else {}
    return [Picture(DOCS / "tokens.svg", {"dense": dense, "lines": lines}, draw)] if found() else []


def draw(axes: Any, data: dict[str, Any]) -> None:
    """Perplexity against calibration tokens, a line for each recipe and text."""
    for recipe, texts in data["lines"].items():
        for text, points in texts.items():
            known = [point for point in points if point[1] is not None]
            name = f"{recipe}, {text}"
            axes.plot(*zip(*known, strict=True), TEXTS[text], marker="o", color=COLOURS[recipe], label=name)
    for text, value in data["dense"].items():
        axes.axhline(value, color="black", linewidth=0.8, linestyle=TEXTS[text], label=f"dense, {text}")
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="perplexity", ylim=(0, None))
    ticks = [point[0] for point in data["lines"]["best"]["wikitext2-test.txt"]]
    axes.set_xticks(ticks, [f"{tokens / 1000:.0f}k" for tokens in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
