"""A whole run against the sum of its parts: forward passes and Hessian updates timed alone, and its solver calls.

    python benchmarks/parts.py --text TEXT --out benchmarks/results/parts.json

What a run takes beyond its parts is spent on observing, copying, and Python. `sparsegpt` and `mrp` make three
forward passes of every block (the dense one, the observed one, and the replay on pruned weights).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import arguments_of, write_result

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.calibration.dense_pass import run_dense_pass
from secateur.checkpoints.load import load
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import find_block_chains
from secateur.numerics.hessian import HessianAccumulator
from secateur.recipe.recipe import CalibrationText, Recipe

SOLVERS = ("sparsegpt", "mrp")
PASSES = 3


def main() -> None:
    """Time a run of each solver, then its parts, and write one JSON."""
    arguments = arguments_of(__doc__, "text", model="smollm2", samples=32, seq_len=512)
    runs = {solver: measure(arguments, solver) for solver in SOLVERS}
    settings = {"model": arguments.model, "samples": arguments.samples, "seq_len": arguments.seq_len}
    write_result(arguments.out, {"settings": settings, "runs": runs})


def measure(arguments: argparse.Namespace, solver: str) -> dict[str, Any]:
    """Seconds of the run and of each of its parts."""
    checkpoint = load(arguments.model)
    settings = {"samples": arguments.samples, "seq_len": arguments.seq_len}
    parts = time_parts(checkpoint, str(arguments.text), **settings)
    report = secateur.prune(checkpoint, pattern="50%", solver=solver, calibration=arguments.text, **settings)
    parts["solver calls"] = sum(matrix.seconds for matrix in report.matrices)
    found = {"whole": report.seconds, "parts": parts, "ratio": report.seconds / sum(parts.values())}
    print(solver, found, flush=True)
    return found


@torch.no_grad()
def time_parts(checkpoint: Any, text: str, samples: int, seq_len: int) -> dict[str, float]:
    """Seconds of the forward passes through the model's body, and of the Hessian updates of every input group."""
    model = checkpoint.model
    size = CalibrationText(samples=samples, seq_len=seq_len)
    batches = calibration_batches(text, checkpoint.tokenizer, model.config, size).batches
    with deterministic_forward(model):
        chain = find_block_chains(model, batches[0], Recipe()).chains[0]
        groups = run_dense_pass(model, chain, batches[:1], lambda *_: None).stream.groups
        started = time.perf_counter()
        for batch in batches:
            model.model(**batch, use_cache=False)
        forward = time.perf_counter() - started
    columns = [group.columns for block in chain.blocks for group in groups[block.name]]
    hessians = 0.0
    for width in sorted(set(columns)):
        X = torch.randn(len(batches[0]["input_ids"]) * seq_len, width).to(checkpoint.compute_dtype)
        accumulator = HessianAccumulator(width, X.device)
        accumulator.add(X)
        started = time.perf_counter()
        for _ in batches:
            accumulator.add(X)
        hessians += columns.count(width) * (time.perf_counter() - started)
    return {"forward passes": PASSES * forward, "Hessian updates": hessians}


if __name__ == "__main__":
    main()
