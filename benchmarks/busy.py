"""Time of `secateur demo` on a quiet machine and next to other work on every core, by OpenMP's wait policy.

    python benchmarks/busy.py --out benchmarks/results/busy.json

Run it on a quiet machine. The other work is one process on each core that multiplies numbers without pause. `default`
is what the command sets by itself. The demo runs in full for it, and on few tokens to compare policies. Its model must
be in the cache, so run `secateur demo` once before. `--cells NAME ...` measures some; the JSON keeps the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from common import arguments_of, write_result

POLICIES = {
    "default": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
}
SHORT = ("--samples", "8", "--seq-len", "256", "--eval-tokens", "4096")
CELLS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "full, default, quiet": ("default", (), False),
    "full, default, busy": ("default", (), True),
    **{
        f"short, {policy}, {state}": (policy, SHORT, state == "busy")
        for policy in ("PASSIVE", "spin 1000", "spin 10000", "ACTIVE")
        for state in ("quiet", "busy")
    },
}
LIMIT = 1800.0  # seconds


def main() -> None:
    """Measure the cells and add them to one JSON."""
    args = arguments_of(__doc__, cells=list(CELLS))
    seconds = json.loads(args.out.read_text())["seconds"] if args.out.exists() else {}
    for name in args.cells:
        policy, arguments, is_busy = CELLS[name]
        with busy_cores() if is_busy else nullcontext():
            seconds[name] = demo_seconds(policy, arguments)
        print(name, seconds[name], flush=True)
        write_result(args.out, {"cores": os.cpu_count(), "seconds": seconds})


def demo_seconds(policy: str, arguments: tuple[str, ...]) -> float:
    """Wall seconds of one demo."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "secateur", "demo", "--json", *arguments, "--out", str(Path(scratch) / "out")]
        started = time.perf_counter()
        subprocess.run(
            command, env=environment | POLICIES[policy], check=True, timeout=LIMIT, stdout=subprocess.DEVNULL
        )
        return time.perf_counter() - started


@contextmanager
def busy_cores() -> Iterator[None]:
    """Other work on every core."""
    spin = "x = 1\nwhile True:\n    x = x * 3 % 1000003"
    workers = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()
