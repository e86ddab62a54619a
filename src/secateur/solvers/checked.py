"""The way into every solver: its function is looked up, called, and held to its contract.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import SecateurError
from secateur.numerics.hessian import Hessian
from secateur.numerics.masks import has_exact_count
from secateur.recipe.patterns import NM, Pattern
from secateur.recipe.solvers import ADMM, MRP, Magnitude, SparseGPT, Wanda
from secateur.solvers.admm import solve_admm
from secateur.solvers.base import Solved
from secateur.solvers.magnitude import solve_magnitude
from secateur.solvers.mrp import solve_mrp
from secateur.solvers.sparsegpt import solve_sparsegpt
from secateur.solvers.wanda import solve_wanda

# Options -> the function that reads them.
SOLVE: dict[type, Callable[[Any, Tensor, Hessian, Pattern], Solved]] = {
    Magnitude: solve_magnitude,
    Wanda: solve_wanda,
    SparseGPT: solve_sparsegpt,
    MRP: solve_mrp,
    ADMM: solve_admm,
}


def solve_checked(options: Any, W: Float[Tensor, "R C"], hessian: Hessian, pattern: Pattern) -> Solved:
    """Prune a matrix by the solver that the options are of; a plug-in's options are called.

    Raises:
        SecateurError: the solver changed its arguments, which other matrices share, its mask breaks the pattern, or its
            weights are not finite, or not zero where the mask prunes.
    """
    versions = _version(W), _version(hessian.H)
    solve = SOLVE.get(type(options))
    solved = _call_plugin(options, W, hessian, pattern) if solve is None else solve(options, W, hessian, pattern)
    if (_version(W), _version(hessian.H)) != versions:
        raise SecateurError(f"solver {options.name} wrote into its weights or its Hessian: it must copy them")
    _check_solved(f"solver {options.name}", solved, W, pattern)
    return solved


def _call_plugin(options: Any, W: Tensor, hessian: Hessian, pattern: Pattern) -> Any:
    """What a plug-in returns.

    Raises:
        SecateurError: it raised something, which is the cause of this error.
        torch.OutOfMemoryError: it may be tried again in smaller chunks.
    """
    try:
        return options(W, hessian, pattern)
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except SystemExit as error:
        raise SecateurError(f"solver {options.name} ended the process (sys.exit): a solver must return") from error
    except Exception as error:  # a plug-in may raise anything
        raise SecateurError(
            f"solver {options.name}, a plug-in, failed: {type(error).__name__}: {error}. From Python, by "
            f"secateur.prune or secateur.solve, its traceback is shown"
        ) from error


def _check_solved(solver: str, solved: Any, W: Tensor, pattern: Pattern) -> None:
    if (
        not isinstance(solved, Solved)
        or getattr(solved.keep, "dtype", None) != torch.bool
        or not isinstance(solved.info, dict)
    ):
        raise SecateurError(f"{solver} must return a Solved of weights, a boolean mask and a dictionary of figures")
    if solved.keep.shape != W.shape or solved.weight.shape != W.shape:
        raise SecateurError(
            f"{solver} gave weights {tuple(solved.weight.shape)} and a mask {tuple(solved.keep.shape)} for a matrix "
            f"{tuple(W.shape)}"
        )
    pruned = ~solved.keep
    if not has_exact_count(pattern, pruned):
        raise SecateurError(f"{solver} gave a mask that breaks {pattern}: {_how_it_breaks(pattern, pruned)}")
    if bool(solved.weight[pruned].any()):
        raise SecateurError(f"{solver} gave weights other than zero where its mask prunes")
    advice = f"the input may be too large for {W.dtype}, or a larger `damping` may help"
    if not bool(torch.isfinite(solved.weight).all()):
        raise SecateurError(f"{solver} gave NaN or infinite weights: {advice}")
    try:
        json.dumps(solved.info, allow_nan=False)  # the report takes none
    except TypeError as error:
        raise SecateurError(f"{solver} gave figures that are not plain numbers: {error}") from error
    except ValueError as error:
        raise SecateurError(f"{solver} gave NaN or infinite figures: {advice}") from error


def _how_it_breaks(pattern: Pattern, pruned: Tensor) -> str:
    """Count of zeros in the first wrong group, or in the whole matrix."""
    if isinstance(pattern, NM):
        zeros = pruned.reshape(len(pruned), -1, pattern.m).sum(-1)
        row, group = (int(index) for index in (zeros != pattern.m - pattern.n).nonzero()[0])
        found = int(zeros[row, group])
        return f"row {row} has {found} zeros in columns {group * pattern.m} to {(group + 1) * pattern.m - 1}"
    return f"it prunes {int(pruned.sum())} weights instead of {pattern.num_pruned(*pruned.shape)}"


def _version(tensor: Tensor) -> int:
    """Autograd's counter of writes in place, which tensors of `torch.inference_mode()` do not have."""
    return 0 if tensor.is_inference() else tensor._version
