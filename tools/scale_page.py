"""The README's table of time, memory and disk, from benchmarks/results/scale.json."""

from __future__ import annotations

from typing import Any

from pages import read_result, table

FIRST_TRY = (32, 512)  # sequences and tokens of the README's commands


def scale_table() -> str:
    """A row for each size of model."""
    found = read_result("scale")
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["model"], {})[row["recipe"]] = row
    recipes = list(dict.fromkeys(row["recipe"] for row in found["rows"]))
    few = FIRST_TRY[0] * FIRST_TRY[1] / (found["samples"] * found["seq_len"])
    lines = [
        [name]
        + [hours(seconds(by_recipe[recipe], share)) for share in (few, 1) for recipe in recipes]
        + [memory(by_recipe), disk(by_recipe[recipes[0]])]
        for name, by_recipe in rows.items()
    ]
    where = found["environment"]
    note = (
        f"Estimates, as `--dry-run` makes them. For 135M and 1.5B one block of a random model was pruned on a CPU with "
        f"{where['threads']} threads, and its time multiplied. 7B and 70B were not run: they are scaled up from 1.5B. "
        f"{FIRST_TRY[0]} x {FIRST_TRY[1]} tokens are a first try, and {found['samples']} x {found['seq_len']} the default. Memory is what a run by `balanced` adds to Python, torch and the mapped files of the model; `--max-memory` lowers it, and `--dry-run` estimates it for 7B and 70B too. Estimated with earlier versions of both recipes."
    )
    amounts = [f"{samples} x {length}" for samples, length in (FIRST_TRY, (found["samples"], found["seq_len"]))]
    amount_of_memory = f"memory, {amounts[-1]}"
    head = [
        "estimated",
        *(f"`{recipe}`, {amount}" for amount in amounts for recipe in recipes),
        amount_of_memory,
        "disk",
    ]
    return f"{table(head, lines)}\n\n{note}"


def seconds(row: dict[str, Any], share: float) -> float:
    """Seconds of a run on a share of the text: all but the solver's work grows with it."""
    return row["solver_seconds"] + share * (row["seconds"] - row["solver_seconds"])


def hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def memory(by_recipe: dict[str, Any]) -> str:
    sizes = [row["memory_bytes"] for row in by_recipe.values() if row["memory_bytes"]]
    return f"{max(sizes) / 1e9:.1f} GB" if sizes else ""


def disk(row: dict[str, Any]) -> str:
    return f"{row['disk_bytes'] / 1e9:.1f} GB"
