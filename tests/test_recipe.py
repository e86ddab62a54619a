"""Presets, and what is given over them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from secateur.pattern import Unstructured, parse_pattern
from secateur.recipe import EFFORTS, describe, make_plan
from secateur.run import Texts

HALF = Unstructured(0.5)


def described(effort=None, **settings):
    return describe(make_plan(HALF, effort, settings))


def test_balanced_is_the_default_and_each_effort_sets_its_method():
    assert described() == described("balanced")
    for effort, preset in EFFORTS.items():
        assert described(effort)["method"] == preset["method"]


def test_a_method_that_is_named_stands_alone():
    alone = described(method="sparsegpt")
    assert (alone["refit"], alone["allocation"], alone["target"]) == ("none", "uniform", "pruned")


def test_what_is_given_wins_over_the_effort():
    changed = described("best", method="sparsegpt", refit_passes=3)
    assert changed["method"] == "sparsegpt"
    assert changed["refit"]["passes"] == 3
    assert changed["allocation"] == described("best")["allocation"]
    assert described("best", refit="none")["refit"] == "none"
    assert described("best", damping=0.05)["options"]["damping"] == 0.05


@pytest.mark.parametrize(
    ("effort", "settings", "message"),
    [
        ("great", {}, "effort is 'great'; it must be one of fast, balanced, best"),
        (None, {"method": "mrp", "refit": "whole"}, "refit is 'whole'; it must be one of none, block"),
        (None, {"method": "mrp", "refine": "swaps"}, "refine is 'swaps'"),
        (None, {"method": "mrp", "target": "sparse"}, "target is 'sparse'"),
        (None, {"method": "mrp", "target": "dense", "target_strength": 2.0}, "target strength is 2"),
        (None, {"method": "mrp", "allocation": "even"}, "allocation is 'even'"),
        (None, {"method": "mrp", "refit_passes": 2}, "refit_passes is given, but refit is off"),
        (None, {"method": "mrp", "max_swaps": 2}, "max_swaps is given, but refine is off"),
        (None, {"method": "mrp", "refit": "block", "refit_rate": 3.0}, "refit rate is 3"),
        (None, {"method": "mrp", "refit": "block", "refit_passes": -1}, "refit passes are -1"),
        (None, {"method": "mrp", "refit": "block", "refit_strength": 1.5}, "refit strength is 1.5"),
        (None, {"method": "mrp", "refine": "swap", "max_swaps": 0}, "max swaps are 0"),
        (None, {"method": "mrp", "refit": "block", "refit_passes": 1.5}, "refit_passes is 1.5; it must be a whole"),
        (None, {"method": "mrp", "refit": "block", "refit_rate": "x"}, "refit_rate is 'x'; it must be a number"),
        (None, {"method": "mrp", "refine": "swap", "max_swaps": 1.5}, "max_swaps is 1.5; it must be a whole"),
        (None, {"method": "mrp", "target": "dense", "target_strength": "x"}, "target_strength is 'x'; it must be"),
        (None, {"method": "mrp", "allocation": "curve", "allocation_windows": "4"}, "allocation_windows is '4'"),
        (None, {"method": "admm", "search_iterations": 2.5}, "search_iterations is 2.5; it must be a whole number"),
        (None, {"method": "mrp", "search_iterations": 3}, "method mrp has no option 'search_iterations'"),
        (None, {"method": "admm", "penalty_start": 2.0}, "penalties run from 2 to 0.7"),
        (None, {"method": "admm", "search_iterations": 0}, "search iterations are 0"),
    ],
)
def test_bad_settings_are_named(effort, settings, message):
    with pytest.raises(ValueError, match=message):
        make_plan(HALF, effort, settings)


def test_best_searches_further_where_there_is_no_allocation_to_pay_for():
    assert make_plan(parse_pattern("50%"), "best").solver.search_iterations == 12
    assert make_plan(parse_pattern("2:4"), "best").solver.search_iterations == 40
    assert make_plan(parse_pattern("2:4"), "best", {"search_iterations": 7}).solver.search_iterations == 7


def test_batches_are_as_large_as_the_steps_of_a_refit(tmp_path):
    from models import character_tokenizer

    (tmp_path / "text.txt").write_text("a text of some length, to be cut into windows.\n" * 400)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    texts = Texts(tmp_path / "text.txt", samples=256, seq_len=64, seed=0)
    for settings, windows in (
        ({"method": "mrp"}, 32),  # 2048 tokens
        ({"method": "mrp", "refit": "block"}, 8),
        ({"method": "mrp", "refit": "block", "refit_step_tokens": 1024}, 16),
    ):
        plan = make_plan(parse_pattern("50%"), settings=settings)
        batches = texts.calibration(character_tokenizer(), config, plan).batches
        assert {len(batch["input_ids"]) for batch in batches[:-1]} == {windows}
    with pytest.raises(ValueError, match="tokens a step are 0"):
        make_plan(parse_pattern("50%"), settings={"method": "mrp", "refit": "block", "refit_step_tokens": 0})
