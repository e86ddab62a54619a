"""Patterns: what they accept, and that selections are exact to the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.numerics.masks import is_met, keep_all_but_lowest, keep_highest_of_groups, keep_highest_of_rows
from secateur.recipe.patterns import NM, Unstructured, parse_pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("50%", Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (" 62.5 % ", Unstructured(0.625)),
        ("0", Unstructured(0.0)),
        ("1", Unstructured(1.0)),
        (0.25, Unstructured(0.25)),
        ("2:4", NM(2, 4)),
        ("15:16", NM(15, 16)),
        (NM(1, 4), NM(1, 4)),
    ],
)
def test_parse(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


def test_a_switch_is_no_pattern():
    with pytest.raises(ValueError, match="pattern is True; give a share"):
        parse_pattern(True)


@pytest.mark.parametrize("text", ["150%", "-0.1", "1.5", "4:4", "0:4", "5:4", "8:32", "half", "2:4:8", "", "nan%"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"sparsity|pattern"):
        parse_pattern(text)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_lowest_are_pruned_exactly_and_ties_by_index(values, data):
    score = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, len(values)))
    keep = keep_all_but_lowest(score, count)
    expected = sorted(range(len(values)), key=lambda index: (values[index], index))[:count]
    assert sorted((~keep).nonzero()[:, 0].tolist()) == sorted(expected)


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_rows_differ_by_at_most_one_and_follow_a_permutation(rows, columns, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, columns, generator=generator)
    count = Unstructured(sparsity).num_pruned(rows, columns)
    keep = keep_highest_of_rows(score, count)
    pruned = (~keep).sum(1)
    assert int(pruned.sum()) == count
    assert int(pruned.max() - pruned.min()) <= 1
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(keep_highest_of_rows(score[order], count), keep[order])


@given(st.integers(1, 15), st.integers(2, 16), st.integers(0, 99))
def test_groups_keep_n_of_m(n, m, seed):
    if n >= m:
        return
    pattern = NM(n, m)
    score = torch.randint(0, 4, (5, 3 * m), generator=torch.Generator().manual_seed(seed)).float()
    keep = keep_highest_of_groups(score, pattern)
    groups = keep.view(5, 3, m)
    assert bool((groups.sum(-1) == n).all())
    lowest_kept = score.view(5, 3, m).masked_fill(~groups, 9.0).amin(-1)
    highest_pruned = score.view(5, 3, m).masked_fill(groups, -1.0).amax(-1)
    assert bool((lowest_kept >= highest_pruned).all())
    assert is_met(pattern, ~keep)
    assert not is_met(pattern, ~keep & (torch.arange(3 * m) > 0) & (torch.arange(3 * m) >= m))


def test_width_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"multiple of 4, but it is 10.*leave the matrix dense"):
        NM(2, 4).check_width(10)


def test_a_percentage_without_its_sign_is_told_of():
    with pytest.raises(ValueError, match="for a percentage write 50%"):
        parse_pattern("50")
    with pytest.raises(ValueError, match="sparsity is 150%; it must lie between 0% .* and 100%"):
        parse_pattern("150%")
