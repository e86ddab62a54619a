"""docs/architectures.md from benchmarks/results/coverage.json and encoder.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pages import DOCS, read_result, table


def pages() -> dict[Path, str]:
    """The page."""
    return {DOCS / "architectures.md": page()}


def passed_rows(families: dict[str, Any]) -> list[list[str]]:
    """A row for each class that passes."""
    rows = []
    for name, row in families.items():
        if "unbuildable" in row or "failure" in row:
            continue
        dense = ", ".join(f"{number} {reason}" for reason, number in row["dense"].items())
        errors = [f"{row[f'error {p}'] / row[f'error of magnitude {p}']:.2f}" for p in ("50%", "2:4")]
        replay = "as one block" if row["whole"] else "block by block"
        rows.append([name, row["class"], str(row["pruned"]), f"{row['share']:.0%}", *errors, replay, dense])
    return rows


def encoder_section() -> str:
    """A real sentence encoder, pruned through its own inputs."""
    result = read_result("encoder")
    settings = result["settings"]
    rows = [
        [name, f"{cell['cosine']:.3f}", f"{cell['same_neighbour']:.2f}", f"{cell['layer_error']:.4f}"]
        for name, cell in result["cells"].items()
    ]
    head = ["run", "cosine to the dense embedding", "same nearest window", "layer error"]
    return (
        f"## Beyond causal language models\n\n{settings['model']}, calibrated on {settings['windows']} x "
        f"{settings['length']} tokens of the shipped text, evaluated on {settings['windows']} windows of the shipped "
        f"evaluation text, by `benchmarks/encoder.py`. T5, Whisper, ViT and BERT are tiny and random in "
        f"`tests/test_discovery.py`.\n\n{table(head, rows)}"
    )


def page() -> str:
    """The page's text."""
    sweep = read_result("coverage")
    families, summary, where = sweep["families"], sweep["summary"], sweep["environment"]
    failed = [
        [name, re.sub(r"/tmp/\w+/model", "MODEL", row["failure"])] for name, row in families.items() if "failure" in row
    ]
    unbuilt = [[name, row["unbuildable"]] for name, row in families.items() if "unbuildable" in row]
    whole = [[name, row["whole"]] for name, row in families.items() if row.get("whole")]
    head = ["model type", "class", "pruned", "of the weights", "50%", "2:4", "replayed", "left dense"]
    return "\n\n".join(
        [
            "# Architectures",
            f"**{summary['passed']} of {summary['built']}** causal language model classes "
            f"({summary['passed'] / summary['built']:.1%}) of transformers {where['transformers']} pass the sweep, with no "
            f"class or function written for any of them. Its mapping has {summary['classes']}; "
            f"{summary['classes'] - summary['built']} can't be built from a configuration alone.",
            f"Written by `{sweep['command']}` and `python tools/make_pages.py`. Each class is built tiny and random "
            f"and pruned to 50% and 2:4 by `mrp` on random tokens. It passes where every matrix of its layers is pruned to "
            f"exactly the target or left dense for a reason, the mean layer error is below magnitude's (columns 50% and "
            f"2:4: `mrp`'s as a multiple of it), the output is finite, and a saved copy loads with the same weights; magnitude prunes it from a folder to a "
            f"folder, as the command does, and leaves the same matrices dense. To build them tiny, {summary['rows']} rows of `tests/zoo.py` name fields that a type also needs.",
            table(head, passed_rows(families)),
            "## Pruned as one block",
            "These do not run each layer once, one after another. Every matrix is fitted to its inputs "
            "in the dense model, and the steps that need blocks (refit, dense targets, curve allocation) are refused.",
            table(["model type", "why"], whole),
            "## Not pruned",
            "Each is refused with the message below; where that names a matrix, `--exclude` leaves it dense and prunes the "
            "rest. Text models whose saved configuration AutoModelForCausalLM doesn't know can be pruned in memory.",
            table(["model type", "message"], failed),
            "## Not built",
            table(["model type", "why"], unbuilt),
            encoder_section(),
            "",
        ]
    )
