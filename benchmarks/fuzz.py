"""Mutated files of every kind that secateur reads: exit codes, tracebacks, seconds and memory.

    python benchmarks/fuzz.py --out benchmarks/results/fuzz.json

Inputs come from hypothesis (tests/fuzz/targets.py); each is read by the real command, in this process. A broken promise
is printed, and its input written to tests/fuzz/corpus. `--only NAME ...` fuzzes some; the JSON keeps the others.
The kernels under AddressSanitizer: install with `CC="gcc -g -fsanitize=address"`, then, with `LD_PRELOAD` of
libasan.so and libstdc++.so and `ASAN_OPTIONS=detect_leaks=0`, run `--only "packed zstd" "packed none" ...`.
Half an hour on one core.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import arguments_of, write_result
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

from targets import CORPUS, BrokenPromiseError, Target, targets  # noqa: E402

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
# Inputs of each target. Those that are slow to read are fewer.
NUMBERS = {
    "gguf": 2000, "safetensors": 1500, "config": 1000, "manifest": 1000, "metadata": 1500, "comparison": 1500,
    "recipe": 1500, "jsonl": 1000, "packed zstd": 3500, "packed none": 3500, "packed int8": 3000,
}  # fmt: skip


def main() -> None:
    """Fuzz every target, and write one JSON."""
    args = arguments_of(__doc__, share=1.0, only=list(NUMBERS))
    results = json.loads(args.out.read_text())["targets"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, target in targets(Path(scratch)).items():
            if name in args.only:
                results[name] = fuzz(target, max(1, int(args.share * NUMBERS[name])))
                print(name, results[name], flush=True)
                write_result(
                    args.out, {"targets": results, "inputs": sum(found["inputs"] for found in results.values())}
                )


def fuzz(target: Target, number: int) -> dict[str, object]:
    """Exit codes of mutated inputs, the slowest, and what broke a promise."""
    codes: Counter[str] = Counter()
    broken: list[str] = []
    slowest = [0.0]

    @seed(0)
    @settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=SLOW,
        phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        content = data.draw(target.inputs())
        started = time.perf_counter()
        try:
            codes[f"exit code {target.check(content)}"] += 1
        except BrokenPromiseError as error:
            codes["broken"] += 1
            if str(error)[:300] not in broken:
                broken.append(str(error)[:300])
                folder = CORPUS / target.name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
                print(error, flush=True)
        slowest[0] = max(slowest[0], time.perf_counter() - started)

    one()
    return {"inputs": sum(codes.values()), "codes": dict(codes), "slowest_seconds": slowest[0], "broken": broken}


if __name__ == "__main__":
    main()
