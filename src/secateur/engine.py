"""The loop: for each block observe its inputs, solve every matrix, write back, replay the block on pruned weights.

Inputs inside a block are those of the block before its own pruning (SparseGPT's protocol); with `true_sequential`
the block is observed again after each group of matrices that share an input, and where the Gram matrices of all its
matrices don't fit into memory together (many experts), after as many as do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur import parallel
from secateur.allocation import Allocation, Allotment, allocate
from secateur.capture import Batch, InputGroup, Progress, Stream, passes
from secateur.gram import Gram
from secateur.linalg import NotPositiveDefiniteError
from secateur.memory import HiddenStates, Memory, Workspace
from secateur.model import Block, UnsupportedModelError, body_of, check_finite_weights, check_runnable, observable
from secateur.observe import Matrix
from secateur.pattern import Pattern
from secateur.refit import BlockRefit, refit_block, refit_targets
from secateur.report import BlockFigures, BlockReport, MatrixReport
from secateur.residence import InMemory, Store
from secateur.solvers import Solved, Solver
from secateur.solvers.contract import held_to_contract
from secateur.solvers.swap import Swaps, check_columns
from secateur.stacks import Stack, Structure, find_stacks
from secateur.survey import survey
from secateur.target import DenseWeights, Moments, Target, aim, check_all_tokens, write_gain
from secateur.target import observe as observe_both
from secateur.workspace import limited


@dataclass(frozen=True, eq=False)
class Plan:
    """What to prune and how.

    Args:
        method, effort: the solver's name and the preset it came from, for the report.
        swaps: exchanges after the solver, or None.
        target: what each matrix is fitted to.
        refit: the block refit, or None.
        allocation: how zeros are spread over the matrices.
        storage_dtype: the dtype a parameter is saved in, by name (default: its own).
        memory: what may be held in it.
    """

    pattern: Pattern
    solver: Solver
    method: str = ""
    effort: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    true_sequential: bool = False
    swaps: Swaps | None = None
    target: Target = field(default_factory=Target)
    refit: BlockRefit | None = None
    allocation: Allocation = field(default_factory=Allocation)
    storage_dtype: dict[str, torch.dtype] | None = None
    seed: int = 0
    memory: Memory = field(default_factory=Memory)

    def storage_of(self, name: str, own: torch.dtype) -> torch.dtype:
        """The dtype that a matrix (or an expert's parameter) is saved in."""
        return (self.storage_dtype or {}).get(name.partition("[")[0], own)


@dataclass(eq=False)
class Outcome:
    """What a run gives: figures of each matrix and each refit block, what stayed dense with the reason, how many
    weights the layers have in all, and what the user should know."""

    matrices: list[MatrixReport]
    blocks: list[BlockReport]
    dense: dict[str, str]
    layer_weights: int
    notices: list[str] = field(default_factory=list)


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    progress: Progress,
    store: Store | None = None,
) -> Outcome:
    """Prune the model in place.

    The model, the texts and the pattern are checked by a dense pass before the first weight changes. What only pruning
    brings about (a Gram matrix that can't be factored) ends the run where it is met. Blocks that a store
    holds finished are replayed, and the run ends with the bits of one that was never stopped. Several processes, each
    with the model and all batches, share the work (`parallel`) and end with the same model.

    Cost: the dense pass (another for each further stack), two forward passes of each block over the batches, the Gram
    matrices and the solver calls; one more forward pass where something aims at the dense model; allocation and refit
    as their docstrings say.
    """
    store = store or InMemory()
    check_runnable(model)
    check_finite_weights(model)
    if len(batches) < parallel.size():
        raise ValueError(
            f"{len(batches)} calibration batches can't be dealt out to {parallel.size()} processes: use more "
            f"--samples, or fewer processes"
        )
    if plan.refit is not None:
        plan.refit.check_batches(len(batches))
    with observable(model):
        torch.manual_seed(plan.seed)
        with store.running(body_of(model)):
            structure = find_stacks(model, batches[0], plan.include, plan.exclude)
        _check_steps(structure, plan)
        first, *later = structure.stacks
        outcome = Outcome([], [], dict(structure.idle), sum(structure.weights.values()), _notices(structure))
        stream = _survey(model, first, batches, plan, progress, store)
        for stack in later:  # only to find what is wrong: their calls are taken again when the stacks before are pruned
            _survey(model, stack, batches, plan, progress, store)
        for stack in structure.stacks:
            if stack is not first:
                stream = _survey(model, stack, batches, plan, progress, store)
            allotment = allocate(
                model, stack.blocks, stream, batches, plan.pattern, plan.allocation, plan.seed, progress, store
            )
            _prune_stack(stack, structure.blocks, stream, allotment, plan, outcome, progress, store)
    outcome.dense |= {name: reason for block in structure.blocks for name, reason in block.dense.items()}
    outcome.notices += _few_tokens(outcome.matrices)
    return outcome


