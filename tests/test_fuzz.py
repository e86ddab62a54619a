"""A short run of the fuzzer on every file that secateur reads; `benchmarks/fuzz.py` runs it for long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import targets

NAMES = (
    "gguf",
    "safetensors",
    "config",
    "manifest",
    "metadata",
    "comparison",
    "recipe",
    "jsonl",
    "packed zstd",
    "packed none",
    "packed int8",
)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
FEW = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SECATEUR_CACHE", "")
        yield targets.targets(tmp_path_factory.mktemp("fuzzed"))


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_file_is_taken_and_the_corpus_breaks_no_promise(every, name):
    target = every[name]
    assert target.check(target.seed) == 0
    for content in targets.corpus_of(name):
        target.check(content)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_break_no_promise(every, name):
    codes = []

    @FEW
    @given(st.data())
    def fuzz(data):
        codes.append(every[name].check(data.draw(every[name].inputs())))

    fuzz()
    assert 2 in codes
