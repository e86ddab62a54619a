"""A whole run against the sum of its parts timed alone: forward passes, Gram updates, and solver calls.

    python benchmarks/parts.py --text TEXT --out benchmarks/results/parts.json

What a run takes beyond its parts is the engine's own: observing, copying, and Python. `sparsegpt` and `mrp` make three
forward passes of every block (the dense one, the observed one, and the replay on pruned weights).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.calibration import calibrate
from secateur.checkpoint import load
from secateur.export import environment
from secateur.gram import GramAccumulator
from secateur.model import observable
from secateur.stacks import find_stacks
from secateur.survey import survey

METHODS = ("sparsegpt", "mrp")
PASSES = 3


def main() -> None:
    """Time a run of each method, then its parts, and write one JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {method: measure(arguments, method) for method in METHODS}
    settings = {"model": arguments.model, "samples": arguments.samples, "seq_len": arguments.seq_len}
    arguments.out.write_text(
        json.dumps({"settings": settings, "environment": environment(), "runs": runs}, indent=1) + "\n"
    )


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Seconds of the run and of each of its parts."""
    checkpoint = load(arguments.model)
    settings = {"samples": arguments.samples, "seq_len": arguments.seq_len}
    parts = time_parts(checkpoint, arguments.text, **settings)
    report = secateur.prune(checkpoint, pattern="50%", method=method, calibration=arguments.text, **settings)
    parts["solver calls"] = sum(matrix.seconds for matrix in report.matrices)
    found = {"whole": report.seconds, "parts": parts, "ratio": report.seconds / sum(parts.values())}
    print(method, found, flush=True)
    return found


@torch.no_grad()
def time_parts(checkpoint: Any, text: str, samples: int, seq_len: int) -> dict[str, float]:
    """Seconds of the forward passes through the model's body, and of the Gram updates of every input group."""
    model = checkpoint.model
    batches = calibrate(text, checkpoint.tokenizer, model.config, samples, seq_len).batches
    with observable(model):
        blocks = find_stacks(model, batches[0]).blocks
        groups = survey(model, blocks, batches[:1], lambda *_: None).groups
        started = time.perf_counter()
        for batch in batches:
            model.model(**batch, use_cache=False)
        forward = time.perf_counter() - started
    columns = [group.columns for block in blocks for group in groups[block.name]]
    gram = 0.0
    for width in sorted(set(columns)):
        X = torch.randn(len(batches[0]["input_ids"]) * seq_len, width).to(checkpoint.compute_dtype)
        accumulator = GramAccumulator(width, X.device)
        accumulator.add(X)
        started = time.perf_counter()
        for _ in batches:
            accumulator.add(X)
        gram += columns.count(width) * (time.perf_counter() - started)
    return {"forward passes": PASSES * forward, "Gram updates": gram}


if __name__ == "__main__":
    main()
