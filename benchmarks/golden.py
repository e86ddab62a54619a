"""Relative layer errors on the golden matrices, beside those of the reference implementations.

python benchmarks/golden.py --golden ../shared/golden --out benchmarks/results/golden.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur import solve
from secateur.engine import relative_error

CASES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "mrp SM, block 128": {"method": "mrp", "mask": "S", "block": 128},
    "mrp MS": {"method": "mrp", "mask": "M", "compensation": "S"},
    "mrp MM, block 128": {"method": "mrp", "mask": "M", "block": 128},
    "mrp SM, full row": {"method": "mrp", "mask": "S"},
    "mrp (default)": {"method": "mrp"},
    "admm": {"method": "admm"},
    "admm, swaps": {"method": "admm", "refine": "swap"},
}
SWAP_PATTERNS = ("0.5", "2:4")  # a minute or two each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
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
                    cell[case] = relative_error(solve(W, H, pattern, **options).weight, W, H)
            result[f"{name} {pattern}"] = cell
            print(name, pattern, {key: f"{value / figures['sparsegpt']:.4f}" for key, value in cell.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
