"""What the report costs: its size, and its share of a run's time.

    python benchmarks/report.py --out benchmarks/results/report.json

Prunes SmolLM2-135M by SparseGPT (a short run) and by the default recipe, on few tokens, and times what the report adds:
the figures of the error through depth, and writing the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import arguments_of, write_result

import secateur
from secateur.pruning import depth
from secateur.reporting import page

RUNS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"solver": "sparsegpt"},
    "balanced": {"recipe": "balanced"},
}


def main() -> None:
    """Time both runs."""
    args = arguments_of(__doc__, samples=16, seq_len=512)
    spent = {"depth": 0.0, "page": 0.0}
    for name in ("advance_dense", "measure"):
        setattr(depth.DepthMeter, name, timed(getattr(depth.DepthMeter, name), spent, "depth"))
    page.run_page = timed(page.run_page, spent, "page")
    rows = []
    for name, options in RUNS.items():
        spent.update(depth=0.0, page=0.0)
        with TemporaryDirectory() as scratch:
            started = time.perf_counter()
            report = secateur.prune(
                "smollm2", Path(scratch) / "out", samples=args.samples, seq_len=args.seq_len, **options
            )
            seconds = time.perf_counter() - started
            size = (Path(scratch) / "out" / "report.html").stat().st_size
        share = sum(spent.values()) / seconds
        rows.append({"run": name, "seconds": seconds, **spent, "share": share, "page_bytes": size,
                     "blocks": len(report.depth)})  # fmt: skip
        print(rows[-1], flush=True)
    write_result(args.out, {"samples": args.samples, "seq_len": args.seq_len, "rows": rows})


def timed(function: Callable[..., Any], spent: dict[str, float], what: str) -> Callable[..., Any]:
    """The function, whose time is added to `spent[what]`."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - started

    return wrapped


if __name__ == "__main__":
    main()
