"""What a run would prune, leave dense, or miss: every matrix of a model's layers, with its share of the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.capture import Batch
from secateur.model import check_runnable, observable, parameters_of
from secateur.stacks import find_stacks
from secateur.survey import survey

STATES = ("pruned", "dense", "missed")


@dataclass(frozen=True)
class Covered:
    """One matrix: `pruned`, `dense` with the rule that says so, or `missed` with what a run would say."""

    name: str
    weights: int
    state: str
    reason: str | None = None


@dataclass
class Coverage:
    """All matrices of the layers. `whole` says why the model is pruned as one block, where it is."""

    model_parameters: int
    whole: str | None = None
    matrices: list[Covered] = field(default_factory=list)

    def share(self, state: str) -> float:
        """Weights in this state, of the weights of all matrices of the layers."""
        total = sum(matrix.weights for matrix in self.matrices)
        return sum(matrix.weights for matrix in self.matrices if matrix.state == state) / max(1, total)

    def by_kind(self) -> dict[tuple[str, str, str | None], list[Covered]]:
        """Matrices that differ only in the numbers in their names, by that name, state and reason."""
        kinds: dict[tuple[str, str, str | None], list[Covered]] = {}
        for matrix in self.matrices:
            name = re.sub(r"\d+(?=\.|\]|$)", "*", matrix.name)
            reason = matrix.reason and re.sub(r"\d+(?=[.\]])", "*", matrix.reason)
            kinds.setdefault((name, matrix.state, reason), []).append(matrix)
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the shares first."""
        shares = {state: self.share(state) for state in STATES}
        in_layers = sum(matrix.weights for matrix in self.matrices)
        return {"shares": shares, "layer_weights": in_layers, **asdict(self)}


@torch.no_grad()
def measure_coverage(
    model: nn.Module, batches: Sequence[Batch], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Coverage:
    """Every matrix of the layers, and what a run with these globs would do with it. Nothing is changed.

    Cost: a dense pass over the batches.

    Raises:
        ValueError: what `engine.run` raises about the model and the inputs as a whole.
    """
    check_runnable(model)
    missed: dict[str, ValueError] = {}
    with observable(model):
        structure = find_stacks(model, batches[0], include, exclude)
        for stack in structure.stacks:
            survey(model, stack.blocks, batches, lambda *_: None, missed)
    dense = structure.idle | {name: reason for block in structure.blocks for name, reason in block.dense.items()}
    coverage = Coverage(parameters_of(model))
    coverage.whole = next((stack.whole for stack in structure.stacks if stack.whole), None)
    for name, weights in structure.weights.items():
        state = "missed" if name in missed else "dense" if name in dense else "pruned"
        reason = str(missed[name]) if name in missed else dense.get(name)
        coverage.matrices.append(Covered(name, weights, state, reason))
    return coverage
