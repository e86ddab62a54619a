"""The demonstration: SmolLM2-135M before and after pruning, by the same functions as the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur import export
from secateur.api import evaluate, prune
from secateur.capture import Progress
from secateur.checkpoint import default_device, load, read_json
from secateur.manifest import FOLDER, MANIFEST
from secateur.report import Report

MODEL = "smollm2"
PROMPT = "Photosynthesis is the process by which"
NEW_TOKENS = 40


def run_demo(
    out: Path,
    pattern: str,
    effort: str | None,
    method: str | None,
    samples: int,
    seq_len: int,
    eval_tokens: int,
    device: str | None,
    progress: Progress,
) -> tuple[dict[str, Any], Report]:
    """Prune the demo model to `out`; returns the figures and continuations of both models, and the pruning report."""
    out = out.expanduser().resolve()
    overwrite = _is_earlier_demo(out)
    export.check_target(out, [], overwrite)
    before = look_at(MODEL, eval_tokens, device, progress)
    report = prune(
        MODEL,
        out,
        pattern=pattern,
        effort=effort,
        method=method,
        samples=samples,
        seq_len=seq_len,
        overwrite=overwrite,
        device=device,
        progress=progress,
    )
    return {"dense": before, "pruned": look_at(str(out), eval_tokens, device, progress)}, report


def _is_earlier_demo(out: Path) -> bool:
    """Only what an earlier demo wrote is replaced without being asked."""
    finished, begun = out / export.METADATA, out / FOLDER / MANIFEST
    if begun.is_file():
        return read_json(begun, "").get("identity", {}).get("model", {}).get("name") == MODEL
    return finished.is_file() and read_json(finished, "").get("recipe", {}).get("model") == MODEL


def look_at(name: str, eval_tokens: int, device: str | None, progress: Progress) -> dict[str, Any]:
    """Perplexity on the shipped evaluation text, and a short greedy continuation."""
    checkpoint = load(name, device or default_device())
    figures = evaluate(checkpoint.model, tokenizer=checkpoint.tokenizer, max_tokens=eval_tokens, progress=progress)
    prompt = checkpoint.tokenizer(PROMPT, return_tensors="pt").to(checkpoint.model.device)
    with torch.no_grad():
        ids = checkpoint.model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return figures | {"continuation": checkpoint.tokenizer.decode(ids[0], skip_special_tokens=True)}
