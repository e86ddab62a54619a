"""What a run would prune, leave dense, or miss: every matrix of a model's layers, with its share of the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration.dense_pass import DensePass, run_dense_pass
from secateur.calibration.stream import Batch
from secateur.models.checks import check_runnable
from secateur.models.determinism import deterministic_forward
from secateur.models.discovery import ModelStructure, find_block_chains
from secateur.models.matrices import all_parameters
from secateur.recipe.recipe import Recipe
from secateur.runtime.progress import no_progress

STATES = ("pruned", "dense", "missed")


@dataclass(frozen=True)
class Covered:
    """One matrix: `pruned`, `dense` with the reason, or `missed` with the error that a run would raise."""

    name: str
    weights: int
    state: str
    reason: str | None = None


@dataclass(frozen=True)
class Coverage:
    """All matrices of the layers.

    Args:
        model_parameters: number of weights of the model.
        whole: why the model is pruned as one block, where it is.
        matrices: every matrix of the layers.
    """

    model_parameters: int
    whole: str | None
    matrices: list[Covered]

    def share(self, state: str) -> float:
        """Share of the layers' matrix weights that are in this state."""
        total = sum(matrix.weights for matrix in self.matrices)
        return sum(matrix.weights for matrix in self.matrices if matrix.state == state) / max(1, total)

    def by_kind(self) -> dict[tuple[str, str, str | None], list[Covered]]:
        """Matrices by name without numbers, state and reason."""
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
def measure_coverage(model: nn.Module, batches: Sequence[Batch], recipe: Recipe) -> Coverage:
    """Every matrix of the layers, and what a run by this recipe would do with it. Nothing is changed.

    Raises:
        SecateurError: what `pruning.loop.prune_model` raises about the model and the inputs as a whole.

    Cost: a dense pass over the batches.
    """
    check_runnable(model)
    with deterministic_forward(model):
        structure = find_block_chains(model, batches[0], recipe)
        passes = [run_dense_pass(model, chain, batches, no_progress) for chain in structure.chains]
    return coverage_from(model, structure, passes)


def coverage_from(model: nn.Module, structure: ModelStructure, passes: Sequence[DensePass]) -> Coverage:
    """The coverage that follows from the dense passes of all chains."""
    missed = {name: error for each in passes for name, error in each.missed.items()}
    dense = structure.dense | {
        name: reason for each in passes for block in each.blocks for name, reason in block.dense.items()
    }
    matrices = []
    for name, weights in structure.weights.items():
        state = "missed" if name in missed else "dense" if name in dense else "pruned"
        reason = str(missed[name]) if name in missed else dense.get(name)
        matrices.append(Covered(name, weights, state, reason))
    whole = next((chain.whole for chain in structure.chains if chain.whole), None)
    return Coverage(all_parameters(model), whole, matrices)
