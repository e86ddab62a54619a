"""What a run would do, and what it would take: time from one timed block, memory and disk from sizes.

The block is pruned for real, on a few batches, in a copy that is dropped. Work that grows with the calibration text is
scaled to the whole text; the solver's is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.calibration.coverage import Coverage, coverage_from
from secateur.calibration.dense_pass import DensePass
from secateur.calibration.input_groups import observation_passes
from secateur.calibration.stream import Batch, Stream, num_sequences
from secateur.models.blocks import Block
from secateur.models.checks import check_finite_weights, check_runnable
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import ModelStructure
from secateur.models.matrices import all_parameters
from secateur.pruning.allocation import fisher_needs_all_sequences, matrices_without_pattern, sequences_of
from secateur.pruning.block_refit import (
    MaskedMasterWeights,
    Objective,
    OutputError,
    int8_matrices_of,
    refit_block,
)
from secateur.pruning.context import LayerPatterns, RunContext
from secateur.pruning.fisher import output_fisher_information
from secateur.pruning.loop import (
    check_any_left,
    check_number_of_batches,
    checked_dense_pass,
    checked_structure,
    end_of,
    prune_block,
)
from secateur.pruning.loss_curves import curve_levels, loss_curve
from secateur.pruning.predictions import PredictionDivergence
from secateur.recipe.rules import matrix_recipe

SAMPLE_TOKENS = 2048  # at least, in two batches or more
REFIT_BYTES = 30  # a weight
SOLVER_BYTES = 8 + 4 * 4  # an entry of the Hessian: the fp64 sum, then H, Hd, U and a product in fp32

T = TypeVar("T")


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        coverage: every matrix of the layers.
        num_blocks: blocks to prune.
        num_tokens, num_batches: of the calibration text.
        seconds: estimated time of the run, without the search for a channel order.
        solver_seconds: the part of it that does not grow with the text.
        memory_bytes: estimated peak of memory besides mapped files, for a run from files.
        disk_bytes: what a run takes: the model, one shard while it is saved, and reordered or converted weights.
        notices: what the user should know about the model and the text.
    """

    coverage: Coverage
    num_blocks: int
    num_tokens: int
    num_batches: int
    seconds: float
    solver_seconds: float
    memory_bytes: int
    disk_bytes: int
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"coverage": self.coverage.to_dict()}


@torch.no_grad()
def estimate(model: nn.Module, batches: Sequence[Batch], context: RunContext, shard_bytes: int) -> DryRun:
    """Try a recipe on a few batches and one block. No weight of the model changes.

    Args:
        model: the model, mapped from its files.
        batches: all calibration batches.
        context: its store drops what is written to a block.
        shard_bytes: size of a shard.

    Raises:
        SecateurError: what a run would raise before the first block.
    """
    check_runnable(model)
    check_finite_weights(model)
    check_number_of_batches(len(batches), context)
    sample = _sample(batches)
    scale = _num_tokens(batches) / _num_tokens(sample)
    with deterministic_forward(model):
        structure = checked_structure(model, sample[0], context)
        passes = [_dense_pass(model, chain, sample, context) for chain in structure.chains]
        check_any_left([block for found, _ in passes for block in found.blocks])
        dense, block = _largest_block([found for found, _ in passes])
        size_in_blocks = sum(all_parameters(each.module) for each in structure.blocks) / all_parameters(block.module)
        solving, rest = _seconds_of_block(block, dense.stream, context, scale)
        allocation = _seconds_of_allocation(model, dense, block, sample, context, scale, size_in_blocks)
        aiming = _seconds_of_predictions(model, structure, dense, sample, context, scale)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    reordered = 0 if context.recipe.permutation is None else model_bytes  # a copy of the weights in another order
    dense_passes = scale * sum(seconds for _, seconds in passes)
    return DryRun(
        coverage_from(model, structure, [found for found, _ in passes]),
        len(structure.blocks),
        _num_tokens(batches),
        len(batches),
        dense_passes + size_in_blocks * (solving + rest) + allocation + aiming,
        size_in_blocks * solving,
        _memory(model, structure, block, dense.stream, scale, context),
        model_bytes + min(shard_bytes, model_bytes) + reordered,
    )


def _largest_block(passes: Sequence[DensePass]) -> tuple[DensePass, Block]:
    """The block with the most weights to prune, which takes the most memory, and the dense pass of its chain.

    The first block of a mixture of experts often has none.
    """
    found = [(dense, block) for dense in passes for block in dense.blocks if block.matrices]
    return max(found, key=lambda each: sum(matrix.stored.numel() for matrix in each[1].matrices))


