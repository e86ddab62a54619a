"""Solver time on one matrix against the SparseGPT authors' code, in the same run.

    git clone https://github.com/IST-DASLab/sparsegpt CLONE
    python benchmarks/reference.py --sparsegpt CLONE --out benchmarks/results/reference.json

Their `fasterprune` is called as it is, except that `torch.cuda.synchronize`, which fails without a GPU, is left out
there. Ours is `secateur.solve`; both factor the Hessian within the time. Each runs `--repeats` times in turn.
Operations and reads of single numbers are counted too: on a GPU each of the first is a kernel at least, and at each of
the second the CPU waits for it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import arguments_of, write_result
from solvers import clock, random_problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import solve
from secateur.numerics.hessian import relative_error
from secateur.recipe.patterns import NM, parse_pattern

REFERENCE = "reference sparsegpt"
OURS: dict[str, dict[str, Any]] = {"sparsegpt": {"name": "sparsegpt"}, "mrp full row": {"name": "mrp"}}


def main() -> None:
    """Measure every pattern and write one JSON."""
    args = arguments_of(__doc__, "sparsegpt", size=4096, patterns=["50%", "2:4"], repeats=5, device="cpu")
    reference = load_reference(args.sparsegpt)
    W, H = random_problem(args.size, args.size, args.device)
    rows = [measure(W, H, pattern, args.repeats, reference) for pattern in args.patterns]
    print(json.dumps(rows, indent=1))
    write_result(args.out, {"size": args.size, "rows": rows}, args.device)


def load_reference(clone: Path) -> type:
    """The class SparseGPT of the clone."""
    sys.path.insert(0, str(clone))
    return importlib.import_module("sparsegpt").SparseGPT


def measure(W: Tensor, H: Tensor, pattern: str, repeats: int, reference: type) -> dict[str, Any]:
    """Median seconds and relative layer error of every case, and both as ratios to the reference's."""
    cases: dict[str, Callable[[], Tensor]] = {REFERENCE: lambda: theirs(reference, W, H, pattern)}
    cases |= {name: lambda o=options: solve(W, H, pattern, o).weight for name, options in OURS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    errors: dict[str, float] = {}
    counts = {name: count(run) for name, run in cases.items()}
    for _ in range(repeats):
        for name, run in cases.items():
            started = clock(W)
            pruned = run()
            seconds[name].append(clock(W) - started)
            errors[name] = relative_error(pruned, W, H)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "pattern": pattern,
        "cases": {
            name: {
                "seconds": median[name],
                "time_to_reference": median[name] / median[REFERENCE],
                "error_to_reference": errors[name] / errors[REFERENCE],
                **counts[name],
            }
            for name in cases
        },
    }


class _Counter(TorchDispatchMode):
    """Counts what reaches the kernels: all operations but views, and reads of single numbers."""

    operations = reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Tensor]) -> dict[str, int]:
    """Operations of a call, and how often it waits for one."""
    with _Counter() as counter:
        run()
    return {"operations": counter.operations, "reads": counter.reads}


def theirs(reference: type, W: Tensor, H: Tensor, pattern: str) -> Tensor:
    """The weights that the authors' code gives."""
    parsed = parse_pattern(pattern)
    n_m = {"prunen": parsed.m - parsed.n, "prunem": parsed.m} if isinstance(parsed, NM) else {}
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device)
    layer.weight.data = W.clone()
    pruner = reference(layer)
    pruner.H = H.clone()
    silent = contextlib.redirect_stdout(io.StringIO())
    no_gpu = contextlib.nullcontext() if W.is_cuda else mock.patch("torch.cuda.synchronize")
    with torch.no_grad(), silent, no_gpu:
        pruner.fasterprune(0.5 if n_m else parsed.sparsity, **n_m)
    return layer.weight.data


if __name__ == "__main__":
    main()
