"""What a solver returns, and how dead inputs are kept out of it.

Shape legend: R output rows, C input columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.numerics.hessian import Hessian


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned matrix.

    Args:
        weight: pruned weights (R, C), zero wherever `keep` is False.
        keep: the mask (R, C), True = kept.
        info: the solver's figures as plain numbers, such as `damping` (every value tried; the last one is used),
            `iterations` and `converged`.
    """

    weight: Float[Tensor, "R C"]
    keep: Bool[Tensor, "R C"]
    info: dict[str, Any] = field(default_factory=dict)


def zero_dead_inputs(W: Float[Tensor, "R C"], hessian: Hessian) -> Float[Tensor, "R C"]:
    """The weights with zeros at dead inputs (`H_jj = 0`), on which no output depends.

    They then cost nothing to prune and count in no objective, whatever their diagonal is in a damped Hessian.
    """
    return W.masked_fill(hessian.dead_inputs, 0.0)


def restore_dead_inputs(solved: Solved, W: Float[Tensor, "R C"], hessian: Hessian) -> Solved:
    """The solution with the kept weights of dead inputs as they are in W."""
    return replace(solved, weight=torch.where(solved.keep & hessian.dead_inputs, W, solved.weight))
