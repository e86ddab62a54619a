"""What every step of a run shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from secateur.calibration.stream import Progress
from secateur.models.blocks import Block
from secateur.models.placement import InMemory, WeightPlacement
from secateur.permutation.channels import ChannelOrder
from secateur.recipe.recipe import Recipe
from secateur.reporting.figures import BlockFigures
from secateur.runtime.memory import MemoryBudget, Workspace

StorageOf = Callable[[str, torch.dtype], torch.dtype]  # parameter's name and own dtype -> dtype that it is saved in


@runtime_checkable
class BlockStore(WeightPlacement, Protocol):
    """Where the weights are, and where finished blocks go."""

    def reorder(self, model: nn.Module, order: ChannelOrder, /) -> None:
        """Put the dense model's channels in another order, in which it computes the same."""
        ...

    @property
    def is_reordered(self) -> bool:
        """Whether that was done."""
        ...

    def reuse(self, block: Block, /) -> BlockFigures | None:
        """Take a block that an earlier process finished: its figures, or None where it has to be pruned."""
        ...

    def commit(self, block: Block, figures: BlockFigures, /) -> None:
        """Take a block as it is now, finished; its next use finds it so."""
        ...


class InMemoryStore(InMemory):
    """A model in memory, which is itself the result."""

    is_reordered = False

    @torch.no_grad()
    def reorder(self, model: nn.Module, order: ChannelOrder) -> None:
        """Reorder each parameter in place."""
        for name, parameter in model.named_parameters():
            parameter.copy_(order.applied(name, parameter.data))
        self.is_reordered = True

    def reuse(self, _block: Block) -> None:
        """Nothing was finished before."""

    def commit(self, _block: Block, _figures: BlockFigures) -> None:
        """Nothing to do: the model has it."""


class DroppedBlocks:
    """A store that keeps nothing: what is written to a block is dropped. For dry runs."""

    is_reordered = False

    def __init__(self, placement: WeightPlacement) -> None:
        """Onload as a placement does whose copies are dropped."""
        self.onload_block, self.onload_model = placement.onload_block, placement.onload_model

    def reorder(self, _model: nn.Module, _order: ChannelOrder) -> None:
        """Keep nothing."""

    def reuse(self, _block: Block) -> None:
        """Nothing was finished before."""

    def commit(self, _block: Block, _figures: BlockFigures) -> None:
        """Keep nothing."""


def keep_dtype(_name: str, own: torch.dtype) -> torch.dtype:
    """Save a parameter in the dtype that it has."""
    return own


@dataclass(frozen=True, eq=False)
class RunContext:
    """What the steps of a run share.

    Args:
        recipe: what to do.
        progress: called with the stage, what is done, and the total.
        store: the weights and the finished blocks.
        memory: what may be held.
        workspace: the chunk size of solvers.
        storage_of: the dtype that each parameter is saved in.
    """

    recipe: Recipe
    progress: Progress
    store: BlockStore = field(default_factory=InMemoryStore)
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    workspace: Workspace = field(default_factory=Workspace)
    storage_of: StorageOf = keep_dtype
