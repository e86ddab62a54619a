"""What a run may hold in memory, and the hidden states of its batches, which lie in files where they don't fit."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import parallel
from secateur.workspace import LEAST, chunk_bytes

GRAM_BYTES = 4 << 30  # Gram matrices of a block that are held at a time, where nothing else is asked for
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
HIDDEN_SETS = 4  # of the pruned stream, the dense one, what a block gives of the latter, and what it is refit to


@dataclass(frozen=True)
class Memory:
    """A cap on what grows with the texts and the width of matrices: half for Gram matrices, a quarter for hidden
    states, a 64th for a solver's largest temporary, which has up to 32 of like size beside it.

    Not in it are a block's weights with a refit's 30 bytes for each, a block's activations, and what a solver can't cut
    into chunks: a few matrices as large as the Gram matrix (`admm` about eight) and as the weights.

    Args:
        limit: bytes in each process; None = no cap on hidden states, and the usual chunks.
        folder: where hidden states go that don't fit; without a limit, all do.
    """

    limit: int | None = None
    folder: Path | None = None

    @property
    def gram_bytes(self) -> int:
        """Bytes of a block's Gram matrices that are held at a time (one matrix always is)."""
        return GRAM_BYTES if self.limit is None else self.limit // 2

    @property
    def chunk_bytes(self) -> int | None:
        """Bytes of a solver's largest temporary; None = as it is usual."""
        return None if self.limit is None else max(LEAST, self.limit // 64)

    def fits(self, hidden: int) -> bool:
        """Whether hidden states of so many bytes, of one set of batches, are held in memory.

        Raises:
            ValueError: they are not, and there is no folder for them.
        """
        if self.limit is None or HIDDEN_SETS * hidden > self.limit // 4:
            if self.limit is not None and self.folder is None:
                raise ValueError(
                    f"hidden states (of the calibration text, or in front of every block for an allocation) take "
                    f"{HIDDEN_SETS * hidden / 1e6:.0f} MB, more than a quarter of --max-memory "
                    f"({self.limit / 1e6:.0f} MB): name a folder for them (--offload-dir), or use fewer --samples, a "
                    f"shorter --seq-len or --allocation uniform"
                )
            return self.folder is None
        return True


def parse_memory(max_memory: str | int | None, folder: str | Path | None) -> Memory:
    """`8GB`, `500MiB` or bytes, and a folder.

    Raises:
        ValueError: no size, or no folder that can be written.
    """
    size = str(max_memory).strip().upper()
    found = None if max_memory is None else re.fullmatch(r"(\d+)\s*((?:[KMGT]I?)?)B?", size)
    if max_memory is not None and (found is None or int(found[1]) == 0):
        raise ValueError(f"max-memory is {max_memory!r}; write a size such as 8GB or 500MB")
    path = None if folder is None else Path(folder).expanduser().resolve()
    if path is not None and not (path.is_dir() and os.access(path, os.W_OK)):
        raise ValueError(f"offload-dir is {path}, which is no folder that can be written")
    return Memory(None if found is None else int(found[1]) * UNITS[found[2]], path)


@dataclass(eq=False)
class HiddenStates(MutableSequence[Tensor]):
    """Hidden states of the batches, in their order: in memory, or in files that are mapped where memory says so. The
    first one's size stands for all in this.

    What is read from a file comes to the device it was on; it must not be changed in place.
    """

    memory: Memory = field(default_factory=Memory)
    number: int = 0
    inside: bool | None = None
    _held: list[tuple[Tensor, torch.device]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Iterable[Tensor], memory: Memory, number: int) -> HiddenStates:
        """Take in tensors one by one.

        Args:
            number: how many there will be.
        """
        states = cls(memory, number)
        states.extend(tensors)
        return states

    def shared(self) -> HiddenStates:
        """The same tensors in a sequence of its own."""
        return HiddenStates(self.memory, self.number, self.inside, list(self._held))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return HiddenStates(self.memory, self.number, self.inside, self._held[index])
        tensor, device = self._held[index]
        return tensor.to(device)

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self._held[index] = self._kept(tensor)

    def __delitem__(self, index: Any) -> None:
        del self._held[index]

    def __len__(self) -> int:
        return len(self._held)

    def insert(self, index: int, value: Tensor) -> None:
        """Put a batch's hidden states in front of those of `index`."""
        self._held.insert(index, self._kept(value))

    def _kept(self, tensor: Tensor) -> tuple[Tensor, torch.device]:
        if self.inside is None:
            self.inside = self.memory.fits(tensor.nbytes * max(1, self.number))
        return (tensor if self.inside else _in_file(tensor, self.memory.folder)), tensor.device


def _in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy in a file that is mapped and has no name any more: it is gone with its last tensor, whatever ends the run.

    Raises:
        ValueError: the disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise ValueError(f"hidden states could not be written to {folder} ({error.strerror})") from error
    return mapped.view(tensor.shape)


@dataclass(eq=False)
class Workspace:
    """The chunk that solvers work in, which shrinks where a GPU's memory is too small for it."""

    limit: int | None = None

    def agree(self) -> None:
        """Take the least of all processes'."""
        self.limit = min((limit for limit in parallel.gather(self.limit) if limit is not None), default=None)

    def halve(self, what: str, device: torch.device) -> None:
        """Work in half the chunk from now on.

        Raises:
            ValueError: there is nothing left to halve.
        """
        before = chunk_bytes(device) if self.limit is None else min(self.limit, chunk_bytes(device))
        if before // 2 < LEAST:
            raise ValueError(f"{what} does not fit into the memory of {device}: use a larger one, or the CPU")
        self.limit = before // 2
