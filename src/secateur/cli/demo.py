"""The demonstration: SmolLM2-135M-Instruct before and after pruning, by the same functions as the other commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from secateur.api.models import bench, evaluate, pack
from secateur.api.pruning import prune
from secateur.calibration.documents import name_of
from secateur.checkpoints.load import load
from secateur.errors import SecateurError
from secateur.packed.files import is_packed
from secateur.recipe.presets import PRESETS
from secateur.recipe.recipe import Recipe
from secateur.recipe.resolve import resolve_recipe
from secateur.reporting.figures import Speed
from secateur.reporting.report import Report, read_metadata
from secateur.resume.manifest import unfinished
from secateur.resume.output_folder import check_apart, check_may_replace, check_place
from secateur.runtime.environment import default_device
from secateur.runtime.progress import Progress
from secateur.sources.demo_model import DEMO_NAME
from secateur.storage.checkpoint_files import METADATA
from secateur.storage.paths import real_path, user_path

PROMPT = "Photosynthesis is the process by which"
NEW_TOKENS = 40
LEAST_TO_PACK = 0.2  # share of zeros
PACKED = "pruned and packed"
DEFAULT_TOKENS = {"samples": 32, "seq_len": 512}


def run_demo(
    out: Path, asked: Mapping[str, Any], eval_tokens: int, overwrite: bool, device: str | None, progress: Progress
) -> tuple[dict[str, Any], Report]:
    """Prune the demo model to `out`.

    Args:
        out: the folder; what the same demo wrote earlier is replaced.
        asked: arguments of `prune`.
        eval_tokens: tokens to evaluate.
        overwrite: replace another pruned model in `out`.
        device: where to run.
        progress: called with the stage, what is done, and the total.

    Returns:
        figures and continuations of both models, and the report.
    """
    if eval_tokens < 1:
        raise SecateurError(f"‹eval_tokens› is {eval_tokens}; at least 1 is needed")
    out, asked = real_path(user_path(out)), few_tokens(asked)
    place = real_path(Path(DEMO_NAME))
    if place.exists() or place == out:
        raise SecateurError(f"{place} would be taken for the demo's model: run the demo elsewhere, or rename it")
    overwrite = overwrite or _is_same_demo(out, resolve_recipe(**asked))
    check_place(out)
    check_apart(out, [])
    check_may_replace(out, overwrite)
    before = look_at(DEMO_NAME, eval_tokens, device, progress)
    report = prune(DEMO_NAME, out, overwrite=overwrite, device=device, progress=progress, **asked)
    return {"dense": before, "pruned": look_at(str(out), eval_tokens, device, progress)}, report


def dense_against_packed(out: Path, report: Report, progress: Progress) -> list[Speed]:
    """Size, memory and speed of the dense demo model, and of the pruned one packed to a scratch folder.

    What has too few zeros to be packed, or is packed already, is measured as it is.
    """
    with TemporaryDirectory() as scratch:
        ours, name = Path(scratch) / "packed", PACKED
        if is_packed(out) or report.sparsity < LEAST_TO_PACK:
            ours, name = out, "pruned"
        else:
            pack(out, ours)
        speeds = bench([DEMO_NAME, ours], progress=progress)
    return [replace(speeds[0], model="dense"), replace(speeds[1], model=name)]


def few_tokens(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the demo's calibration tokens, where neither they nor a recipe file say another number."""
    if asked["recipe"] not in (None, *PRESETS):
        return dict(asked)
    return {name: DEFAULT_TOKENS.get(name) if value is None else value for name, value in asked.items()}


def _is_same_demo(out: Path, recipe: Recipe) -> bool:
    """Whether the model in a folder, finished or not, is the demo's by this recipe."""
    if begun := unfinished(out):
        model, text = (begun.identity.get(name, {}) for name in ("model", "calibration"))
        drawn = text.get("samples", 0) - text.get("own_words", 0)
        found = (text.get("source"), drawn, text.get("seq_len"))
        asked = recipe.calibration
        is_same_text = found == (name_of(asked.source), asked.samples, asked.seq_len)
        is_same = is_same_text and begun.identity.get("recipe") == recipe.without_calibration().to_dict()
        return is_same and model.get("name") == DEMO_NAME
    if not (out / METADATA).is_file():
        return False
    report = read_metadata(out)
    return report.model == DEMO_NAME and report.recipe == recipe


def look_at(name: str, eval_tokens: int, device: str | None, progress: Progress) -> dict[str, Any]:
    """Perplexity on the shipped evaluation text, and a short greedy continuation."""
    checkpoint = load(name, device or default_device())
    figures = evaluate(checkpoint.model, tokenizer=checkpoint.tokenizer, max_tokens=eval_tokens, progress=progress)
    prompt = checkpoint.tokenizer(PROMPT, return_tensors="pt").to(checkpoint.model.device)
    with torch.no_grad():
        ids = checkpoint.model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return figures | {"continuation": checkpoint.tokenizer.decode(ids[0], skip_special_tokens=True)}
