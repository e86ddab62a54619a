"""What a run may hold in memory, and the chunk size that shrinks when a GPU runs out of it."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from secateur.errors import SecateurError
from secateur.recipe.sizes import parse_size
from secateur.runtime.chunking import MIN_CHUNK_BYTES, chunk_bytes
from secateur.runtime.distributed import all_gather
from secateur.storage.paths import real_path, user_path

HESSIAN_BYTES = 4 << 30  # Hessians of a block that are held at a time, without a cap
CGROUPS = Path("/sys/fs/cgroup")
# Folder, and the names of the limit, of what is in use, and of its part that holds files that can be dropped.
CONTAINERS = (
    (CGROUPS, "memory.max", "memory.current", "inactive_file"),
    (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
HIDDEN_SETS = 4  # the pruned stream, the dense one, a block's outputs on it, and what the block is refit to


@dataclass(frozen=True)
class MemoryBudget:
    """A cap on what grows with the texts and with the width of matrices.

    Half is for Hessians, a quarter for hidden states, and a 64th for a solver's largest temporary (up to 32 of that
    size live at once). Not counted: a block's weights with 30 bytes each for its refit, a block's activations, and a
    solver's matrices as large as the Hessian (`admm` has about eight) or the weights.

    Args:
        limit: bytes for each process; None = no cap.
        folder: where hidden states go that do not fit; without a limit, all of them.
    """

    limit: int | None = None
    folder: Path | None = None

    @property
    def hessian_bytes(self) -> int:
        """Bytes of a block's Hessians that are held at a time; one is always held."""
        return HESSIAN_BYTES if self.limit is None else self.limit // 2

    @property
    def chunk_bytes(self) -> int | None:
        """Bytes of a solver's largest temporary; None = the default."""
        return None if self.limit is None else max(MIN_CHUNK_BYTES, self.limit // 64)

    def fits(self, hidden: int) -> bool:
        """Whether `hidden` bytes, the hidden states of all batches, are held in memory.

        Raises:
            SecateurError: they do not fit, and there is no folder for them.
        """
        if self.limit is None:
            return self.folder is None
        if HIDDEN_SETS * hidden <= self.limit // 4:
            return True
        if self.folder is None:
            raise SecateurError(
                f"hidden states (of the calibration text, or of every block for an allocation) take "
                f"{HIDDEN_SETS * hidden / 1e6:.0f} MB, more than a quarter of ‹max_memory› "
                f"({self.limit / 1e6:.0f} MB): name a folder for them with ‹offload_dir›, or use fewer ‹samples›, a "
                f"shorter ‹seq_len› or ‹settings.allocation=none›"
            )
        return False

    def held_bytes(self, hidden: int, sets: int) -> int:
        """Bytes of memory that some sets of `hidden` bytes take: none where they go to files."""
        return sets * hidden if self.fits(hidden) else 0


def memory_budget(max_memory: str | int | None, folder: str | Path | None) -> MemoryBudget:
    """The budget of a size such as `8GB` and a folder for hidden states.

    Raises:
        SecateurError: no size, or no folder that can be written.
    """
    path = None if folder is None else real_path(user_path(folder))
    if path is not None and not (path.is_dir() and os.access(path, os.W_OK)):
        raise SecateurError(f"‹offload_dir› is {path}, which is not a folder that can be written")
    return MemoryBudget(None if max_memory is None else parse_size(max_memory), path)


@dataclass(eq=False)
class Workspace:
    """The chunk size of solvers, which is halved when a GPU's memory is too small for it.

    Attributes:
        limit: bytes of the largest temporary; None = the default.
    """

    limit: int | None = None

    def agree(self) -> None:
        """Take the smallest limit of all ranks."""
        self.limit = min((limit for limit in all_gather(self.limit) if limit is not None), default=None)

    def halve(self, work: str, device: torch.device) -> None:
        """Halve the chunk size.

        Raises:
            SecateurError: it is at its minimum.
        """
        before = chunk_bytes(device) if self.limit is None else min(self.limit, chunk_bytes(device))
        if before // 2 < MIN_CHUNK_BYTES:
            raise SecateurError(f"{work} does not fit into the memory of {device}: use a larger one, or the CPU")
        self.limit = before // 2


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped files included."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Most memory that this process has had in RAM, mapped files included."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    if peaks:  # Linux's ru_maxrss would be the parent's, where that is more
        return int(peaks[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int:
    """Memory of this machine, or of the container if it has less left, that processes can still take."""
    limit, used = _container()
    return min(psutil.virtual_memory().available, max(0, limit - used))


def total_memory(device: str) -> int:
    """Memory of a GPU, or of this machine; in a container with a limit, that limit if it is less."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    return min(psutil.virtual_memory().total, _container()[0])


def _container() -> tuple[int, int]:
    """The limit of a container's memory (cgroup v2, v1), or a number beyond any machine's; and what is in use.

    Files that can be dropped from memory don't count as used.
    """
    for folder, limit, used, files in CONTAINERS:
        path = folder / limit
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = next((int(value) for name, value in lines if name == files), 0)
            return int(text), int((folder / used).read_text()) - cached
    return sys.maxsize, 0
