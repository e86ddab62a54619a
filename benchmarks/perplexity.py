"""Perplexity of SmolLM2-135M after pruning: methods x patterns, one calibration text, one evaluation text.

    python benchmarks/perplexity.py --calibration TEXT --text TEXT --out benchmarks/results/perplexity-smollm2.json

Each cell is written as it ends, and cells that are in the file already (same settings) are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from secateur import evaluate, prune
from secateur.checkpoint import load
from secateur.export import environment

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "mrp": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["50%", "70%", "2:4"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=40960)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {
        "model": args.model,
        "calibration": Path(args.calibration).name,
        "text": Path(args.text).name,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    }
    results = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "cells": {}}
    if results["settings"] != settings:
        raise SystemExit(f"{args.out} was made with other settings: {results['settings']}")
    results["environment"] = environment()
    cells = [("dense", None), *((method, pattern) for pattern in args.patterns for method in args.methods)]
    for method, pattern in cells:
        name = f"{method} {pattern}" if pattern else method
        if name not in results["cells"]:
            results["cells"][name] = run_cell(args, method, pattern)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results["cells"][name], flush=True)


def run_cell(args: argparse.Namespace, method: str, pattern: str | None) -> dict[str, Any]:
    """Prune a fresh copy in memory and evaluate it."""
    checkpoint = load(args.model)
    cell: dict[str, Any] = {}
    if pattern is not None:
        report = prune(
            checkpoint.model,
            pattern=pattern,
            method=method,
            calibration=args.calibration,
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
            tokenizer=checkpoint.tokenizer,
            **METHODS[method],
        )
        cell = {"mean_layer_error": report.mean_relative_error, "sparsity": report.sparsity, "seconds": report.seconds}
    started = time.perf_counter()
    figures = evaluate(checkpoint.model, args.text, tokenizer=checkpoint.tokenizer, max_tokens=args.max_tokens)
    return cell | {"perplexity": figures["perplexity"], "eval_seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
