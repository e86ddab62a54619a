"""A sample of the injected faults, power cuts and damages of `benchmarks/faults.py`, which runs them all."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import harness
from harness import DAMAGES, FAULTS, Case


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    made = harness.build_shim(tmp_path_factory.mktemp("shim"))
    if made is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    return made


@pytest.mark.long
def test_a_sample_of_faults_breaks_no_promise(shim):
    chance = random.Random(1)
    calls = harness.calls_of_scenarios(shim)
    assert min(map(len, calls.values())) > 10  # the shim sees what the command does
    cases = []
    for name, kinds in calls.items():
        writes = [at for at, kind in enumerate(kinds, 1) if kind == "W"]
        for fault in FAULTS:
            if "write" not in fault or writes:
                cases.append(Case(name, fault, chance.choice(writes if "write" in fault else range(1, len(kinds) + 1))))
    cases += [Case(stage, f"damage, {how}", 0) for stage in ("two shards", "reference") for how in DAMAGES[::3]]
    by_fault: dict[str, list[Case]] = {}
    for case in cases:
        by_fault.setdefault(case.fault, []).append(case)
    cases = [chance.choice(of_one) for of_one in by_fault.values()]  # the whole set takes minutes
    for how in ("lost", "lost", "entries", "mixed", "mixed"):
        cases.append(Case("overwrite again", f"power cut, {how}", chance.randrange(1000)))
    found = harness.run_cases(cases, shim, workers=1)
    assert len(found) == len(cases) == len(FAULTS) + len(DAMAGES[::3]) + 5
    assert not [result for result in found if result["broken"]]
    assert {-9, 2} <= {result["code"] for result in found}
    assert len([result for result in found if result["hit"]]) > 0.8 * len(found)  # faults did happen
