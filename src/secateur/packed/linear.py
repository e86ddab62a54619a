"""`nn.Linear` with a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.packed import kernels
from secateur.packed.layout import PackedTensor, unpack
from secateur.runtime.messages import say

_said: set[str] = set()


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight stays packed while a kernel serves it. For inference on a CPU.

    Gradients flow to the input, not to the weight. Where the dense weight is asked for (`.weight`, another device or
    dtype), the layer unpacks it once, says so once, and is dense from then on.
    """

    masks: Tensor
    values: Tensor
    offsets: Tensor
    scales: Tensor | None

    def __init__(self, packed: PackedTensor, bias: Tensor | None) -> None:
        """Take a packed matrix, and the bias as it is.

        Raises:
            SecateurError: no kernel serves it here.
        """
        super().__init__()
        if not is_served(packed):
            raise SecateurError("no kernel serves this matrix here: unpack it")
        self.in_features, self.out_features = packed.columns, packed.rows
        self.shape, self.is_transposed, self.kept = packed.shape, packed.transposed, packed.kept
        self.is_packed = True
        self.register_buffer("masks", packed.masks, persistent=False)
        # As integers, which `.to(dtype)` leaves as they are.
        values = packed.values if packed.scales is not None else packed.values.view(torch.int16)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("offsets", packed.offsets(), persistent=False)
        # Also kept from `.to(dtype)`.
        scales = None if packed.scales is None else packed.scales.view(torch.int32)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> PackedTensor:
        """The packed weight.

        Raises:
            SecateurError: the layer has become dense.
        """
        if not self.is_packed:
            raise SecateurError("this layer was unpacked to a dense one")
        scales, dtype = self._scales(), torch.bfloat16
        values = self.values.view(dtype) if scales is None else self.values
        return PackedTensor(self.shape, dtype, self.is_transposed, self.masks, values, self.kept, scales)

    def _scales(self) -> Tensor | None:
        return None if self.scales is None else self.scales.view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`."""
        if not self.is_packed or x.dtype != torch.bfloat16 or not x.is_cpu:
            return nn.functional.linear(x, self.weight.T if self.is_transposed else self.weight, self.bias)
        if torch.compiler.is_compiling():
            return packed_linear(
                x, self.masks, self.values, self.offsets, self.bias, self.scales, self.in_features, self.out_features
            )
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithGradient.apply(x, self)  # pyright: ignore[reportReturnType]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        scales = self._scales()
        values = self.values.view(torch.bfloat16) if scales is None else self.values
        sizes = (self.out_features, self.in_features)
        return kernels.multiply(x, self.masks, values, self.offsets, *sizes, self.bias, scales)

    def become_dense(self) -> None:
        """Unpack the weight, as it is stored, and let go of the packed one."""
        weight = unpack(self.packed)
        self.is_packed = False
        del self.masks, self.values, self.offsets, self.scales
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("is_packed"):
            say_once("the model's code reads the weight of a packed layer itself, so it is unpacked to a dense one")
            self.become_dense()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = fn(torch.empty(0, dtype=torch.bfloat16))
        if self.is_packed and (probe.dtype != torch.bfloat16 or not probe.is_cpu):
            say_once(f"packed layers are unpacked to dense ones: no kernel serves {probe.dtype} on {probe.device.type}")
            self.become_dense()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        own = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if not self.is_packed:
            return f"{own}, unpacked"
        return f"{own}, sparsity={1 - self.kept / (self.in_features * self.out_features):.2%}"


class _WithGradient(torch.autograd.Function):
    """The product with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        return layer._multiply(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = unpack(ctx.layer.packed)
        return gradient @ (weight.T if ctx.layer.is_transposed else weight), None


@torch.library.custom_op("secateur::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    columns: int,
    rows: int,
) -> Tensor:
    """The product as an operator that `torch.compile` keeps whole.

    `values` holds bfloat16 as int16, or is int8; `scales` holds float32 as int32.
    """
    if scales is None:
        return kernels.multiply(x, masks, values.view(torch.bfloat16), offsets, rows, columns, bias)
    return kernels.multiply(x, masks, values, offsets, rows, columns, bias, scales.view(torch.float32))


@packed_linear.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], others[-1]))


def is_served(packed: PackedTensor) -> bool:
    """Whether a kernel multiplies by this tensor here."""
    return packed.dtype == torch.bfloat16 and len(packed.shape) == 2 and kernels.level() != "none"


def say_once(message: str) -> None:
    """Say something to the user, once a process."""
    if message not in _said:
        _said.add(message)
        say(f"secateur: {message}")
