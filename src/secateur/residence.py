"""Where weights are while they are used: in memory all along, or mapped from files and brought in part by part.

A checkpoint that is loaded in the dtype of its files is mapped, not read: its pages belong to the files, and the system
drops them when memory is short. Only what runs is copied, to the device and in the dtype that products run in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.lockstep import Lockstep
from secateur.model import Block
from secateur.report import BlockFigures


@runtime_checkable
class Residence(Protocol):
    """How a run gets at the weights of a part of the model."""

    def using(self, block: Block, /) -> AbstractContextManager[None]:
        """Meanwhile the block's weights can be run, read and written."""
        ...

    def running(self, model: nn.Module, /) -> AbstractContextManager[Lockstep]:
        """Meanwhile the whole model can run forward, some passes side by side, and backward to its hidden states."""
        ...


@runtime_checkable
class Store(Residence, Protocol):
    """Where the model is, and where its finished blocks go."""

    def finished(self, block: Block, /) -> BlockFigures | None:
        """The figures of a block that an earlier process finished; None where it has to be pruned."""
        ...

    def commit(self, block: Block, figures: BlockFigures, /) -> None:
        """Take a block as it is now, finished; what its next use finds."""
        ...


class InMemory:
    """A model that lies whole in memory, and is itself the result."""

    def using(self, _block: Block) -> AbstractContextManager[None]:
        """As it is."""
        return nullcontext()

    def running(self, _model: nn.Module) -> AbstractContextManager[Lockstep]:
        """As it is."""
        return nullcontext(Lockstep())

    def finished(self, _block: Block) -> None:
        """Nothing was done before."""

    def commit(self, _block: Block, _figures: BlockFigures) -> None:
        """The model has it."""


class Mapped:
    """A model whose weights are mapped from files; each part is copied in while it is used, and dropped after.

    Args:
        device: where it is used.
        dtype: what products run in; narrower floating tensors become it, wider ones stay as they are.
        room: bytes of layers that stay while the whole model runs, from one forward pass to the next; the others are
            copied in for each.
    """

    def __init__(self, device: str, dtype: torch.dtype, room: int = 0) -> None:
        self.device, self.dtype, self.room = torch.device(device), dtype, room
        self._copies: dict[int, Tensor] = {}  # storage of a copy -> the parameter or buffer it is of

    def using(self, block: Block) -> AbstractContextManager[None]:
        """Copies of the block's tensors; what is written to them is dropped with them."""
        return self._copied_in(_tensors(block.module))

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[Lockstep]:
        """Copies of what is in no layer, and of each layer while it runs; the first ones stay where there is room.

        The others are copied in, and read from their files, once for all passes that go side by side. The hidden
        states of these take no more memory than the largest layer does.

        A weight that can be run as it lies in its file is not copied: nothing is written to it here. A backward pass
        keeps the activations that it needs, but no copies of weights: they are made again.
        """
        layers = list(_layers(model))
        inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
        with ExitStack() as stack:
            outside = [tensor for tensor in self._to_copy(model) if id(tensor) not in inside]
            stack.enter_context(self._copied_in(outside))
            kept, staying = stack.enter_context(ExitStack()), self._staying(layers)
            sizes = [sum(map(self._bytes, _tensors(layer))) for layer in layers[staying:]]
            lockstep = Lockstep(room=max(sizes, default=0))
            for number, layer in enumerate(layers):
                self._copied_in_by_hooks(layer, stack, lockstep, kept if number < staying else None)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield lockstep

    def _staying(self, layers: Sequence[nn.Module]) -> int:
        """How many layers stay, from the first."""
        sizes = accumulate(sum(map(self._bytes, self._to_copy(layer))) for layer in layers)
        return sum(size <= self.room for size in sizes) if self.room else 0

    def _copied_in_by_hooks(
        self, layer: nn.Module, stack: ExitStack, lockstep: Lockstep, kept: ExitStack | None
    ) -> None:
        """Copies of the layer's tensors from the first hook before a forward pass to the last behind one.

        Args:
            kept: where the layer stays, what ends that: one for all, since layers that share tensors have to leave in
                the opposite of the order in which they came.
        """
        here, inside, left = ExitStack(), False, 0

        def enters(_module: nn.Module, _args: Any) -> None:
            nonlocal inside
            if kept is None:
                lockstep.give_way()
            if not inside:
                (kept or here).enter_context(self._copied_in(self._to_copy(layer)))
            inside = True

        def leaves(_module: nn.Module, _args: Any, _output: Any) -> None:
            nonlocal inside, left
            left += 1
            if kept is None and left == lockstep.passes:
                here.close()
                inside, left = False, 0

        stack.callback(here.close)  # a forward pass that fails has no hook behind it
        stack.callback(layer.register_forward_pre_hook(enters, prepend=True).remove)
        stack.callback(layer.register_forward_hook(leaves).remove)

    def _to_copy(self, module: nn.Module) -> list[Tensor]:
        """The module's tensors but for weights that are where and what they have to be; a buffer may be written to."""
        return [
            tensor
            for tensor in _tensors(module)
            if not isinstance(tensor, nn.Parameter)
            or tensor.device.type != self.device.type
            or tensor.dtype != self._dtype_of(tensor)
        ]

    @contextmanager
    def _copied_in(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        with torch._C.DisableTorchFunction():  # or whoever watches the weights would take this for a use of them
            mapped = [(tensor, tensor.data) for tensor in tensors]
        try:
            with torch._C.DisableTorchFunction():
                for tensor, data in mapped:
                    tensor.data = self._copy(data)
                    self._copies[tensor.untyped_storage().data_ptr()] = tensor
            yield
        finally:
            with torch._C.DisableTorchFunction():
                for tensor, data in mapped:
                    self._copies.pop(tensor.untyped_storage().data_ptr(), None)
                    tensor.data = data

    def _copy(self, data: Tensor) -> Tensor:
        return data.detach().to(device=self.device, dtype=self._dtype_of(data), copy=True)

    def _dtype_of(self, data: Tensor) -> torch.dtype:
        wider = data.is_floating_point() and torch.finfo(data.dtype).bits < torch.finfo(self.dtype).bits
        return self.dtype if wider else data.dtype

    def _bytes(self, data: Tensor) -> int:
        """What a copy takes."""
        return data.numel() * self._dtype_of(data).itemsize

    def _pack(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        """What autograd keeps of a tensor: of a copied weight, how to make the copy again."""
        source = self._copies.get(saved.untyped_storage().data_ptr())
        if source is None:
            return saved
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()
        # The copy has its original's strides; only the part that is needed (one expert) is copied.
        return lambda: self._copy(source.data.as_strided(size, stride, source.data.storage_offset() + offset))

    def _unpack(self, packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the model's outermost lists of modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists.append(name)
            yield from module


def _tensors(module: nn.Module) -> list[Tensor]:
    """The module's parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())
