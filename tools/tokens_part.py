"""Accuracy against calibration tokens: a section and a picture of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from typing import Any

from comparisons import COLOURS, cells, gap_closed, read, spread
from pages import DOCS, Picture, table

FOLDERS = ("tokens-4k", "tokens-16k", "tokens-64k", "protocol-512")  # of the comparisons, from few tokens to many
PATTERN = "50%"
TEXTS = {"wikitext2-test.txt": "-", "austen.txt": "--"}


def measured() -> list[dict[str, Any]]:
    """Tokens, perplexities by text and recipe, and gaps by text, of each folder; of seeds that both recipes have."""
    found = []
    for comparison in map(read, FOLDERS):
        recipes = {recipe: cells(comparison, recipe, PATTERN) for recipe in ("sparsegpt", "best")}
        shared = set.intersection(*map(set, recipes.values()))
        found.append(
            {
                "tokens": comparison.settings["samples"] * comparison.settings["seq_len"],
                "dense": {text: comparison.cells["dense"]["perplexity"][text] for text in TEXTS},
                "perplexity": {
                    recipe: {
                        text: statistics.mean(seeds[seed]["perplexity"][text] for seed in shared) for text in TEXTS
                    }
                    for recipe, seeds in recipes.items()
                },
                "gaps": {text: spread(gap_closed(comparison, "best", PATTERN, text)) for text in TEXTS},
            }
        )
    return found


def tokens_part() -> str:
    """A table and a picture."""
    rows = [
        [
            f"{each['tokens']:,}",
            *(f"{value:.2f}" for texts in each["perplexity"].values() for value in texts.values()),
            *each["gaps"].values(),
        ]
        for each in measured()
    ]
    head = ["tokens", *(f"{recipe}, {text}" for recipe in ("sparsegpt", "best") for text in TEXTS)]
    head += [f"gap closed, {text}" for text in TEXTS]
    return f"""## More text

SmolLM2 at {PATTERN}, by the number of calibration tokens in sequences of 512: [4k](ablations.md#tokens-4k), [16k](#16k-tokens), [64k](ablations.md#tokens-64k), [262k](ablations.md#protocol-512).
`best` is also calibrated on text that the model writes: as many sequences, at most 32,768 tokens.

![accuracy against tokens](tokens.svg)

{table(head, rows)}

"""


def tokens_picture() -> Picture:
    """Perplexity against tokens."""
    return Picture(DOCS / "tokens.svg", measured(), draw)


def draw(axes: Any, data: list[dict[str, Any]]) -> None:
    """Perplexity against calibration tokens, a line for each recipe and text."""
    tokens = [each["tokens"] for each in data]
    for recipe in ("sparsegpt", "best"):
        for text, line in TEXTS.items():
            values = [each["perplexity"][recipe][text] for each in data]
            axes.plot(tokens, values, line, marker="o", color=COLOURS[recipe], label=f"{recipe}, {text}")
    for text, line in TEXTS.items():
        axes.axhline(data[0]["dense"][text], color="black", linewidth=0.8, linestyle=line, label=f"dense, {text}")
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="perplexity", ylim=(0, None))
    axes.set_xticks(tokens, [f"{number / 1000:.0f}k" for number in tokens])
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
