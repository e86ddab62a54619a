"""The step of one matrix: target, solve, refine, round to the dtype that it is saved in, write back, measure.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError, errors_within
from secateur.models.matrices import Matrix
from secateur.numerics.hessian import Hessian, relative_error
from secateur.numerics.int8 import coarser
from secateur.numerics.rounding import round_to_int8
from secateur.pruning.context import RunContext
from secateur.pruning.dense_target import Moments, dense_target_weights
from secateur.recipe.patterns import Pattern
from secateur.recipe.rules import matrix_recipe
from secateur.reporting.figures import MatrixReport
from secateur.runtime.chunking import max_chunk_bytes
from secateur.solvers import Solved, solve_checked
from secateur.solvers.swaps import refine_by_swaps


def prune_matrix(
    matrix: Matrix,
    input_dim: int,
    moments: Moments,
    write_gain: float | None,
    pattern: Pattern,
    row_scale: Tensor | None,
    context: RunContext,
) -> MatrixReport:
    """Prune one matrix in place; its figures.

    Args:
        matrix: the matrix.
        input_dim: stored dimension that its inputs run along.
        moments: of its inputs.
        write_gain: how the residual stream follows it, for a residual target.
        pattern: its pattern.
        row_scale: scale of its rows in the choice of the mask (R).
        context: of the run.

    Raises:
        SecateurError: the message starts with the matrix's name.
    """
    started = time.perf_counter()
    view, hessian, target = matrix.weight(input_dim), moments.hessian, context.recipe.target
    W = view.to(torch.float32, copy=True)  # in an fp32 model .float() would alias what is overwritten below
    solver = matrix_recipe(context.recipe, matrix.name).solver
    with errors_within(matrix.name):
        wanted = W if target is None else dense_target_weights(W, moments, target, write_gain)
        storage = context.storage_of(matrix.name, view.dtype)
        dtype = coarser(storage, view.dtype)
        while (solved := _solve(solver, wanted, hessian, pattern, row_scale, context, dtype)) is None:
            context.workspace.halve("the solver's work", W.device)
    saved = solved.weight.to(storage)
    if view.dtype == torch.float64:  # which fp32 rounds: weights that did not move keep their digits
        saved = torch.where(solved.weight == W, view.to(storage), saved)
    saved.masked_fill_(~solved.keep, 0.0)
    if not bool(torch.isfinite(saved).all()):
        raise SecateurError(
            f"{matrix.name}: the pruned weights are not finite in {saved.dtype}; use a larger damping "
            f"(‹settings.damping›)"
        )
    view.copy_(saved)
    error = relative_error(saved.float(), W, hessian.H)
    target_error = None if target is None else relative_error(saved.float(), wanted, hessian.H)
    return MatrixReport(
        name=matrix.name,
        rows=W.shape[0],
        columns=W.shape[1],
        input_dim=input_dim,
        pattern=str(pattern),
        zeros=int((saved == 0).sum()),  # with those that the model had before
        relative_error=error,
        target_error=target_error,
        seconds=time.perf_counter() - started,
        tokens=hessian.tokens,
        borrowed=hessian.borrowed,
        solver=solver.name,
        figures=solved.info | ({} if write_gain is None else {"write_gain": write_gain}),
    )


def _solve(
    solver: Any,
    W: Float[Tensor, "R C"],
    hessian: Hessian,
    pattern: Pattern,
    row_scale: Float[Tensor, " R"] | None,
    context: RunContext,
    dtype: torch.dtype,
) -> Solved | None:
    """The solver's answer, refined and rounded where asked for; rows are scaled for the choice among them, and back.

    None where a GPU's memory is too small for it at this chunk size.
    """
    scale = 1.0 if row_scale is None else row_scale.to(W.device)[:, None]
    refine = context.recipe.refine
    try:
        with max_chunk_bytes(context.workspace.limit):
            solved = solve_checked(solver, W * scale, hessian, pattern)
            if refine is not None:
                solved = refine_by_swaps(refine, W * scale, solved, hessian, pattern)
            solved = replace(solved, weight=solved.weight / scale)
            if context.recipe.values == "int8":
                rounded = round_to_int8(solved.weight, solved.keep, hessian.damped.matrix, dtype)
                solved = replace(solved, weight=rounded)
    except torch.OutOfMemoryError:
        return None
    return solved
