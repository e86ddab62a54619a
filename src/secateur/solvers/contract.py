"""What every solver is: a pure function of the weights, the Gram matrix and the pattern.

A solver is a frozen dataclass; its fields are its options (and become command-line options). It never changes its
arguments, sees no `nn.Module`, and works in the dtype it is given: fp32, or fp64 as an oracle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Protocol, get_args, get_type_hints, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.gram import Gram
from secateur.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned matrix: `weight` (R, C), zero wherever `keep` (R, C) is False, and the solver's own figures.

    `info` holds plain numbers: `damping` (every value tried, the last one in force), `iterations`, `kkt_residual`.
    """

    weight: Float[Tensor, "R C"]
    keep: Bool[Tensor, "R C"]
    info: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Solver(Protocol):
    """The call every method answers."""

    def __call__(self, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved: ...


def live_part(W: Float[Tensor, "R C"], gram: Gram) -> Float[Tensor, "R C"]:
    """The weights with zeros at dead inputs (`H_jj = 0`), which no output depends on.

    So they cost nothing to prune, and count in no objective, whatever stands for their diagonal in a damped matrix.
    """
    return W.masked_fill(gram.xx.diagonal() == 0, 0.0)


def with_dead_part(solved: Solved, W: Float[Tensor, "R C"], gram: Gram) -> Solved:
    """What was solved for the live part of W, with the kept weights of dead inputs as they are in W."""
    return replace(solved, weight=torch.where(solved.keep & (gram.xx.diagonal() == 0), W, solved.weight))


def held_to_contract(solver: Solver, W: Float[Tensor, "R C"], gram: Gram, pattern: Pattern) -> Solved:
    """The solver's answer.

    Raises:
        ValueError: it changed its arguments, which other matrices share, or gave no exact mask of the pattern, or
            weights where that prunes.
    """
    versions = _version(W), _version(gram.xx)
    solved = solver(W, gram, pattern)
    if (_version(W), _version(gram.xx)) != versions:
        raise ValueError("the method wrote into its weights or its Gram matrix, which are not its own: it must copy")
    if (
        not isinstance(solved, Solved)
        or getattr(solved.keep, "dtype", None) != torch.bool
        or not isinstance(solved.info, dict)
    ):
        raise ValueError("the method gave no Solved of weights, a boolean mask and a dictionary of figures")
    try:
        json.dumps(solved.info)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the method's figures are no plain numbers: {error}") from error
    pruned = ~solved.keep
    wanted = pattern.num_pruned(*W.shape)
    if solved.keep.shape != W.shape or solved.weight.shape != W.shape:
        raise ValueError(
            f"the method gave weights {tuple(solved.weight.shape)} and a mask {tuple(solved.keep.shape)} for a matrix "
            f"{tuple(W.shape)}"
        )
    if int(pruned.sum()) != wanted or not pattern.is_met_by(pruned):
        raise ValueError(f"the method's mask breaks {pattern}: it prunes {int(pruned.sum())} weights, not {wanted}")
    if bool(solved.weight[pruned].any()):
        raise ValueError("the method gave weights other than zero where its mask prunes")
    if not bool(torch.isfinite(solved.weight).all()):
        raise ValueError("the method gave NaN or infinite weights; a larger --damping may help")
    return solved


def _version(tensor: Tensor) -> int:
    """Autograd's counter of what is written in place, which tensors of `torch.inference_mode()` don't have."""
    return 0 if tensor.is_inference() else tensor._version


def check_kind(step: type, field: str, value: Any, name: str) -> None:
    """Raise ValueError unless a value is of the kind that a dataclass's field is declared with, where that is a number.

    Args:
        name: what the user knows the field by.
    """
    hint = get_type_hints(step)[field]
    kinds = set(get_args(hint) or (hint,))
    if value is None and type(None) in kinds:
        return
    number = isinstance(value, Real) and not isinstance(value, bool)
    if int in kinds and float not in kinds and isinstance(value, float):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if kinds & {int, float} and not number and not (str in kinds and isinstance(value, str)):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def check_refit(damping: float, tolerance: float, iterations: int) -> None:
    """Raise ValueError unless these can steer the full-row refit."""
    check_damping(damping)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie between 0 and 1 (default 1e-3)")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is a positive finite number."""
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be a positive number (the field's usual value is 0.01)")
