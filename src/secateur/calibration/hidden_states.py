"""Hidden states of the calibration batches, in memory or in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.runtime.memory import MemoryBudget


@dataclass(eq=False)
class HiddenStates(MutableSequence[Tensor]):
    """One tensor of hidden states per batch, held in memory, or in mapped files where the budget says so.

    The first tensor's size stands for all when that is decided. A tensor from a file comes to the device that it was
    on; it must not be changed in place.

    Args:
        memory: the budget.
        number: how many tensors there will be.
        in_memory: where they are; None = decided by the first one.
    """

    memory: MemoryBudget = field(default_factory=MemoryBudget)
    number: int = 0
    in_memory: bool | None = None
    _held: list[tuple[Tensor, torch.device]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Iterable[Tensor], memory: MemoryBudget, number: int) -> HiddenStates:
        """Take in `number` tensors one by one."""
        states = cls(memory, number)
        states.extend(tensors)
        return states

    def copy(self) -> HiddenStates:
        """Another sequence of the same tensors."""
        return HiddenStates(self.memory, self.number, self.in_memory, list(self._held))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return HiddenStates(self.memory, self.number, self.in_memory, self._held[index])
        tensor, device = self._held[index]
        return tensor.to(device)

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self._held[index] = self._kept(tensor)

    def __delitem__(self, index: Any) -> None:
        del self._held[index]

    def __len__(self) -> int:
        return len(self._held)

    def insert(self, index: int, value: Tensor) -> None:
        """Insert a batch's hidden states before those at `index`."""
        self._held.insert(index, self._kept(value))

    def _kept(self, tensor: Tensor) -> tuple[Tensor, torch.device]:
        if self.in_memory is None:
            self.in_memory = self.memory.fits(tensor.nbytes * max(1, self.number))
        return (tensor if self.in_memory else _in_file(tensor, self.memory.folder)), tensor.device


def _in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy in a mapped file without a name: it is gone with its last tensor, however the run ends.

    Raises:
        SecateurError: the disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise SecateurError(f"hidden states could not be written to {folder} ({error.strerror})") from error
    return mapped.view(tensor.shape)