def _survey(
    model: nn.Module, stack: Stack, batches: Sequence[Batch], plan: Plan, progress: Progress, store: Store
) -> Stream:
    """The stream in front of a stack, checked against the plan."""
    with store.using(stack.blocks[0]) if stack.whole else store.running(body_of(model)) as lockstep:
        stream = survey(model, stack.blocks, batches, progress, memory=plan.memory, lockstep=lockstep)
    _check_widths(stream, plan)
    if plan.target.kind != "pruned":
        check_all_tokens(stream)
    return stream


def _prune_stack(
    stack: Stack,
    everything: list[Block],
    stream: Stream,
    allotment: Allotment,
    plan: Plan,
    outcome: Outcome,
    progress: Progress,
    store: Store,
) -> None:
    """Prune a stack (of `everything`, all blocks) block by block, each on what the pruned ones before it give."""
    if plan.refit is not None or plan.target.kind != "pruned":
        assert isinstance(stream.hidden, HiddenStates)
        stream.dense = stream.hidden.shared()
    workspace = Workspace(plan.memory.chunk_bytes)
    for number, block in enumerate(stack.blocks, everything.index(stack.blocks[0])):
        # A few models draw random numbers even in evaluation (the hashes of an attention): the same, resumed or not.
        torch.manual_seed(plan.seed + number)
        with store.using(block):
            dense_outputs = None if stream.dense is None else stream.outputs(block, of_dense=True)
            figures = store.finished(block)
            if figures is None:
                targets = _refit_targets(block, stream, dense_outputs, plan)  # while the block is dense
                matrices = _prune_block(block, stream, dense_outputs, allotment, plan, workspace)
                refit = _refit(block, stream, targets, plan, seed=plan.seed + number)
                targets = None  # not to be held beside the next block's
                figures = BlockFigures(matrices, refit, workspace.limit)
                store.commit(block, figures)
        workspace.limit = figures.chunk
        outcome.matrices += figures.matrices
        outcome.blocks += [figures.refit] if figures.refit is not None else []
        if block is not stack.blocks[-1]:
            torch.manual_seed(plan.seed + number)
            with store.using(block):
                stream.advance(block)
            stream.dense = dense_outputs
        progress("prune", number + 1, len(everything))


