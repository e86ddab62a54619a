"""Time and error of each solver on one matrix, as ratios to SparseGPT in the same run.

    python benchmarks/solvers.py --out benchmarks/results/solvers.json

Every time includes the factorisation of the Hessian. Each method runs `--repeats` times in turn with the others
and the median counts; wide matrices run once. Inputs are random with a decaying spectrum and a few strong channels.
Flops are those of products, Cholesky factors, their inverses and triangular systems; the machine's peak is that of the
largest product of the same run. `--sizes` is square matrices from 512 to 4096, and Llama-2-7B's widest one.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from typing import Any

import torch
from common import arguments_of, write_result
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from secateur import solve
from secateur.numerics.hessian import relative_error

SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 4096)]
SIZES = [(512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008)]
WIDE = 2048  # from here on one repeat
COUNTED = 4096  # above, counting flops would take minutes more
CASES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"name": "sparsegpt"},
    "mrp block 128": {"name": "mrp", "block": 128},
    "mrp full row": {"name": "mrp"},
    "mrp full row, tolerance 1e-4": {"name": "mrp", "tolerance": 1e-4},
}
SIZE_CASES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"name": "sparsegpt"},
    "magnitude": {"name": "magnitude"},
    "wanda": {"name": "wanda"},
    "mrp": {"name": "mrp"},
    "admm": {"name": "admm"},
}


def main() -> None:
    """Measure every shape and write one JSON."""
    args = arguments_of(
        __doc__,
        patterns=["50%", "2:4"],
        repeats=3,
        device="cpu",
        threads=torch.get_num_threads(),
        largest=11008,  # skip shapes with a larger side
        sizes=False,  # every solver against the size of the matrix
    )
    torch.set_num_threads(args.threads)
    rows = []
    for shape in SIZES if args.sizes else SHAPES:
        if max(shape) <= args.largest:
            W, H = random_problem(*shape, args.device)
            cases = SIZE_CASES if args.sizes else CASES
            repeats = 1 if args.sizes and max(shape) >= WIDE else args.repeats
            rows += [measure(W, H, pattern, repeats, cases) for pattern in args.patterns]
            print(json.dumps(rows[-len(args.patterns) :], indent=1), flush=True)
    write_result(args.out, {"rows": rows}, args.device)


def random_problem(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """Weights and a Hessian with a power-law spectrum and log-normal channel strengths."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, columns + 1) ** -0.4
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = (torch.randn(2 * columns, columns, generator=generator) * spectrum) @ mix
    X += 0.1 * torch.randn(2 * columns, columns, generator=generator)
    X *= torch.exp(0.5 * torch.randn(columns, generator=generator))
    W = 0.02 * torch.randn(rows, columns, generator=generator)
    return W.to(device), (X.T @ X / len(X)).to(device)


def measure(W: Tensor, H: Tensor, pattern: str, repeats: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Median seconds, flops, time and error relative to SparseGPT, for every case."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    errors, infos = {}, {}
    for _ in range(repeats):
        for name, options in cases.items():
            started = clock(W)
            solved = solve(W, H, pattern, options)
            seconds[name].append(clock(W) - started)
            errors[name] = relative_error(solved.weight, W, H)
            infos[name] = solved.info
    median = {name: statistics.median(times) for name, times in seconds.items()}
    product = min(time_product(W, H) for _ in range(3))
    return {
        "rows": W.shape[0],
        "columns": W.shape[1],
        "pattern": pattern,
        "seconds_of_one_product": product,
        "flops_of_one_product": 2 * W.shape[0] * W.shape[1] ** 2,
        "cases": {
            name: {
                "seconds": median[name],
                "flops": count_flops(W, H, pattern, cases[name]),
                "time_to_sparsegpt": median[name] / median["sparsegpt"],
                "error_to_sparsegpt": errors[name] / errors["sparsegpt"],
                "iterations": infos[name].get("iterations"),
            }
            for name in cases
        },
    }


def count_flops(W: Tensor, H: Tensor, pattern: str, options: dict[str, Any]) -> int | None:
    """In a separate run, as counting slows small products down; None for the widest, whose run takes minutes."""
    if len(H) > COUNTED:
        return None
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        solve(W, H, pattern, options)
    return counter.get_total_flops()


def of_product(_total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def of_factor(system: Any, *_: Any, **__: Any) -> int:
    return math.prod(system) * system[-1] // 3


def of_inverse(factor: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(factor) * factor[-1] // 3


def of_triangular(triangle: Any, right: Any, **_: Any) -> int:
    return math.prod(right) * triangle[-1]


# What torch's counter leaves out, by the operator.
UNCOUNTED = {
    torch.ops.aten.addmm_: of_product,
    torch.ops.aten.baddbmm_: of_product,
    torch.ops.aten.linalg_cholesky_ex: of_factor,
    torch.ops.aten.cholesky_inverse: of_inverse,
    torch.ops.aten.linalg_solve_triangular: of_triangular,
}


def time_product(W: Tensor, H: Tensor) -> float:
    started = clock(W)
    _ = W @ H
    return clock(W) - started


def clock(tensor: Tensor) -> float:
    """Now, after all work on the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
