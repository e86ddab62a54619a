"""Prune with llm-compressor: a script for its environment, so nothing of secateur is imported here.

    PEER/bin/python peer_llmcompressor.py MODEL TOKENS OUT METHOD PATTERN

TOKENS is a safetensors file of `input_ids` (windows, tokens). PATTERN is a share of zeros, or n:m with n zeros. The
pruned tensors are written to OUT as safetensors, and one line of JSON (`seconds`, `peak_memory`, `versions`) to stdout.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Run from the command line."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - the peer's environment
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
        WandaPruningModifier,
    )
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder, tokens, out, method, pattern = sys.argv[1:]
    ids = load_file(tokens)["input_ids"].tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    options: dict[str, Any] = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    options |= {"sparsity": 0.5, "mask_structure": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    modifiers = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifiers[method](**options)],
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file({name: value for name, value in tensors.items() if not name.endswith("lm_head.weight")}, out)
    figures = {
        "seconds": seconds,
        "peak_memory": peak_of_process(),
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    print(json.dumps(figures))


def peak_of_process() -> int:
    """Peak memory of this process in bytes. Linux's `ru_maxrss` would be its parent's, where that is more."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
