"""The model card of a pruned model."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from secateur.checkpoints.load import Checkpoint
from secateur.pruning.report import METADATA, RECIPE_FILE, Report
from secateur.runtime.messages import one_line
from secateur.sources.demo_model import DEMO_NAME
from secateur.sources.unpacked import NOT_SMALLER

MAX_HEADER = 1 << 16  # characters


def model_card(checkpoint: Checkpoint, report: Report, title: str) -> str:
    """README.md of the pruned model: licence and base model from the source's card, recipe and figures from the run."""
    source = _front_matter(checkpoint.folder / "README.md")
    base = source.get("base_model") if checkpoint.name == DEMO_NAME else None
    header = {
        "license": source.get("license", "unknown"),
        "base_model": base or checkpoint.name,
        "tags": ["pruned", "sparse", "secateur"],
        "library_name": "transformers",
    }
    gguf = checkpoint.name == DEMO_NAME or checkpoint.name.endswith(".gguf")
    what = f"{one_line(base or checkpoint.name)}{' (dequantised from its GGUF file)' * gguf}"
    recipe, calibration = report.the_recipe, report.calibration
    lines = [
        "---",
        _yaml(header),
        "---",
        f"# {one_line(title)}",
        "",
        f"{what}, pruned to {recipe.pattern} in one shot, without retraining, by secateur.",
        "",
        "| | |",
        "|---|---|",
        f"| zeros in the pruned matrices | {report.sparsity:.2%} of {report.pruned_parameters:,} weights |",
        f"| share of the model's weights in them | {report.pruned_parameters / max(1, report.model_parameters):.1%} |",
        f"| mean relative layer error, before any block refit | {report.mean_relative_error:.4f} |",
        f"| recipe | {recipe.summary()} |",
        f"| calibration | {_amount(calibration)} of {one_line(calibration['source'])} |",
        "",
        NOT_SMALLER,
        f"The whole recipe is in `{RECIPE_FILE}`, figures of every matrix are in `{METADATA}`.",
        "",
    ]
    return "\n".join(lines)


def _amount(calibration: dict[str, Any]) -> str:
    """Amount of calibration text; the caller's tensors may be of any length."""
    if "seq_len" in calibration:
        return f"{calibration['samples']} x {calibration['seq_len']} tokens"
    return f"{calibration['samples']} sequences"


def _yaml(header: dict[str, Any]) -> str:
    written = io.StringIO()
    yaml = YAML()
    yaml.width = 4096  # one line a key
    yaml.dump(header, written)
    return written.getvalue().rstrip("\n")


def _front_matter(card: Path) -> dict[str, Any]:
    """The licence and the base model in a card's YAML header, where they are text."""
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace")[:MAX_HEADER], re.DOTALL)
    try:
        found = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except (YAMLError, ValueError, RecursionError):  # nobody checks the headers of cards
        return {}
    values = found if isinstance(found, dict) else {}
    return {name: values[name] for name in ("license", "base_model") if isinstance(values.get(name), str)}