def _prune_block(
    block: Block,
    stream: Stream,
    dense_outputs: HiddenStates | None,
    allotment: Allotment,
    plan: Plan,
    workspace: Workspace,
) -> list[MatrixReport]:
    one_by_one = plan.true_sequential or plan.target.kind == "residual"
    originals = DenseWeights(block) if plan.target.kind != "pruned" else None
    reports: list[MatrixReport] = []
    moments_a_group = 1 if originals is None else 3
    gram_bytes = 0 if one_by_one else plan.memory.gram_bytes // moments_a_group
    for observed in passes(stream.groups[block.name], gram_bytes):
        if originals is None:
            moments = {name: Moments(gram) for name, gram in stream.observe(block, observed).items()}
        else:
            assert dense_outputs is not None
            moments = observe_both(block, stream, observed, dense_outputs, originals, plan.target)
        owners = _owners(observed)
        gains = _write_gains(block, stream, observed) if plan.target.kind == "residual" else {}
        solved: dict[str, MatrixReport] = {}
        for group in observed:
            mine = moments.pop(group.leader.name)
            for matrix, input_dim in group.members:
                if owners[matrix] == parallel.rank():
                    pattern, scale = allotment.patterns[matrix.name], allotment.row_scales.get(matrix.name)
                    gain = gains.get(matrix.name)
                    solved[matrix.name] = _prune_matrix(matrix, input_dim, mine, gain, pattern, scale, plan, workspace)
        for matrix, owner in owners.items():
            parallel.send(matrix.stored, owner)
        everybodys = parallel.gather_items(solved)
        workspace.agree()
        reports += [everybodys[matrix.name] for matrix in owners]
    return reports


def _owners(groups: Sequence[InputGroup]) -> dict[Matrix, int]:
    """Which process solves each matrix: by R C^2, which is what all solvers cost."""
    members = [member for group in groups for member in group.members]
    costs = [float(matrix.stored.numel() * matrix.weight(input_dim).shape[1]) for matrix, input_dim in members]
    return dict(zip([matrix for matrix, _ in members], parallel.owners_of(costs), strict=True))


def _write_gains(block: Block, stream: Stream, groups: Sequence[InputGroup]) -> dict[str, float | None]:
    """How the residual stream follows each matrix, as the first process finds it on its first batch."""
    members = [member for group in groups for member in group.members] if parallel.is_first() else []
    return parallel.from_first(
        {matrix.name: write_gain(block, stream, matrix, input_dim) for matrix, input_dim in members}
    )


