"""Allocation: how zeros are spread over the matrices, and over the rows of each.

It applies to the matrices that no rule gives a pattern; their zeros add up to the recipe's pattern exactly.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.input_groups import observation_passes
from secateur.calibration.stream import Batch, Stream, num_sequences
from secateur.errors import errors_within
from secateur.models.blocks import Block
from secateur.numerics.hessian import Hessian
from secateur.pruning.context import LayerPatterns, RunContext
from secateur.pruning.fisher import output_fisher_information
from secateur.pruning.loss_curves import (
    LossCurve,
    curve_levels,
    exact_patterns,
    exchange_levels,
    loss_curve,
    minimise_loss,
    prices_of_zeros,
    row_scale,
    sparsity_bounds,
)
from secateur.recipe.patterns import NM, Pattern, Unstructured
from secateur.recipe.recipe import Recipe
from secateur.recipe.rules import matrix_recipe
from secateur.runtime import distributed

OUTLIER = 5.0  # OWL's M: an outlier is a score above this multiple of its matrix's mean


def allocate(
    model: Any, blocks: Sequence[Block], stream: Stream, batches: Sequence[Batch], context: RunContext
) -> LayerPatterns:
    """Patterns of all matrices of a chain. Nothing is changed, the stream's state included.

    Args:
        model: the dense model.
        blocks: of the chain.
        stream: in front of them.
        batches: of all ranks.
        context: its recipe has the rules and the allocation.

    Raises:
        SecateurError: a matrix that saw none of the sequences.

    Cost: none without an allocation. Else a dense pass of every block over the allocation's tokens with its Hessians,
        and for `curve` a backward pass over them and a refit of 32 rows for each of 5 levels and matrix.
    """
    recipe, allocation = context.recipe, context.recipe.allocation
    found = {matrix.name: matrix_recipe(recipe, matrix.name) for block in blocks for matrix in block.matrices}
    fixed = LayerPatterns({name: own.pattern for name, own in found.items()})
    free = matrices_without_pattern(blocks, recipe)
    if allocation is None or not free:
        return fixed
    chain = blocks[0].name
    allocated = context.store.patterns_of(chain, lambda: _allocated(model, blocks, stream, batches, free, context))
    return replace(allocated, patterns=fixed.patterns | allocated.patterns)


def _allocated(
    model: Any,
    blocks: Sequence[Block],
    stream: Stream,
    batches: Sequence[Batch],
    free: set[str],
    context: RunContext,
) -> LayerPatterns:
    """Patterns of the matrices in `free`."""
    allocation = context.recipe.allocation
    assert allocation is not None
    sizes = [num_sequences(batch) for batch in batches]
    sequences = sequences_of(allocation.tokens, sum(sizes), stream.num_tokens)
    if fisher_needs_all_sequences(blocks, stream):
        sequences = sum(sizes)
    # A router shows an expert only some tokens, and its Hessian needs as many as it has inputs.
    first = stream.first(sizes, sum(sizes) if stream.routed else sequences)
    match allocation.rule:
        case "owl":
            return _by_outliers(blocks, first, free, context)
        case "curve":
            fisher = output_fisher_information(
                model, blocks, batches, sequences, context.recipe.seed, context.store, stream.memory, context.progress
            )
            return _by_curves(blocks, first, free, fisher, context)


def matrices_without_pattern(blocks: Sequence[Block], recipe: Recipe) -> set[str]:
    """Names of the matrices that an allocation spreads zeros over: no rule gives them a pattern."""
    names = [matrix.name for block in blocks for matrix in block.matrices]
    return {name for name in names if not matrix_recipe(recipe, name).own_pattern}


def fisher_needs_all_sequences(blocks: Sequence[Block], stream: Stream) -> bool:
    """Whether gradients need all sequences: an expert that is a module must see a token, and a fused one need not."""
    return any(matrix.name in stream.routed and matrix.index is None for block in blocks for matrix in block.matrices)


def sequences_of(tokens: int, sequences: int, num_tokens: int) -> int:
    """Number of sequences that together hold `tokens`, at their mean length."""
    return max(1, math.ceil(tokens * sequences / num_tokens))


def _by_curves(
    blocks: Sequence[Block],
    stream: Stream,
    free: set[str],
    fisher: dict[str, Tensor],
    context: RunContext,
) -> LayerPatterns:
    """Patterns that minimise the sum of measured losses."""
    pattern, allocation = context.recipe.pattern, context.recipe.allocation
    assert allocation is not None
    levels = curve_levels(pattern, allocation.spread)

    def measure(name: str, W: Tensor, hessian: Hessian) -> LossCurve:
        return loss_curve(W, hessian, fisher[name], levels)

    curves = _over_dense_blocks(blocks, stream, free, measure, context)
    prices = prices_of_zeros(curves, pattern)
    if isinstance(pattern, NM):
        return LayerPatterns(exchange_levels(curves, pattern, allocation.spread), prices=prices)
    scales = {name: row_scale(squares) for name, squares in fisher.items() if name in free}
    return LayerPatterns(minimise_loss(curves, pattern, allocation.spread), scales, prices)


def _over_dense_blocks(
    blocks: Sequence[Block],
    stream: Stream,
    wanted: set[str],
    measure: Callable[[str, Tensor, Hessian], Any],
    context: RunContext,
) -> dict[str, Any]:
    """`measure(name, W, hessian)` of each wanted matrix in the dense model. The stream is used up.

    The matrices of a block are sharded over the ranks; all ranks get all figures (plain data).
    """
    measured: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        with context.store.onload_block(block):
            own = {block.matrices[number] for number in distributed.shard(len(block.matrices))}
            groups = [
                group
                for group in stream.groups[block.name]
                if any(matrix.name in wanted for matrix, _ in group.members)
            ]
            outputs = HiddenStates(stream.memory, len(stream.hidden))
            for observed in observation_passes(groups, stream.memory.hessian_bytes):
                hessians = stream.observe(block, observed, None if len(outputs) else outputs)
                for group in observed:
                    hessian = hessians.pop(group.leader.name)
                    for matrix, input_dim in group.members:
                        if matrix in own and matrix.name in wanted:
                            with errors_within(matrix.name):
                                W = matrix.weight(input_dim).float()
                                measured[matrix.name] = measure(matrix.name, W, hessian)
            stream.hidden = outputs if groups else stream.outputs(block)
        context.progress("allocation", index + 1, len(blocks))
    found = distributed.all_gather_items(measured)
    return {each.name: found[each.name] for block in blocks for each in block.matrices if each.name in wanted}


@dataclass(frozen=True)
class _Outliers:
    num_weights: int
    share: float


def _count_outliers(_name: str, W: Float[Tensor, "R C"], hessian: Hessian) -> _Outliers:
    score = W.abs() * hessian.input_energy.sqrt()
    return _Outliers(W.numel(), float((score > OUTLIER * score.mean()).float().mean()))


def _by_outliers(blocks: Sequence[Block], stream: Stream, free: set[str], context: RunContext) -> LayerPatterns:
    """OWL: a block's sparsity falls linearly with its share of outliers, over a range of twice the spread."""
    pattern, allocation = context.recipe.pattern, context.recipe.allocation
    assert allocation is not None
    assert isinstance(pattern, Unstructured), "checked by the recipe"
    measured = _over_dense_blocks(blocks, stream, free, _count_outliers, context)
    return LayerPatterns(owl_patterns(measured, _block_of(blocks), pattern, allocation.spread))


def _block_of(blocks: Sequence[Block]) -> dict[str, str]:
    return {matrix.name: block.name for block in blocks for matrix in block.matrices}


def owl_patterns(
    measured: dict[str, _Outliers], block_of: dict[str, str], pattern: Unstructured, spread: float
) -> dict[str, Pattern]:
    """Patterns of matrices by their blocks' shares of outliers."""
    members: dict[str, list[str]] = {}
    for name in measured:
        members.setdefault(block_of[name], []).append(name)
    num_weights = {name: outliers.num_weights for name, outliers in measured.items()}
    share = {
        block: sum(num_weights[name] * measured[name].share for name in names)
        / sum(num_weights[name] for name in names)
        for block, names in members.items()
    }
    width = max(share.values()) - min(share.values())
    scaled = {block: (share[block] - min(share.values())) / width if width else 0.0 for block in members}
    mean = sum(scaled[block_of[name]] * number for name, number in num_weights.items()) / sum(num_weights.values())
    low, high = sparsity_bounds(pattern, spread)
    wanted = {
        name: min(high, max(low, pattern.sparsity - 2 * spread * (scaled[block_of[name]] - mean))) for name in measured
    }
    return exact_patterns(wanted, num_weights, pattern, low, high)
