"""Real matrices of SmolLM2 against figures of the reference implementations (kept next to the checkout)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import solve_by

from secateur.numerics.hessian import relative_error

NAMES = ["smollm2-l10-q_proj", "smollm2-l10-v_proj"]
PATTERNS = ["0.5", "0.7", "2:4", "4:8"]
golden_case = pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name in NAMES for pattern in PATTERNS])


def load(shared, name):
    arrays = np.load(shared / "golden" / f"{name}.npz")
    figures = json.loads((shared / "golden" / "golden.json").read_text())[name]
    return torch.from_numpy(arrays["W"]).float(), torch.from_numpy(arrays["H"]).float(), figures


def error(W, H, pattern, solver="mrp", **options):
    return relative_error(solve_by(W, H, pattern, solver, **options).weight, W, H)


@golden_case
def test_sparsegpt_is_within_a_percent_of_the_authors_code(shared, name, pattern):
    W, H, figures = load(shared, name)
    assert error(W, H, pattern, solver="sparsegpt") == pytest.approx(figures[pattern]["sparsegpt"], rel=0.01)


@golden_case
@pytest.mark.parametrize("options", [{}, {"mask": "S"}], ids=["default", "mask S"])
def test_full_row_is_at_most_the_refit_of_sparsegpts_mask(shared, name, pattern, options):
    W, H, figures = load(shared, name)
    allowed = 1.0 if not options else 1.0015  # on the S mask of 4:8 the gap that the tolerance leaves shows
    assert error(W, H, pattern, **options) <= figures[pattern]["sparsegpt_mask_refit"] * allowed


@golden_case
def test_block_wise_joint_compensation_is_at_most_single(shared, name, pattern):
    W, H, _ = load(shared, name)
    joint = error(W, H, pattern, mask="S", compensation="M", block=128)
    assert joint <= error(W, H, pattern, mask="S", compensation="S", block=128)


def test_joint_mask_is_at_most_single_for_2_4_over_both_matrices(shared):
    total = {"S": 0.0, "M": 0.0}
    for name in NAMES:
        W, H, _ = load(shared, name)
        for mask in total:
            total[mask] += error(W, H, "2:4", mask=mask, compensation="M", block=128)
    assert total["M"] <= total["S"]


@golden_case
def test_joint_mask_search_is_at_most_alps(shared, name, pattern):
    W, H, figures = load(shared, name)
    assert error(W, H, pattern, solver="admm") <= figures[pattern]["alps"]


def test_exchanges_end_a_percent_under_alps(shared):
    """The other three cells take longer and are in benchmarks/golden.py."""
    W, H, figures = load(shared, "smollm2-l10-v_proj")
    assert error(W, H, "2:4", solver="admm", refine={}) <= 0.99 * figures["2:4"]["alps"]