def _prune_matrix(
    matrix: Matrix,
    input_dim: int,
    moments: Moments,
    gain: float | None,
    pattern: Pattern,
    row_scale: Tensor | None,
    plan: Plan,
    workspace: Workspace,
) -> MatrixReport:
    """Solve one matrix, round to the dtype it is saved in, mask once more, write back, and measure."""
    started = time.perf_counter()
    view, gram = matrix.weight(input_dim), moments.gram
    W = view.to(torch.float32, copy=True)  # in an fp32 model .float() would alias what is overwritten below
    try:
        aimed = aim(W, moments, plan.target, gain)
        while (solved := _solve(aimed, gram, pattern, row_scale, plan, workspace.limit)) is None:
            workspace.halve("the solver's work", W.device)
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(f"{matrix.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    saved = solved.weight.to(plan.storage_of(matrix.name, view.dtype)).masked_fill_(~solved.keep, 0.0)
    if not bool(torch.isfinite(saved).all()):
        raise ValueError(f"{matrix.name}: the pruned weights are not finite in {saved.dtype}; use a larger --damping")
    view.copy_(saved)
    targeted = plan.target.kind != "pruned"
    return MatrixReport(
        name=matrix.name,
        rows=W.shape[0],
        columns=W.shape[1],
        input_dim=input_dim,
        pattern=str(pattern),
        zeros=int((~solved.keep).sum()),
        relative_error=relative_error(saved.float(), W, gram.xx),
        target_error=relative_error(saved.float(), aimed, gram.xx) if targeted else None,
        seconds=time.perf_counter() - started,
        tokens=gram.tokens,
        borrowed=gram.borrowed,
        solver=solved.info | ({"write_gain": gain} if gain is not None else {}),
    )


def _solve(
    W: Float[Tensor, "R C"],
    gram: Gram,
    pattern: Pattern,
    row_scale: Float[Tensor, " R"] | None,
    plan: Plan,
    chunk: int | None,
) -> Solved | None:
    """The solver's answer, refined where asked for; rows are scaled for the choice among them, and back.

    None where a GPU's memory is too small for it at this chunk.
    """
    scale = 1.0 if row_scale is None else row_scale.to(W.device)[:, None]
    try:
        with limited(chunk):
            solved = held_to_contract(plan.solver, W * scale, gram, pattern)
            if plan.swaps is not None:
                solved = plan.swaps(W * scale, solved, gram, pattern)
    except torch.OutOfMemoryError:
        return None
    return replace(solved, weight=solved.weight / scale)


def _refit_targets(block: Block, stream: Stream, dense_outputs: HiddenStates | None, plan: Plan) -> HiddenStates | None:
    """What a block is refit to, where that is asked for and it has something to refit."""
    if plan.refit is None or not block.matrices:
        return None
    assert dense_outputs is not None
    return refit_targets(block, stream, dense_outputs, plan.refit.strength)


def _refit(block: Block, stream: Stream, targets: HiddenStates | None, plan: Plan, seed: int) -> BlockReport | None:
    """Refit a block to its targets, where it has any, and time it."""
    if plan.refit is None or targets is None:
        return None
    started = time.perf_counter()
    figures = refit_block(block, stream, targets, plan.refit, seed, plan.storage_of)
    return BlockReport(name=block.name, seconds=time.perf_counter() - started, **figures)


def relative_error(pruned: Float[Tensor, "R C"], W: Float[Tensor, "R C"], H: Float[Tensor, "C C"]) -> float:
    """Relative layer error `tr(D H D^T) / tr(W H W^T)`, D = pruned - W, with the undamped H.

    Products in H's dtype, sums in float64. 0 where W gives no output at all.
    """
    D = pruned - W
    lost = float(((D @ H) * D).sum(1).cpu().double().sum())
    whole = float(((W @ H) * W).sum(1).cpu().double().sum())
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _check_steps(structure: Structure, plan: Plan) -> None:
    """Raise UnsupportedModelError for steps that need blocks, where the model is one as a whole."""
    steps = {
        "refit block": plan.refit is not None,
        f"target {plan.target.kind}": plan.target.kind != "pruned",
        f"allocation {plan.allocation.rule}": plan.allocation.rule != "uniform",
    }
    asked = [step for step, wanted in steps.items() if wanted]
    for stack in structure.stacks:
        if stack.whole and asked:
            raise UnsupportedModelError(
                f"the model can't be replayed block by block ({stack.whole}), which {' and '.join(asked)} would need: "
                f"use --effort fast, or a method alone"
            )


def _notices(structure: Structure) -> list[str]:
    return [
        f"the model can't be replayed block by block ({stack.whole}): every matrix is fitted to its inputs in the "
        f"dense model"
        for stack in structure.stacks
        if stack.whole
    ]


def _few_tokens(matrices: Sequence[MatrixReport]) -> list[str]:
    short = [matrix for matrix in matrices if matrix.borrowed]
    if not short:
        return []
    worst = min(short, key=lambda matrix: matrix.tokens)
    return [
        f"{len(short)} matrices of experts saw fewer calibration tokens than they have inputs ({worst.name}: "
        f"{worst.tokens} tokens, {worst.columns} inputs), so their statistics were shrunk toward those of all the "
        f"layer's tokens: more calibration text would help"
    ]


def _check_widths(stream: Stream, plan: Plan) -> None:
    """Raise ValueError for the first matrix whose input dimension the pattern, or the exchanges, can't take."""
    for groups in stream.groups.values():
        for group in groups:
            for matrix, input_dim in group.members:
                columns = matrix.weight(input_dim).shape[1]
                try:
                    plan.pattern.check_width(columns)
                    if plan.swaps is not None:
                        check_columns(columns, stream.hidden[0].device)
                except ValueError as error:
                    raise ValueError(f"{matrix.name}: {error}") from error
