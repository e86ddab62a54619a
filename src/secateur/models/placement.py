"""Weights stay in memory, or are mapped from files and onloaded part by part.

A checkpoint that is loaded in the dtype of its files is mapped, not read: its pages belong to the files, and the system
drops them when memory is short. Only what runs is copied, to the device and in the dtype of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.models.blocks import Block


@runtime_checkable
class WeightPlacement(Protocol):
    """Where weights are, and how a run gets at them."""

    def onload_block(self, block: Block, /) -> AbstractContextManager[None]:
        """Within this context the block's weights can be run, read and written."""
        ...

    def onload_model(self, model: nn.Module, stubbed: Sequence[Block] = (), /) -> AbstractContextManager[None]:
        """Within this context the model can run forward, and backward to its hidden states.

        Args:
            model: the model or its body.
            stubbed: blocks that do not run, so their weights are not needed.
        """
        ...


class InMemory:
    """A model that is in memory as a whole."""

    def onload_block(self, _block: Block) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def onload_model(self, _model: nn.Module, _stubbed: Sequence[Block] = ()) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


class OffloadedWeights:
    """A model whose weights are mapped from files; a part is copied while it is used."""

    def __init__(self, device: str, dtype: torch.dtype, room: int = 0) -> None:
        """Onload to a device.

        Args:
            device: where weights are used.
            dtype: of forward passes; narrower floating tensors become it, wider ones keep theirs.
            room: bytes of layers that stay onloaded while the whole model runs, from one forward pass to the next; the
                others are copied for each.
        """
        self.device, self.dtype, self.room = torch.device(device), dtype, room
        self._copies: dict[int, Tensor] = {}  # storage of a copy -> the parameter or buffer it is of

    def onload_block(self, block: Block) -> AbstractContextManager[None]:
        """Copy the block's tensors; what is written to the copies is dropped with them."""
        return self._copied(_tensors(block.module))

    @contextmanager
    def onload_model(self, model: nn.Module, stubbed: Sequence[Block] = ()) -> Iterator[None]:
        """Copy what is in no layer, and each layer while it runs; the first layers stay where there is room.

        A weight that can run as it lies in its file is not copied: nothing is written to it here. A backward pass keeps
        the activations that it needs, but no copies of weights: they are made again.
        """
        unused = {id(block.module) for block in stubbed}
        layers = [layer for layer in _layers(model) if id(layer) not in unused]
        elsewhere = [*layers, *(block.module for block in stubbed)]
        inside = {id(tensor) for part in elsewhere for tensor in _tensors(part)}
        with ExitStack() as stack:
            stack.enter_context(self._copied([each for each in self._to_copy(model) if id(each) not in inside]))
            kept, staying = stack.enter_context(ExitStack()), self._num_staying(layers)
            for number, layer in enumerate(layers):
                self._copy_by_hooks(layer, stack, kept if number < staying else None)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield

    def _num_staying(self, layers: Sequence[nn.Module]) -> int:
        """How many layers stay, from the first."""
        sizes = accumulate(sum(map(self._num_bytes, self._to_copy(layer))) for layer in layers)
        return sum(size <= self.room for size in sizes) if self.room else 0

    def _copy_by_hooks(self, layer: nn.Module, stack: ExitStack, kept: ExitStack | None) -> None:
        """Copy the layer's tensors in front of each of its forward passes, and drop the copies behind it.

        Args:
            layer: the layer.
            stack: removes the hooks at the end.
            kept: where the layer stays onloaded, what ends that: one stack for all layers, since layers that share
                tensors have to leave in the reverse of the order in which they came.
        """
        here, onloaded = ExitStack(), False

        def enter(_module: nn.Module, _args: Any) -> None:
            nonlocal onloaded
            if not onloaded:
                (kept or here).enter_context(self._copied(self._to_copy(layer)))
            onloaded = True

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            nonlocal onloaded
            if kept is None:
                here.close()
                onloaded = False

        stack.callback(here.close)  # a forward pass that fails runs no hook behind it
        stack.callback(layer.register_forward_pre_hook(enter, prepend=True).remove)
        stack.callback(layer.register_forward_hook(leave).remove)

    def _to_copy(self, module: nn.Module) -> list[Tensor]:
        """The module's tensors, without weights that are already where and what they have to be.

        Buffers are copied, since a forward pass may write to them.
        """
        return [
            tensor
            for tensor in _tensors(module)
            if not isinstance(tensor, nn.Parameter)
            or tensor.device.type != self.device.type
            or tensor.dtype != self._dtype_of(tensor)
        ]

    @contextmanager
    def _copied(self, tensors: Iterable[Tensor]) -> Iterator[None]:
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

    def _num_bytes(self, data: Tensor) -> int:
        """Bytes of a copy."""
        return data.numel() * self._dtype_of(data).itemsize

    def _pack(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        """What autograd saves for a tensor: for a copied weight, how to make the copy again."""
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
