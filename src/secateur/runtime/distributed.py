"""Several processes on one run, by torch.distributed: `torchrun --nproc-per-node N -m secateur prune ...`.

Calibration batches are sharded over the ranks, which sum what they see (Hessians in fp64, so their order hardly ever
changes a bit of the rounded sum). The matrices of a block are sharded too: one rank solves a matrix and broadcasts it.
Rank 0 alone writes and prints. Without a process group, a process is rank 0 of 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import SecateurError
from secateur.runtime.environment import environment_number
from secateur.runtime.messages import first_line

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class LostProcessError(SecateurError):
    """The ranks can't exchange data any more: most likely one has died or failed."""


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """True on rank 0, which alone writes and prints."""
    return rank() == 0


@contextmanager
def process_group(device: str | None) -> Iterator[None]:
    """Join the group that torchrun or `accelerate launch` started, if one did; leave it at the end.

    A group that is already initialised is used as it is. gloo reduces on CPUs, nccl on GPUs.

    Raises:
        SecateurError: fewer GPUs than processes on this machine, one GPU for all, a broken WORLD_SIZE, or processes
            that can't be joined.
    """
    if environment_number("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if on_gpu:
        _take_local_gpu(device)
    # Ranks wait for one that loads, solves or writes; a dead one is noticed by its closed connection.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:  # no address of the others; none that answers
        raise SecateurError(
            f"WORLD_SIZE says that several processes run, and they could not be joined ({first_line(error)}): start "
            f"them by torchrun, or unset WORLD_SIZE for one process"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _take_local_gpu(device: str | None) -> None:
    if ":" in (device or ""):
        raise SecateurError(f"‹device› is {device} for each of several processes: say cuda, and each takes its own GPU")
    if local_rank() >= torch.cuda.device_count():
        raise SecateurError(
            f"process {local_rank()} of this machine has no GPU, as there are {torch.cuda.device_count()}: start one "
            f"process per GPU, or use ‹device=cpu›"
        )
    torch.cuda.set_device(local_rank())


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return environment_number("LOCAL_RANK", 0)


def shard(number: int) -> range:
    """Indices of this rank's items out of `number`: every `world_size`-th."""
    return range(rank(), number, world_size())


def assign_owners(costs: Sequence[float]) -> list[int]:
    """The rank that does each piece of work, so that loads are even: the dearest first, to the least loaded rank.

    Every process finds the same.
    """
    loads = [0.0] * world_size()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def all_reduce(tensor: Tensor) -> None:
    """Replace `tensor` in place by its sum over all ranks."""
    if world_size() > 1:
        with _errors_explained():
            dist.all_reduce(tensor)


def broadcast(tensor: Tensor, owner: int) -> None:
    """Broadcast `tensor` in place from rank `owner`."""
    if world_size() == 1:
        return
    sent = tensor.contiguous()
    with _errors_explained():
        dist.broadcast(sent, owner)
    if sent is not tensor:
        tensor.copy_(sent)


def all_gather(value: T) -> list[T]:
    """Every rank's value (plain data), by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _errors_explained():
        dist.all_gather_object(values, value)
    return values


def all_gather_items(items: Mapping[K, T]) -> dict[K, T]:
    """All ranks' items together; where several have a key, the last rank's value counts."""
    return {key: value for part in all_gather(dict(items)) for key, value in part.items()}


def broadcast_object(value: T) -> T:
    """Rank 0's value (plain data)."""
    return all_gather(value)[0]


def barrier() -> None:
    """Wait until every rank is here."""
    all_gather(None)


@contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and nccl's one way to say so
        reason = first_line(error)
        if "No backend type" in reason:
            raise SecateurError(
                f"the processes can't exchange tensors of this device ({reason}): initialise torch.distributed "
                f"with cpu:gloo,cuda:nccl, or use ‹device=cpu›"
            ) from error
        raise LostProcessError(
            f"process {rank()} of {world_size()} could not exchange data with the others ({reason}). If one of "
            f"them died or failed, look for its message; ‹resume› continues after the last finished block"
        ) from error
