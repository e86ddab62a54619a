"""The loop: for each block observe its inputs, solve every matrix, refit the block, commit it, and replay it.

Inputs inside a block are those of the block before its own pruning (SparseGPT's protocol). With `true_sequential` the
block is observed again after each group of matrices that share an input, and where the Hessians of all its matrices do
not fit into memory together (many experts), for as many as do, each time with its dense weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from secateur.calibration.dense_pass import DensePass, run_dense_pass
from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.input_groups import InputGroup, observation_passes
from secateur.calibration.stream import Batch, Stream
from secateur.errors import SecateurError, UnsupportedModelError, errors_within
from secateur.models.blocks import Block
from secateur.models.checks import check_finite_weights, check_runnable
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import BlockChain, ModelStructure, find_block_chains
from secateur.models.matrices import Matrix
from secateur.numerics.damping import Damping
from secateur.permutation.order import OrderSearch
from secateur.pruning.allocation import allocate
from secateur.pruning.block_refit import (
    Objective,
    OutputError,
    check_batches,
    int8_matrices_of,
    refit_block,
    refit_targets,
)
from secateur.pruning.context import LayerPatterns, RunContext
from secateur.pruning.dense_target import DenseWeights, Moments, check_all_tokens, observe_moments, write_gain
from secateur.pruning.depth import DepthMeter
from secateur.pruning.matrix_step import prune_matrix
from secateur.pruning.predictions import ModelEnd, PredictionDivergence
from secateur.recipe.patterns import NM
from secateur.recipe.recipe import Recipe
from secateur.recipe.rules import matrix_recipe
from secateur.reporting.figures import BlockFigures, BlockReport, DepthReport, MatrixReport
from secateur.reporting.reasons import few_tokens
from secateur.runtime import distributed
from secateur.solvers.swaps import check_columns

REORDERED = "the dense model's channels were put in another order: adapters made for it do not fit this model"


@dataclass(eq=False)
class Outcome:
    """What a run gives.

    Args:
        layer_weights: weights of the layers' matrices.
        dense: why each matrix stayed dense, by name.
        matrices: figures of each pruned matrix.
        blocks: figures of each refit block.
        depth: distance from the dense model behind each block.
        prices: of a zero, see `LayerPatterns`.
        notices: what the user should know.
    """

    layer_weights: int
    dense: dict[str, str]
    matrices: list[MatrixReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    depth: list[DepthReport] = field(default_factory=list)
    prices: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_model(model: nn.Module, batches: Sequence[Batch], context: RunContext) -> Outcome:
    """Prune a model in place.

    A dense pass checks the model, the texts and the patterns before the first weight changes. What only pruning brings
    about (a Hessian that can't be factored) ends the run where it happens. Blocks that the store holds finished are
    replayed, and the run ends with the bits of one that was never stopped. Several ranks, each with the model and all
    batches, share the work and end with the same model.

    Args:
        model: the model.
        batches: of all ranks.
        context: recipe, store, progress, memory.

    Raises:
        SecateurError: anything wrong with the model, the texts or the recipe.

    Cost: the dense pass (another for each further chain), two forward passes of each block over the batches, the
        Hessians and the solver calls; one more forward pass where something is fitted to the dense model; allocation
        and refit as their docstrings say.
    """
    check_runnable(model)
    check_finite_weights(model)
    check_number_of_batches(len(batches), context)
    with deterministic_forward(model):
        torch.manual_seed(context.recipe.seed)
        structure = checked_structure(model, batches[0], context)
        outcome = Outcome(sum(structure.weights.values()), dict(structure.dense), notices=_notices(structure, context))
        first, *later = structure.chains
        dense_pass = checked_dense_pass(model, first, batches, context)
        # Only to find what is wrong: their calls are recorded again when the chains before are pruned.
        found = [*dense_pass.blocks]
        for chain in later:
            found += checked_dense_pass(model, chain, batches, context).blocks
        check_any_left(found)
        if context.recipe.permutation is not None:
            if not context.store.is_reordered:
                _reorder_channels(model, first, dense_pass, batches, context)
            outcome.notices.append(REORDERED if context.store.is_reordered else "no channels could be reordered")
        end = end_of(model, structure.chains, batches, context)
        if end is None and _aims_at_predictions(context.recipe):
            outcome.notices.append(
                "predictions of every token can't be formed from the last block's output alone, so the last blocks aim "
                "at their own outputs"
            )
        done, total = 0, len(structure.blocks)
        for chain in structure.chains:
            if chain is not first:
                dense_pass = checked_dense_pass(model, chain, batches, context)
            patterns = allocate(model, dense_pass.blocks, dense_pass.stream, batches, context)
            outcome.prices |= patterns.prices
            _prune_chain(dense_pass, patterns, (done, total), outcome, context, end)
            done += len(chain.blocks)
    outcome.notices += few_tokens(outcome.matrices)
    return outcome


def checked_structure(model: nn.Module, batch: Batch, context: RunContext) -> ModelStructure:
    """The blocks of a model that run on a batch, checked against the recipe."""
    structure = find_block_chains(model, batch, context.recipe, context.store)
    check_steps(structure, context)
    return structure


def checked_dense_pass(model: nn.Module, chain: BlockChain, batches: Sequence[Batch], context: RunContext) -> DensePass:
    """The dense pass of a chain, checked against the recipe."""
    damping = Damping(context.recipe.damping, context.recipe.shrinkage)
    found = run_dense_pass(model, chain, batches, context.progress, context.store, context.memory, damping)
    found.check_none_missed()
    check_stream(found.stream, context)
    return found


def check_any_left(blocks: Sequence[Block]) -> None:
    """Check that the dense pass left a matrix to prune.

    Raises:
        UnsupportedModelError: it left none.
    """
    if not any(block.matrices for block in blocks):
        reasons = sorted({reason for block in blocks for reason in block.dense.values()})
        raise UnsupportedModelError(f"no matrix is left to prune: {', '.join(reasons) or 'none takes part'}")


def _reorder_channels(
    model: nn.Module, chain: BlockChain, dense_pass: DensePass, batches: Sequence[Batch], context: RunContext
) -> None:
    """Put the channels of the first chain, and the hidden states in front of it, in an order that suits n:m."""
    recipe = context.recipe
    assert recipe.permutation is not None
    assert isinstance(recipe.pattern, NM), "checked by the recipe"
    matrices = [matrix.name for block in dense_pass.blocks for matrix in block.matrices]
    patterns = {name: matrix_recipe(recipe, name).pattern for name in matrices}
    search = OrderSearch(
        dense_pass, batches, patterns, recipe.pattern, recipe.permutation, context.store, context.progress
    )
    order = search.run(model, chain, recipe.seed)
    if not order.indices:
        return
    context.store.reorder(model, order)
    hidden = dense_pass.stream.hidden
    for index in range(len(hidden)):
        hidden[index] = order.of_hidden(hidden[index])


def _aims_at_predictions(recipe: Recipe) -> bool:
    return recipe.refit is not None and recipe.refit.prediction_blocks > 0


def end_of(
    model: nn.Module, chains: Sequence[BlockChain], batches: Sequence[Batch], context: RunContext
) -> ModelEnd | None:
    """What lies behind the last blocks, where their refit minimises the divergence of the predictions; else None."""
    if not _aims_at_predictions(context.recipe):
        return None
    return ModelEnd.of(model, chains, batches, context.store)


def _prune_chain(
    dense_pass: DensePass,
    patterns: LayerPatterns,
    place: tuple[int, int],
    outcome: Outcome,
    context: RunContext,
    end: ModelEnd | None,
) -> None:
    """Prune a chain block by block, each on what the pruned ones before it give.

    Args:
        dense_pass: of the chain.
        patterns: of its matrices.
        place: blocks of the chains before this one, and of all chains.
        outcome: takes the figures.
        context: of the run.
        end: what lies behind the last blocks, where their refit looks at the predictions.
    """
    stream, (done, total) = dense_pass.stream, place
    if context.recipe.refit is not None:
        refit = context.recipe.refit.over_tokens(stream.num_tokens)
        context = replace(context, recipe=replace(context.recipe, refit=refit))
    recipe = context.recipe
    num_prediction_blocks = 0 if end is None or recipe.refit is None else recipe.refit.prediction_blocks
    if context.has_dense_stream:
        assert isinstance(stream.hidden, HiddenStates)
        stream.dense = stream.hidden.copy()
    context.workspace.limit = context.memory.chunk_bytes
    meter = DepthMeter(stream)
    for number, block in enumerate(dense_pass.blocks, done):
        # A few models draw random numbers in evaluation (hashes of an attention): the same, resumed or not.
        torch.manual_seed(recipe.seed + number)
        with context.store.onload_block(block):
            dense_outputs = None if stream.dense is None else stream.outputs(block, of_dense=True)
            meter.advance_dense(block, dense_outputs)
            figures = context.store.reuse(block)
            stage = "prune" if figures is None else "replay"  # of what an earlier process pruned, which is faster
            if figures is None:
                seed, own_end = recipe.seed + number, end if number >= total - num_prediction_blocks else None
                figures = _prune_and_refit(block, stream, dense_outputs, patterns, seed, context, own_end)
                context.store.commit(block, figures)
        context.workspace.limit = figures.chunk
        outcome.matrices += figures.matrices
        outcome.blocks += [figures.refit] if figures.refit is not None else []
        outcome.dense |= block.dense
        torch.manual_seed(recipe.seed + number)
        with context.store.onload_block(block):
            if block is not dense_pass.blocks[-1]:
                stream.advance(block)
                stream.dense = dense_outputs
            outcome.depth += meter.measure(block)
        context.progress(stage, number + 1, total)


def _prune_and_refit(
    block: Block,
    stream: Stream,
    dense_outputs: HiddenStates | None,
    patterns: LayerPatterns,
    seed: int,
    context: RunContext,
    end: ModelEnd | None,
) -> BlockFigures:
    """Prune every matrix of a block, and refit the block where that is asked for."""
    refit, outputs = context.recipe.refit, None
    if refit is None or not block.matrices:
        return BlockFigures(prune_block(block, stream, dense_outputs, patterns, context), None, context.workspace.limit)
    assert dense_outputs is not None
    if end is None and refit.strength < 1:
        outputs = HiddenStates(stream.memory, len(dense_outputs))
    matrices = prune_block(block, stream, dense_outputs, patterns, context, outputs)
    started = time.perf_counter()
    with nullcontext() if end is None else end.behind(block):
        if end is not None:
            objective: Objective = PredictionDivergence(block, stream, dense_outputs, end)
        else:
            targets = dense_outputs if outputs is None else refit_targets(outputs, dense_outputs, refit.strength)
            objective = OutputError(block, stream, targets)
        int8 = int8_matrices_of(block, stream, context)
        options = refit.at_width(dense_outputs[0].shape[-1])
        figures = refit_block(block, objective, len(stream.hidden), options, seed, context.storage_of, int8)
    report = BlockReport(name=block.name, objective=objective.name, seconds=time.perf_counter() - started, **figures)
    return BlockFigures(matrices, report, context.workspace.limit)


def prune_block(
    block: Block,
    stream: Stream,
    dense_outputs: HiddenStates | None,
    patterns: LayerPatterns,
    context: RunContext,
    outputs: HiddenStates | None = None,
) -> list[MatrixReport]:
    """Prune every matrix of a block in place; their figures.

    Args:
        block: the block, onloaded.
        stream: in front of it.
        dense_outputs: its outputs on the dense stream, for a dense target.
        patterns: of its matrices.
        context: of the run.
        outputs: takes the block's outputs on the pruned stream while it is dense.
    """
    target = context.recipe.target
    passes = observation_passes(stream.groups[block.name], context.hessian_bytes)
    sees_dense = context.sees_dense_block(passes)
    originals = DenseWeights(block) if target is not None or sees_dense else None
    reports: list[MatrixReport] = []
    for observed in passes:
        with originals.restored() if originals is not None and sees_dense else nullcontext():
            if target is None or originals is None:
                moments = {name: Moments(hessian) for name, hessian in stream.observe(block, observed, outputs).items()}
            else:
                assert dense_outputs is not None
                moments = observe_moments(block, stream, observed, dense_outputs, originals, target, outputs)
        outputs = None  # taken
        owners = _owners(observed)
        gains = _write_gains(block, stream, observed) if target is not None and target.kind == "residual" else {}
        solved: dict[str, MatrixReport] = {}
        for group in observed:
            own = moments.pop(group.leader.name)
            for matrix, input_dim in group.members:
                if owners[matrix] == distributed.rank():
                    pattern, scale = patterns.patterns[matrix.name], patterns.row_scales.get(matrix.name)
                    gain = gains.get(matrix.name)
                    solved[matrix.name] = prune_matrix(matrix, input_dim, own, gain, pattern, scale, context)
        for matrix, owner in owners.items():
            distributed.broadcast(matrix.stored, owner)
        of_all_ranks = distributed.all_gather_items(solved)
        context.workspace.agree()
        reports += [of_all_ranks[matrix.name] for matrix in owners]
    return reports


def _owners(groups: Sequence[InputGroup]) -> dict[Matrix, int]:
    """The rank that solves each matrix, by R C^2, which every solver costs."""
    members = [member for group in groups for member in group.members]
    costs = [float(matrix.stored.numel() * matrix.weight(input_dim).shape[1]) for matrix, input_dim in members]
    return dict(zip([matrix for matrix, _ in members], distributed.assign_owners(costs), strict=True))


def _write_gains(block: Block, stream: Stream, groups: Sequence[InputGroup]) -> dict[str, float | None]:
    """How the residual stream follows each matrix, as rank 0 finds it on its first batch."""
    members = [member for group in groups for member in group.members] if distributed.is_main() else []
    return distributed.broadcast_object(
        {matrix.name: write_gain(block, stream, matrix, input_dim) for matrix, input_dim in members}
    )


def check_number_of_batches(number: int, context: RunContext) -> None:
    """Check that every rank gets a batch, and that a refit can hold one out.

    Raises:
        SecateurError: there are too few.
    """
    if number < distributed.world_size():
        raise SecateurError(
            f"{number} calibration batches can't be sharded over {distributed.world_size()} processes: use more "
            f"‹samples›, or fewer processes"
        )
    if context.recipe.refit is not None:
        check_batches(number)


def check_steps(structure: ModelStructure, context: RunContext) -> None:
    """Check that no step needs blocks where the model is one block.

    Raises:
        UnsupportedModelError: one does.
    """
    recipe = context.recipe
    asked = [name for name in ("refit", "target", "allocation", "permutation") if getattr(recipe, name) is not None]
    for chain in structure.chains:
        if chain.whole and asked:
            raise UnsupportedModelError(
                f"the model can't be replayed block by block ({chain.whole}), which {' and '.join(asked)} would need: "
                f"use ‹recipe=fast›, or ‹solver› alone"
            )


def _notices(structure: ModelStructure, context: RunContext) -> list[str]:
    where = "where those before it are pruned" if context.observes_groups_apart else "in the dense model"
    return [
        f"the model can't be replayed block by block ({chain.whole}): every matrix is fitted to its inputs {where}"
        for chain in structure.chains
        if chain.whole
    ]


def check_stream(stream: Stream, context: RunContext) -> None:
    """Check that every matrix's input dimension suits its pattern and the exchanges, and its inputs the target.

    Raises:
        SecateurError: one does not; the message names the first.
    """
    if context.recipe.target is not None:
        check_all_tokens(stream)
    for groups in stream.groups.values():
        for group in groups:
            for matrix, input_dim in group.members:
                columns = matrix.weight(input_dim).shape[1]
                with errors_within(matrix.name):
                    matrix_recipe(context.recipe, matrix.name).pattern.check_width(columns)
                    if context.recipe.refine is not None:
                        check_columns(columns, stream.hidden[0].device)
