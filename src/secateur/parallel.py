"""Several processes on one run, by torch.distributed: `torchrun --nproc-per-node N -m secateur prune ...`.

Calibration batches are dealt out to the ranks, which sum what they see of them (Gram matrices, in fp64, so that the
order hardly ever changes a bit of the rounded sum). The matrices of a block are dealt out too: each is solved whole by
one rank, so that no rule that looks across its rows has to be agreed on, and sent to the others. The first rank alone
writes. A process alone, where no group of processes is initialised, is the first of one.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class LostProcessError(ValueError):
    """The processes of the run can't exchange data any more: most likely one has died or failed."""


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@contextmanager
def joined(device: str | None) -> Iterator[None]:
    """Meanwhile this process is in the group that torchrun (or `accelerate launch`) has started, if it has.

    A group that is initialised already is used as it is. gloo sums on CPUs, nccl on GPUs.

    Raises:
        ValueError: fewer GPUs than processes on this machine, or one GPU for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if on_gpu:
        _take_own_gpu(device)
    # Ranks wait for one that loads, solves or writes; a dead one is noticed by its closed connection.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _take_own_gpu(device: str | None) -> None:
    if ":" in (device or ""):
        raise ValueError(f"device is {device}, for each of several processes: say cuda, and each takes one of its own")
    if own_gpu() >= torch.cuda.device_count():
        raise ValueError(
            f"process {own_gpu()} of this machine has no GPU of its own among {torch.cuda.device_count()}: start one "
            f"process a GPU, or use --device cpu"
        )
    torch.cuda.set_device(own_gpu())


def own_gpu() -> int:
    """The number of this process's GPU on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def dealt(number: int) -> range:
    """Which of so many things are this process's: every `size`-th."""
    return range(rank(), number, size())


def owners_of(costs: Sequence[float]) -> list[int]:
    """The rank of each of some pieces of work, such that no rank has much more than another: the dearest first, each
    to the rank with the least so far. Every process finds the same."""
    loads = [0.0] * size()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def add_up(tensor: Tensor) -> None:
    """Replace a tensor, in place, by the sum over all processes."""
    if size() > 1:
        with _all_alive():
            dist.all_reduce(tensor)


def send(tensor: Tensor, owner: int) -> None:
    """Overwrite a tensor, in place, by that of the process `owner`."""
    if size() == 1:
        return
    sent = tensor.contiguous()
    with _all_alive():
        dist.broadcast(sent, owner)
    if sent is not tensor:
        tensor.copy_(sent)


def gather(value: T) -> list[T]:
    """Every process's value (plain data), by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _all_alive():
        dist.all_gather_object(values, value)
    return values


def gather_items(items: Mapping[K, T]) -> dict[K, T]:
    """All processes' items together; those of a key that several have are of the last."""
    return {key: value for part in gather(dict(items)) for key, value in part.items()}


def from_first(value: T) -> T:
    """The first process's value (plain data)."""
    return gather(value)[0]


def wait() -> None:
    """Until every process is here."""
    gather(None)


@contextmanager
def _all_alive() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and nccl's one way to say so
        first_line = str(error).strip().partition("\n")[0]
        if "No backend type" in first_line:
            raise ValueError(
                f"the processes can't exchange tensors of this device ({first_line}): initialise torch.distributed "
                f"with cpu:gloo,cuda:nccl, or use --device cpu"
            ) from error
        raise LostProcessError(
            f"process {rank()} of {size()} could not exchange data with the others ({first_line}). Where one of them "
            f"has died or failed, look for its own message; --resume goes on from the last finished block"
        ) from error
