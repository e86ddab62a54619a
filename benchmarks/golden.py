"""Relative layer errors on the golden matrices, next to those of the reference implementations.

python benchmarks/golden.py --golden ../shared/golden --out benchmarks/results/golden.json
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from common import arguments_of
from torch import Tensor

from secateur import solve
from secateur.numerics.hessian import relative_error

CASES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"name": "sparsegpt"},
    "mrp SM, block 128": {"name": "mrp", "mask": "S", "block": 128},
    "mrp MS": {"name": "mrp", "mask": "M", "compensation": "S"},
    "mrp MM, block 128": {"name": "mrp", "mask": "M", "block": 128},
    "mrp SM, full row": {"name": "mrp", "mask": "S"},
    "mrp (default)": {"name": "mrp"},
    "admm": {"name": "admm"},
    "admm, swaps": {"name": "admm", "refine": {}},
}
SWAP_PATTERNS = ("0.5", "2:4")  # a minute or two each


def main() -> None:
    """Solve every matrix by every case and write one JSON."""
    args = arguments_of(__doc__, "golden")
    reference = json.loads((args.golden / "golden.json").read_text())
    result: dict[str, Any] = {}
    for name, patterns in reference.items():
        arrays = np.load(args.golden / f"{name}.npz")
        W, H = torch.from_numpy(arrays["W"]).float(), torch.from_numpy(arrays["H"]).float()
        for pattern, figures in patterns.items():
            cell = {f"reference {key}": figures[key] for key in ("sparsegpt", "sparsegpt_mask_refit", "alps")}
            for case, options in CASES.items():
                no_form = options.get("mask") == "M" and ":" not in pattern
                slow = "refine" in options and pattern not in SWAP_PATTERNS
                if not (no_form or slow):
                    cell[case] = relative_error(solved(W, H, pattern, options), W, H)
            result[f"{name} {pattern}"] = cell
            print(name, pattern, {key: f"{value / figures['sparsegpt']:.4f}" for key, value in cell.items()})
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def solved(W: Tensor, H: Tensor, pattern: str, options: dict[str, Any]) -> Tensor:
    """The pruned weights."""
    solver = {name: value for name, value in options.items() if name != "refine"}
    return solve(W, H, pattern, solver, refine=options.get("refine")).weight


if __name__ == "__main__":
    main()
