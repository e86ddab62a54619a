"""Iterations of the full-row refit to a given gap in loss: three ways to run conjugate gradients, on golden matrices.

    python benchmarks/refit.py --golden ../shared/golden --out benchmarks/results/refit.json

primal diagonal: the masked normal equations, preconditioned with the diagonal; primal low-rank: the preconditioner in
use; dual: `lambda [Hinv_PP] = w_P`, whose iterate is made legal by zeroing the pruned weights. Gaps are exact, against
a float64 direct solve. Each iteration is one product of the size of W times H.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from common import arguments_of
from torch import Tensor

from secateur import solve
from secateur.numerics.conjugate_gradients import MaskedInverse, Stop, masked_cg
from secateur.numerics.damping import DampedHessian

GAPS = (1e-2, 1e-3, 1e-4, 1e-5)
MOST = 80


def main() -> None:
    """Compare the ways on every matrix and write one JSON."""
    args = arguments_of(__doc__, "golden")
    result: dict[str, Any] = {}
    for name in sorted(path.stem for path in args.golden.glob("*.npz")):
        arrays = np.load(args.golden / f"{name}.npz")
        W, H = torch.from_numpy(arrays["W"]).double(), torch.from_numpy(arrays["H"]).double()
        for pattern in ("50%", "70%", "2:4"):
            result[f"{name} {pattern}"] = compare(W, H, solve(W, H, pattern, {"name": "mrp", "block": 128}).keep)
            print(name, pattern, result[f"{name} {pattern}"], flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(W: Tensor, H: Tensor, keep: Tensor) -> dict[str, dict[str, int | None]]:
    """First iteration at which each way is within each gap."""
    damped = DampedHessian(H, 0.01)
    Hd, U, mask, pruned = damped.matrix, damped.U, keep.double(), (~keep).double()
    Hinv = U.T @ U
    best = loss(W, direct(W, Hd, keep), Hd)
    start = W * mask
    target = ((W - start) @ Hd) * mask
    diagonal, inverse_diagonal = Hd.diagonal(), Hinv.diagonal()
    low_rank = MaskedInverse(*damped.low_rank, mask)

    def primal(precondition: Any, k: int) -> Tensor:
        return start + masked_cg(Hd, target, mask, precondition, Stop(0.0, k)).Y

    ways = {
        "primal diagonal": lambda k: primal(lambda R: R / diagonal, k),
        "primal low-rank": lambda k: primal(low_rank, k),
        "dual": lambda k: (
            (W - masked_cg(Hinv, W * pruned, pruned, lambda R: R / inverse_diagonal, Stop(0.0, k)).Y @ Hinv) * mask
        ),
    }
    found: dict[str, dict[str, int | None]] = {}
    for way, run in ways.items():
        found[way] = {f"{gap:g}": None for gap in GAPS}
        for k in range(1, MOST + 1):
            reached = loss(W, run(k), Hd) / best - 1
            for gap in GAPS:
                if reached <= gap and found[way][f"{gap:g}"] is None:
                    found[way][f"{gap:g}"] = k
            if reached <= min(GAPS):
                break
    return found


def direct(W: Tensor, Hd: Tensor, keep: Tensor) -> Tensor:
    out = torch.zeros_like(W)
    right = W @ Hd
    for row in range(len(W)):
        kept = keep[row].nonzero()[:, 0]
        out[row, kept] = torch.linalg.solve(Hd[kept][:, kept], right[row, kept])
    return out


def loss(W: Tensor, new: Tensor, Hd: Tensor) -> float:
    return float((((new - W) @ Hd) * (new - W)).sum())


if __name__ == "__main__":
    main()
