"""The README's table of time, memory and disk, from benchmarks/results/scale.json."""

from __future__ import annotations

from typing import Any

from pages import read_result, table


def scale_table() -> str:
    """A row for each size of model."""
    found = read_result("scale")
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["model"], {})[row["recipe"]] = row
    recipes = list(dict.fromkeys(row["recipe"] for row in found["rows"]))
    lines = [
        [name, *(hours(by_recipe[recipe]) for recipe in recipes), memory(by_recipe), disk(by_recipe[recipes[0]])]
        for name, by_recipe in rows.items()
    ]
    where = found["environment"]
    note = (
        f"Estimates, as `--dry-run` makes them. For 135M and 1.5B one block of a random model was pruned on a CPU with "
        f"{where['threads']} threads, and its time multiplied. 7B and 70B were not run: they are scaled up from 1.5B. The text has "
        f"{found['samples']} x {found['seq_len']} tokens. With `--samples 32 --seq-len 512`, the part of the time that grows with the text falls to a sixteenth. Memory is that of `balanced`. For 7B and 70B, `--dry-run` estimates it. `--max-memory` lowers it. Estimated with earlier versions of both recipes."
    )
    head = ["estimated", *(f"`--recipe {recipe}`" for recipe in recipes), "memory", "disk"]
    return f"{table(head, lines)}\n\n{note}"


def hours(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def memory(by_recipe: dict[str, Any]) -> str:
    sizes = [row["memory_bytes"] for row in by_recipe.values() if row["memory_bytes"]]
    return f"{max(sizes) / 1e9:.1f} GB" if sizes else ""


def disk(row: dict[str, Any]) -> str:
    return f"{row['disk_bytes'] / 1e9:.1f} GB"
