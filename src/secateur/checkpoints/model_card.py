"""The model card of a pruned model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from secateur.checkpoints.demo_model import DEMO_NAME
from secateur.checkpoints.load import Checkpoint
from secateur.pruning.report import METADATA, RECIPE_FILE, Report


def model_card(checkpoint: Checkpoint, report: Report, title: str) -> str:
    """README.md of the pruned model: licence and base model from the source's card, recipe and figures from the run."""
    source = _front_matter(checkpoint.folder / "README.md")
    base = source.get("base_model") if checkpoint.name == DEMO_NAME else None
    header = {
        "license": source.get("license", "unknown"),
        "base_model": base or checkpoint.name,
        "tags": "[pruned, sparse, secateur]",
        "library_name": "transformers",
    }
    gguf = checkpoint.name == DEMO_NAME or checkpoint.name.endswith(".gguf")
    what = f"{base or checkpoint.name}{' (dequantised from its GGUF file)' * gguf}"
    recipe, calibration = report.the_recipe, report.calibration
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in header.items()),
        "---",
        f"# {title}",
        "",
        f"{what}, pruned to {recipe.pattern} in one shot, without retraining, by secateur.",
        "",
        "| | |",
        "|---|---|",
        f"| zeros in the pruned matrices | {report.sparsity:.2%} of {report.pruned_parameters:,} weights |",
        f"| share of the model's weights in them | {report.pruned_parameters / max(1, report.model_parameters):.1%} |",
        f"| mean relative layer error, before any block refit | {report.mean_relative_error:.4f} |",
        f"| recipe | {recipe.summary()} |",
        f"| calibration | {_amount(calibration)} of {calibration['source']} |",
        "",
        "The zeros are stored like other weights: they make no file smaller, and no dense runtime faster.",
        f"The whole recipe is in `{RECIPE_FILE}`, figures of every matrix are in `{METADATA}`.",
        "",
    ]
    return "\n".join(lines)


def _amount(calibration: dict[str, Any]) -> str:
    """Amount of calibration text; the caller's tensors may be of any length."""
    if "seq_len" in calibration:
        return f"{calibration['samples']} x {calibration['seq_len']} tokens"
    return f"{calibration['samples']} sequences"


def _front_matter(card: Path) -> dict[str, str]:
    """Plain `key: value` lines of a card's YAML header."""
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = match[1].splitlines() if match else []
    pairs = (re.fullmatch(r"(\w+):\s*(\S.*)", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}
