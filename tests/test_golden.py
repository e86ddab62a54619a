"""Real matrices of SmolLM2 against figures of the reference implementations.

A small one is in tests/golden (`benchmarks/make_golden.py` wrote it); two whole ones are kept next to the checkout.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import solve_by

from secateur.numerics.hessian import relative_error

SMALL = "smollm2-l10-v_proj-corner"
NAMES = [SMALL, "smollm2-l10-q_proj", "smollm2-l10-v_proj"]
PATTERNS = ["0.5", "0.7", "2:4", "4:8"]
golden_case = pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name in NAMES for pattern in PATTERNS])


@pytest.fixture
def load(request):
    """A function from a matrix's name to its weights, its Hessian and the references' figures."""

    def loaded(name):
        folder = Path(__file__).parent / "golden" if name == SMALL else request.getfixturevalue("shared") / "golden"
        arrays = np.load(folder / f"{name}.npz")
        figures = json.loads((folder / "golden.json").read_text())[name]
        return torch.from_numpy(arrays["W"]).float(), torch.from_numpy(arrays["H"]).float(), figures

    return loaded


def error(W, H, pattern, solver="mrp", **options):
    return relative_error(solve_by(W, H, pattern, solver, **options).weight, W, H)


@golden_case
def test_sparsegpt_is_within_a_percent_of_the_authors_code(load, name, pattern):
    W, H, figures = load(name)
    assert error(W, H, pattern, solver="sparsegpt") == pytest.approx(figures[pattern]["sparsegpt"], rel=0.01)


@golden_case
@pytest.mark.parametrize("options", [{}, {"mask": "S"}], ids=["default", "mask S"])
def test_full_row_is_at_most_the_refit_of_sparsegpts_mask(load, name, pattern, options):
    W, H, figures = load(name)
    allowed = 1.0 if not options else 1.0015  # on the S mask of 4:8 the gap that the tolerance leaves shows
    assert error(W, H, pattern, **options) <= figures[pattern]["sparsegpt_mask_refit"] * allowed


@golden_case
def test_block_wise_joint_compensation_is_at_most_single(load, name, pattern):
    W, H, _ = load(name)
    joint = error(W, H, pattern, mask="S", compensation="M", block=128)
    assert joint <= error(W, H, pattern, mask="S", compensation="S", block=128)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:]], ids=["corner", "whole"])
def test_joint_masks_are_at_most_single_ones_for_2_4(load, names):
    total = {"S": 0.0, "M": 0.0}
    for name in names:
        W, H, _ = load(name)
        for mask in total:
            total[mask] += error(W, H, "2:4", mask=mask, compensation="M", block=128)
    assert total["M"] <= total["S"]


@golden_case
def test_joint_mask_search_is_near_or_below_alps(load, name, pattern):
    W, H, figures = load(name)
    allowed = 1.05 if name == SMALL else 1.0  # ALPS's schedule is the better one on few columns
    assert error(W, H, pattern, solver="admm") <= allowed * figures[pattern]["alps"]


@pytest.mark.parametrize(("name", "share"), [(SMALL, 1.0), ("smollm2-l10-v_proj", 0.99)])
def test_exchanges_end_below_alps(load, name, share):
    """The other cells take longer and are in benchmarks/golden.py."""
    W, H, figures = load(name)
    assert error(W, H, "2:4", solver="admm", refine={}) <= share * figures["2:4"]["alps"]
