"""The loop: for each block observe its inputs, solve every matrix, write back, replay the block on pruned weights.

Inputs inside a block are those of the block before its own pruning (SparseGPT's protocol); with `true_sequential`
the block is observed again after each group of matrices that share an input.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.capture import Batch, Progress, Stream, survey
from secateur.gram import Gram
from secateur.linalg import NotPositiveDefiniteError
from secateur.model import Block, check_finite_weights, check_runnable, find_blocks
from secateur.observe import Matrix
from secateur.pattern import Pattern
from secateur.report import MatrixReport
from secateur.solvers import Solver


@dataclass(frozen=True, eq=False)
class Plan:
    """What to prune and how. `storage_dtype`: the dtype a parameter is saved in, by name (default: its own)."""

    pattern: Pattern
    solver: Solver
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    true_sequential: bool = False
    storage_dtype: dict[str, torch.dtype] | None = None


@torch.no_grad()
def run(
    model: nn.Module, batches: Sequence[Batch], plan: Plan, progress: Progress
) -> tuple[list[MatrixReport], dict[str, str]]:
    """Prune the model in place; returns the figures of each matrix, and what stayed dense with the reason.

    The model, the texts and the pattern are checked by a dense pass before the first weight changes. What only pruning
    brings about (a Gram matrix that can't be factored, an expert that loses its tokens) ends the run where it is met.

    Cost: the dense pass, two forward passes of each block over the batches, the Gram matrices and the solver calls.
    """
    check_runnable(model)
    check_finite_weights(model)
    blocks = find_blocks(model, plan.include, plan.exclude)
    reports: list[MatrixReport] = []
    with _inference_mode(model), _eager_experts(model), deterministic_algorithms():
        stream = survey(model, blocks, batches, progress)
        _check_widths(stream, plan.pattern)
        for index, block in enumerate(blocks):
            reports += _prune_block(block, stream, plan)
            stream.advance(block)
            progress("prune", index + 1, len(blocks))
    return reports, {name: reason for block in blocks for name, reason in block.dense.items()}


def _prune_block(block: Block, stream: Stream, plan: Plan) -> list[MatrixReport]:
    groups = stream.groups[block.name]
    passes = [[group] for group in groups] if plan.true_sequential else [groups]
    reports = []
    for observed in passes:
        grams = stream.observe(block, observed)
        for group in observed:
            gram = grams[group.leader.name]
            reports += [_prune_matrix(matrix, input_dim, gram, plan) for matrix, input_dim in group.members]
            del grams[group.leader.name], gram
    return reports


def _prune_matrix(matrix: Matrix, input_dim: int, gram: Gram, plan: Plan) -> MatrixReport:
    """Solve one matrix, round to the dtype it is saved in, mask once more, write back, and measure."""
    started = time.perf_counter()
    view = matrix.weight(input_dim)
    W = view.to(torch.float32, copy=True)  # in an fp32 model .float() would alias what is overwritten below
    try:
        solved = plan.solver(W, gram, plan.pattern)
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(f"{matrix.name}: {error}") from error
    storage = (plan.storage_dtype or {}).get(matrix.name.partition("[")[0], view.dtype)
    saved = solved.weight.to(storage).masked_fill_(~solved.keep, 0.0)
    if not bool(torch.isfinite(saved).all()):
        raise ValueError(f"{matrix.name}: the pruned weights are not finite in {storage}; use a larger --damping")
    view.copy_(saved)
    return MatrixReport(
        name=matrix.name,
        rows=W.shape[0],
        columns=W.shape[1],
        input_dim=input_dim,
        pattern=str(plan.pattern),
        zeros=int((~solved.keep).sum()),
        relative_error=relative_error(saved.float(), W, gram.xx),
        seconds=time.perf_counter() - started,
        tokens=gram.tokens,
        solver=solved.info,
    )


def relative_error(pruned: Float[Tensor, "R C"], W: Float[Tensor, "R C"], H: Float[Tensor, "C C"]) -> float:
    """Relative layer error `tr(D H D^T) / tr(W H W^T)`, D = pruned - W, with the undamped H.

    Products in H's dtype, sums in float64. 0 where W gives no output at all.
    """
    D = pruned - W
    lost = float(((D @ H) * D).sum(1).cpu().double().sum())
    whole = float(((W @ H) * W).sum(1).cpu().double().sum())
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _check_widths(stream: Stream, pattern: Pattern) -> None:
    """Raise ValueError for the first matrix whose input dimension the pattern doesn't divide."""
    for groups in stream.groups.values():
        for group in groups:
            for matrix, input_dim in group.members:
                try:
                    pattern.check_width(matrix.weight(input_dim).shape[1])
                except ValueError as error:
                    raise ValueError(f"{matrix.name}: {error}") from error


@contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), restored module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Experts as plain products, one at a time: fused kernels hide the use of each expert's weights."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before in (None, "eager") or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Only deterministic kernels, so that the same seed on the same machine gives the same bits."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic  # its setting is no declared attribute
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused as not deterministic
    fill = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # a debugging aid that costs a write of each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill
