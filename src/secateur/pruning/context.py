"""What every step of a run shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibration.input_groups import InputGroup
from secateur.models.blocks import Block
from secateur.models.placement import InMemory, WeightPlacement
from secateur.permutation.channels import ChannelOrder
from secateur.recipe.patterns import Pattern
from secateur.recipe.recipe import Recipe
from secateur.reporting.figures import BlockFigures
from secateur.runtime.memory import MemoryBudget, Workspace
from secateur.runtime.progress import Progress

StorageOf = Callable[[str, torch.dtype], torch.dtype]  # parameter's name and own dtype -> dtype that it is saved in


@dataclass(frozen=True, eq=False)
class LayerPatterns:
    """Pattern of each matrix, and the scale of its rows in an unstructured choice.

    Scaling a row changes nothing in its own least-squares problem, only its share of the matrix's zeros.

    Args:
        patterns: by matrix name.
        row_scales: by matrix name (R); rows of other matrices are not scaled.
        prices: what one more zero at the global sparsity costs in a matrix, relative to the median matrix, where that
            was measured.
    """

    patterns: dict[str, Pattern]
    row_scales: dict[str, Float[Tensor, " R"]] = field(default_factory=dict)
    prices: dict[str, float] = field(default_factory=dict)


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

    def patterns_of(self, chain: str, find: Callable[[], LayerPatterns], /) -> LayerPatterns:
        """The allocation of the chain that begins at a block: as an earlier process found it, or as it is found now."""
        ...

    def reuse(self, block: Block, /) -> BlockFigures | None:
        """Take a block that an earlier process finished: its figures, or None where it has to be pruned."""
        ...

    def commit(self, block: Block, figures: BlockFigures, /) -> None:
        """Store a finished block; later uses see these weights."""
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

    def patterns_of(self, _chain: str, find: Callable[[], LayerPatterns]) -> LayerPatterns:
        """Nothing was found before."""
        return find()

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

    def patterns_of(self, _chain: str, find: Callable[[], LayerPatterns]) -> LayerPatterns:
        """Nothing was found before."""
        return find()

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

    @property
    def has_dense_stream(self) -> bool:
        """Whether something is fitted to the dense model, so its hidden states are held too."""
        return self.recipe.refit is not None or self.recipe.target is not None

    @property
    def observes_groups_apart(self) -> bool:
        """Whether each group of a block is observed after those before it are pruned."""
        target = self.recipe.target
        return self.recipe.true_sequential or (target is not None and target.kind == "residual")

    @property
    def moments_per_group(self) -> int:
        """What is gathered of a group's input: its Hessian; with a target also the drift and the error, at most."""
        return 1 if self.recipe.target is None else 3

    @property
    def hessian_bytes(self) -> int:
        """What the Hessians that are gathered at once may take; 0 = one group at a time."""
        return 0 if self.observes_groups_apart else self.memory.hessian_bytes // self.moments_per_group

    def sees_dense_block(self, passes: Sequence[list[InputGroup]]) -> bool:
        """Whether every pass over a block sees it dense, since memory alone is why there are several."""
        return len(passes) > 1 and not self.observes_groups_apart
