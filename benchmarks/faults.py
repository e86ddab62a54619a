"""Faults at every call that changes a file, power cuts, and damaged files: which promises of docs/guarantees.md hold?

    python benchmarks/faults.py --out benchmarks/results/faults.json

Tiny models are pruned by the real command. A process is killed, or a call fails, at each call in turn; what it leaves
is resumed and compared bit by bit with a run that nothing happened to. Power cuts replay the recorded calls, and lose,
keep or reorder what was not flushed. Needs a C compiler and Linux. `--share 0.1` runs a tenth.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import arguments_of, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

from harness import DAMAGES, FAULTS, Case, build_shim, calls_of_scenarios, run_cases

POWER_CUTS = {"fresh": 40, "overwrite again": 60}  # scenario -> cuts, each of three kinds
DAMAGED = 16  # of each kind at each stage
STEPS = {"full disk": 3, "read-only from then on": 3}  # every third call; other faults come at each


def main() -> None:
    """Run all cases, and write one JSON."""
    args = arguments_of(__doc__, share=1.0)
    with tempfile.TemporaryDirectory() as scratch:
        shim = build_shim(Path(scratch))
        if shim is None:
            raise SystemExit("no C compiler, or no Linux: faults can't be injected")
        calls = calls_of_scenarios(shim)
        cases = all_cases(calls)
        if args.share < 1:
            cases = random.Random(0).sample(cases, int(args.share * len(cases)))
        found = run_cases(cases, shim, workers=2)
    found = [result for result in found if result["hit"]]
    broken = [result for result in found if result["broken"]]
    for result in broken:
        print(result["case"], *result["broken"], result["output"], sep="\n    ")
    kinds = Counter(result["case"]["fault"].partition(",")[0] for result in found)
    codes = Counter(f"{result['case']['fault']}: exit code {result['code']}" for result in found)
    numbers = {name: len(each) for name, each in calls.items()}
    write_result(args.out, {"calls": numbers, "cases": dict(kinds), "codes": dict(codes), "broken": broken})
    print(f"{len(found)} cases, {len(broken)} broke a promise")


def all_cases(calls: dict[str, str]) -> list[Case]:
    """Every fault at the calls of every scenario, power cuts over the whole run, and damages of every kind."""
    cases = [
        Case(scenario, fault, at)
        for scenario, kinds in calls.items()
        for fault in FAULTS
        for at in range(1, len(kinds) + 1, STEPS.get(fault, 1))
        if "write" not in fault or kinds[at - 1] == "W"
    ]
    for scenario, number in POWER_CUTS.items():
        for how in ("lost", "entries", "mixed"):
            cases += [Case(scenario, f"power cut, {how}", 1000 * step // number) for step in range(1, number + 1)]
    for stage in ("two blocks", "two shards", "whole", "reference"):
        cases += [Case(stage, f"damage, {how}", seed) for how in DAMAGES for seed in range(DAMAGED)]
    return cases


if __name__ == "__main__":
    main()
