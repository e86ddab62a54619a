"""Sentences on the matrices of a run: why each got the pattern that it has, and which saw few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.recipe.recipe import Recipe
from secateur.recipe.rules import matrix_recipe, rule_for
from secateur.reporting.figures import MatrixReport
from secateur.reporting.report import Report

MOST_SHOWN = 3


def reason(recipe: Recipe, prices: Mapping[str, float], matrix: MatrixReport) -> str:
    """One sentence: the rule, the allocation's measurement, or the recipe's pattern for all.

    Args:
        recipe: of the run.
        prices: what one more zero costs in each matrix, relative to the median matrix.
        matrix: the matrix.
    """
    own = matrix_recipe(recipe, matrix.name)
    if own.own_pattern:
        rule = rule_for(recipe, matrix.name)
        return f"The rule for {', '.join(rule.match) if rule else matrix.name} says {own.pattern}."
    price = prices.get(matrix.name)
    if price is not None:
        return (
            f"At {recipe.pattern} in every matrix, one more zero here would cost the model's predictions "
            f"{_times(price)} one in the median matrix."
        )
    if recipe.allocation is not None:
        return f"The {recipe.allocation.rule} allocation gave it {matrix.sparsity:.1%}."
    return "Every matrix gets the recipe's pattern."


def extremes(report: Report) -> list[str]:
    """Sentences on the matrices with the most and the fewest zeros; one where all have the same."""
    matrices = sorted(report.matrices, key=lambda matrix: matrix.sparsity)
    if not matrices or matrices[-1].sparsity - matrices[0].sparsity < 0.005:
        return ["Every matrix has the same share of zeros."]
    shown, recipe = min(MOST_SHOWN, len(matrices) // 2), report.recipe
    picked = [*reversed(matrices[-shown:]), *reversed(matrices[:shown])]
    return [f"{each.name} has {each.sparsity:.1%} zeros. {reason(recipe, report.prices, each)}" for each in picked]


def few_tokens(matrices: Sequence[MatrixReport]) -> list[str]:
    """Sentences on matrices that saw fewer tokens than they have inputs."""
    mixed = [matrix for matrix in matrices if matrix.borrowed]
    others = [matrix for matrix in matrices if not matrix.borrowed and matrix.tokens < matrix.columns]
    notices: list[str] = []
    for short, kind, effect in (
        (mixed, "matrices of experts", ", so their Hessians were mixed with those of all the layer's tokens"),
        (others, "matrices", ""),
    ):
        if short:
            worst = min(short, key=lambda matrix: matrix.tokens / matrix.columns)
            notices.append(
                f"{len(short)} {kind} saw fewer calibration tokens than they have inputs ({worst.name}: "
                f"{worst.tokens} tokens, {worst.columns} inputs){effect}: more calibration text would help"
            )
    return notices


def _times(price: float) -> str:
    return f"{price:.1f} times as much as" if price >= 1 else f"only {price:.2f} times as much as"