def _sample(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The first batches, two or more, with enough tokens for steady times."""
    number = min(2, len(batches))
    while number < len(batches) and _num_tokens(batches[:number]) < SAMPLE_TOKENS:
        number += 1
    return batches[:number]


def _num_tokens(batches: Sequence[Batch]) -> int:
    """Number of tokens, or of sequences where inputs are not token ids."""
    return sum(batch["input_ids"].numel() if "input_ids" in batch else num_sequences(batch) for batch in batches)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    found = function()
    return found, time.perf_counter() - started


def _dense_pass(model: nn.Module, chain: Any, sample: Sequence[Batch], context: RunContext) -> tuple[DensePass, float]:
    return _timed(lambda: checked_dense_pass(model, chain, sample, context))


def _seconds_of_block(block: Block, stream: Stream, context: RunContext, scale: float) -> tuple[float, float]:
    """Seconds of a block's solvers, and of all else on all batches, from pruning it on a few."""
    options = context.recipe.refit
    patterns = LayerPatterns({each.name: matrix_recipe(context.recipe, each.name).pattern for each in block.matrices})
    if context.has_dense_stream:
        stream.dense = stream.hidden
    context.workspace.limit = context.memory.chunk_bytes
    with context.store.onload_block(block):
        outputs, forward = _timed(lambda: stream.outputs(block))
        reports, step = _timed(lambda: prune_block(block, stream, outputs, patterns, context))
        solving = sum(report.seconds for report in reports)
        passes = 1 + context.has_dense_stream  # the replay, and the dense stream's outputs
        refit = 0.0
        if options is not None:
            objective = OutputError(block, stream, outputs)
            whole = options.over_tokens(round(scale * stream.num_tokens)).at_width(outputs[0].shape[-1])
            int8 = int8_matrices_of(block, stream, context)
            _, refit = _timed(
                lambda: refit_block(block, objective, len(stream.hidden), whole, 0, context.storage_of, int8)
            )
    context.progress("one block", 1, 1)
    return solving, scale * (step - solving + passes * forward + refit)


def _seconds_of_predictions(
    model: nn.Module,
    structure: ModelStructure,
    dense: DensePass,
    sample: Sequence[Batch],
    context: RunContext,
    scale: float,
) -> float:
    """Seconds that the last blocks take more than others, as the gradients of their refit go through the model's head.

    The last block gets the hidden states in front of the first: they take as long.
    """
    refit, block = context.recipe.refit, dense.blocks[-1]
    end = end_of(model, structure.chains, sample, context)
    if refit is None or end is None or not block.matrices:
        return 0.0
    stream = dense.stream
    with context.store.onload_block(block), end.behind(block):
        outputs = stream.outputs(block)
        aimed = _seconds_of_gradients(block, PredictionDivergence(block, stream, outputs, end), stream, context)
        plain = _seconds_of_gradients(block, OutputError(block, stream, outputs), stream, context)
    epochs = refit.over_tokens(round(scale * stream.num_tokens)).epochs
    blocks = min(refit.prediction_blocks, len(structure.blocks))
    return scale * blocks * epochs * max(0.0, aimed - plain)


def _seconds_of_gradients(block: Block, objective: Objective, stream: Stream, context: RunContext) -> float:
    """Seconds of the gradients of all batches."""

    def gradients() -> None:
        with MaskedMasterWeights(block, context.storage_of).trainable(), torch.enable_grad():
            for index in range(len(stream.hidden)):
                objective(index).backward()

    return _timed(gradients)[1]


def _seconds_of_allocation(
    model: nn.Module,
    dense: DensePass,
    block: Block,
    sample: Sequence[Batch],
    context: RunContext,
    scale: float,
    size_in_blocks: float,
) -> float:
    """Seconds of an allocation, from one sequence, or all of the sample for routed experts, and from one block.

    `size_in_blocks` is the size of all blocks together in multiples of this one.
    """
    allocation = context.recipe.allocation
    free = matrices_without_pattern(dense.blocks, context.recipe)
    if allocation is None or allocation.rule != "curve" or not free:  # OWL takes a dense pass over a few sequences
        return 0.0
    stream, in_sample = dense.stream, sum(map(num_sequences, sample))
    tried = in_sample if fisher_needs_all_sequences(dense.blocks, stream) else 1
    fisher, backward = _timed(
        lambda: output_fisher_information(model, dense.blocks, sample, tried, 0, context.store, context.memory)
    )
    levels, observing, curves = curve_levels(context.recipe.pattern, allocation.spread), 0.0, 0.0
    with context.store.onload_block(block):
        for groups in observation_passes(stream.groups[block.name], context.memory.hessian_bytes):
            hessians, seconds = _timed(partial(stream.observe, block, groups))
            observing += seconds
            for group in groups:
                hessian = hessians.pop(group.leader.name)
                for matrix, input_dim in group.members:
                    if matrix.name in free:
                        W = matrix.weight(input_dim).float()
                        curves += _timed(partial(loss_curve, W, hessian, fisher[matrix.name], levels))[1]
    everything = scale * in_sample
    asked = everything if tried > 1 else sequences_of(allocation.tokens, in_sample, stream.num_tokens)
    sequences = min(everything, asked)
    observed = everything if stream.routed else sequences
    return sequences * backward / tried + size_in_blocks * (observed / in_sample * observing + curves)


def _memory(
    model: nn.Module, structure: ModelStructure, block: Block, stream: Stream, scale: float, context: RunContext
) -> int:
    """Peak of memory besides mapped files: all outside the blocks, one block, hidden states, Hessians, the refit."""
    with context.store.onload_block(block):  # files may hold a narrower dtype than forward passes have
        width = block.matrices[0].stored.element_size()  # hidden states of a model that is one block are its inputs
    in_blocks = {id(each) for found in structure.blocks for each in found.module.parameters()}
    outside = sum(each.numel() for each in model.parameters() if id(each) not in in_blocks) * width
    weights = all_parameters(block.module)
    hidden = int(sum(each.numel() * each.element_size() for each in stream.hidden) * scale)
    held = context.memory.held_bytes(hidden, 4 if context.has_dense_stream else 2)
    passes = observation_passes(stream.groups[block.name], context.hessian_bytes)
    sums = max(sum(context.moments_per_group * group.sum_bytes for group in groups) for groups in passes)
    largest = max(group.columns for groups in passes for group in groups)
    solving = sums + SOLVER_BYTES * largest**2
    refit = REFIT_BYTES * weights if context.recipe.refit is not None else 0
    keeps_dense = context.recipe.target is not None or context.sees_dense_block(passes)  # as `prune_block` does
    copy = weights * width if keeps_dense else 0
    return int(outside + weights * width + copy + held + max(solving, refit))
