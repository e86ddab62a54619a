"""The model card of a pruned model, made from its report alone, so that it can be written again after a measurement."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from secateur.calibration.documents import text_of
from secateur.checkpoints.load import Checkpoint
from secateur.reporting.page import file_name
from secateur.reporting.report import Report
from secateur.runtime.messages import one_line
from secateur.sources.demo_model import DEMO_NAME
from secateur.sources.unpacked import USAGE
from secateur.storage.checkpoint_files import CARD, METADATA, RECIPE_FILE, REPORT_FILE
from secateur.storage.paths import user_path

MAX_HEADER = 1 << 16  # characters
_FACT = re.compile(r"^(license|base_model): *(['\"]?)(\w[\w./-]*)\2 *(?:#.*)?$", re.MULTILINE)


def facts_of_source(checkpoint: Checkpoint) -> dict[str, str]:
    """What a card says of the dense model: its licence, and its hub id, if it has one.

    A folder or a GGUF file has no hub id, and its path means nothing to anybody else.
    """
    card = _front_matter(checkpoint.folder / CARD)
    found = {"license": card.get("license", "unknown")}
    if checkpoint.name == DEMO_NAME:
        found |= {"base_model": card["base_model"]} if "base_model" in card else {}
    elif _is_hub_id(checkpoint.name):
        found["base_model"] = checkpoint.name
    return found


def model_card(report: Report, title: str) -> str:
    """README.md of a pruned model: hub metadata, what was done, what was measured, how to use it."""
    base, recipe = report.source.get("base_model"), report.recipe
    is_gguf = report.model == DEMO_NAME or report.model.endswith(".gguf")
    what = one_line(base or Path(report.model).name or "a model")
    share = report.pruned_parameters / max(1, report.model_parameters)
    lines = [
        "---",
        _header(report, one_line(title)).to_yaml(),
        "---",
        f"# {one_line(title)}",
        "",
        f"{what}{' (dequantised from its GGUF file)' * is_gguf}, pruned to {recipe.pattern} in one shot, without "
        f"retraining, by secateur.",
        "",
        "| | |",
        "|---|---|",
        f"| zeros in the pruned matrices | {report.sparsity:.2%} of {report.pruned_parameters:,} weights |",
        f"| share of the model's weights in them | {share:.1%} |",
        f"| mean relative layer error, before any block refit | {report.mean_relative_error:.4f} |",
        f"| recipe | {recipe.summary()} |",
        f"| calibration | {_amount(report.calibration)} of {_texts(report.calibration)} |",
        "",
        *_quality(report),
        *_speed(report),
        "## Use",
        "",
        USAGE,
        f"The whole recipe is in `{RECIPE_FILE}`, figures of every matrix are in `{METADATA}`, and `{REPORT_FILE}` "
        f"shows them. `secateur prune MODEL OUT --recipe {RECIPE_FILE}` gives the same weights again.",
        "",
    ]
    return "\n".join(lines)


def _header(report: Report, title: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=_file_name(each.text),
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=round(each.perplexity, 4),
        )
        for each in report.perplexities
    ]
    return ModelCardData(
        license=report.source.get("license", "unknown"),
        base_model=report.source.get("base_model"),
        tags=["pruned", "sparse", "secateur"],
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=title,
        eval_results=results or None,
    )


def _quality(report: Report) -> list[str]:
    rows = [
        f"| {_file_name(each.text)} | {each.targets:,} | {_figure(each.dense)} | {each.perplexity:.2f} "
        f"| {_figure(each.kl, 3)} |"
        for each in report.perplexities
    ]
    columns = ["| text | tokens | perplexity, dense | pruned | KL to dense |", "|---|---|---|---|---|"]
    return ["## Quality", "", *columns, *rows, ""] if rows else []


def _speed(report: Report) -> list[str]:
    if not report.speeds:
        return []
    rows = [
        f"| {one_line(each.model)} | {each.file_bytes / 1e6:,.0f} | {each.memory_bytes / 1e6:,.0f} "
        f"| {each.prefill_tokens_per_second:,.0f} | {each.decode_tokens_per_second:.1f} |"
        for each in report.speeds
    ]
    columns = ["| model | files, MB | memory, MB | prompt, tokens/s | decoding, tokens/s |", "|---|---|---|---|---|"]
    threads = f"Batch 1 on a CPU, {report.speeds[0].threads} threads."
    return ["## Size and speed", "", *columns, *rows, "", threads, ""]


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _amount(calibration: dict[str, Any]) -> str:
    """Amount of calibration text; the caller's tensors may be of any length."""
    if "seq_len" in calibration:
        return f"{calibration['samples']} x {calibration['seq_len']} tokens"
    return f"{calibration['samples']} sequences"


def _texts(calibration: dict[str, Any]) -> str:
    """What was read, and how much of it the dense model wrote."""
    text, written = text_of(calibration["source"]), calibration.get("written", 0)
    if text is None:
        return "text that the dense model wrote"
    if not written:
        return _file_name(str(text))
    share = "all" if written == calibration["samples"] else written
    return f"{_file_name(str(text))}, {share} of the sequences written by the dense model, which went on from it"


def _file_name(source: str) -> str:
    return one_line(file_name(source))


def _is_hub_id(name: str) -> bool:
    """Whether a model came from the hub, by a name such as `owner/name`."""
    if user_path(name).exists() or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _front_matter(card: Path) -> dict[str, str]:
    """The licence and the base model in a card's YAML header, where they are plain text.

    They are found by their lines: a YAML parser takes minutes, or all memory, for some headers of a few kilobytes.
    """
    if not card.is_file():
        return {}
    start = card.read_text(encoding="utf-8", errors="replace")[:MAX_HEADER]
    header = re.match(r"---\n(.*?)\n---", start, re.DOTALL)
    return {} if header is None else {name: value for name, _, value in _FACT.findall(header[1])}
