"""What tests/test_distributed.py runs in each of several processes: a few models pruned, and what became of them.

torchrun --nproc-per-node N tests/ranks.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from models import character_tokenizer, tiny_model, tokens
from safetensors.torch import save_file
from zoo import tiny

import secateur
from secateur.runtime import distributed

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("llama", {"recipe": "best", "pattern": "50%"}),
    "residual": ("llama", {"solver": "sparsegpt", "pattern": "2:4", "settings": {"target.kind": "residual"}}),
    "owl": ("llama", {"solver": "wanda", "pattern": "60%", "settings": {"allocation.rule": "owl"}}),
    "experts": ("mixtral", {"solver": "mrp", "pattern": "50%", "settings": {"allocation.rule": "curve"}}),
    "another order": ("llama", {"solver": "mrp", "pattern": "2:4", "settings": {"permutation.rounds": 2}}),
    "shared values": (
        "gemma3n_text",
        {"solver": "mrp", "pattern": "2:4", "settings": {"permutation.rounds": 2, "permutation.sequences": 1}},
    ),
    "own words": ("llama", {"solver": "mrp", "pattern": "2:4", "calibration": "self", "samples": 4, "seq_len": 32}),
    "mamba": ("mamba", {"solver": "admm", "pattern": "2:4", "settings": {"refit.epochs": 1}}),
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return tiny(family) if family != "llama" else tiny_model("llama", num_hidden_layers=3)


def run(name: str) -> tuple[Any, secateur.Report]:
    """The pruned model, and the report."""
    family, settings = RUNS[name]
    model = model_of(family)
    return model, secateur.prune(model, tokenizer=character_tokenizer(), **{"calibration": tokens(10)} | settings)


def main() -> None:
    out = Path(sys.argv[1])
    with distributed.process_group("cpu"):
        for name in RUNS:
            model, report = run(name)
            if distributed.world_size() > 1:
                everybodys = distributed.all_gather(
                    {key: float(value.double().sum()) for key, value in model.state_dict().items()}
                )
                assert all(sums == everybodys[0] for sums in everybodys), f"{name}: the ranks end with other weights"
            if distributed.is_main():
                save_file(
                    {key: value.contiguous().clone() for key, value in model.state_dict().items()},
                    out / f"{name}.safetensors",
                )
                (out / f"{name}.json").write_text(json.dumps(report.to_dict()))


if __name__ == "__main__":
    main()
