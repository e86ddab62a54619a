"""A sample of the injected faults, power cuts and damages of `benchmarks/faults.py`, which runs them all."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import harness
from harness import DAMAGES, FAULTS, Case

SCENARIOS = ("fresh", "overwrite", "sharded", "resumed", "publishing", "publishing without exchange", "cache")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    made = harness.build_shim(tmp_path_factory.mktemp("shim"))
    if made is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    return made


def test_a_sample_of_faults_breaks_no_promise(shim):
    chance = random.Random(1)
    calls = harness.count_calls(shim)
    assert min(calls.values()) > 10  # the shim sees what the command does
    cases = [Case(name, fault, chance.randint(1, calls[name])) for name in SCENARIOS for fault in FAULTS]
    cases += [
        Case("overwrite again", f"power cut, {how}", chance.randrange(1000)) for how in ("lost", "entries", "mixed")
    ]
    cases += [Case(stage, f"damage, {how}", 0) for stage in ("two shards", "reference") for how in DAMAGES]
    found = harness.run_cases(cases, shim, workers=1)
    assert len(found) == len(cases)
    assert not [result for result in found if result["broken"]]
    assert {-9, 2} <= {result["code"] for result in found}  # faults did happen
