"""`nn.Linear` with a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.packed import kernels
from secateur.packed.layout import PackedTensor, pack, pack_int8_where_exact, unpack
from secateur.runtime.messages import say

_said: set[str] = set()
_marks = count()  # see `_apply`
_unpacking = RLock()  # held while a layer becomes dense; not of one layer, as a lock can't be pickled


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight stays packed while a kernel serves it. For inference on a CPU.

    Gradients flow to the input, not to the weight. Where the dense weight is asked for (`.weight`, another device or
    dtype), the layer unpacks it once, says so once, and is dense from then on. A state dict holds the dense weight, as
    that of `nn.Linear` does, and one that is loaded is packed.
    """

    masks: Tensor
    values: Tensor
    offsets: Tensor
    scales: Tensor | None

    def __init__(self, packed: PackedTensor, bias: Tensor | None) -> None:
        """Take a packed matrix, and the bias as it is.

        Raises:
            SecateurError: no kernel serves it here, or a bias that does not fit.
        """
        super().__init__()
        if not is_served(packed):
            raise SecateurError("no kernel serves this matrix here: unpack it")
        kernels.check_bias(bias, packed.rows)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._take(packed)

    def _take(self, packed: PackedTensor) -> None:
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

    @property
    def packed(self) -> PackedTensor:
        """The packed weight.

        Raises:
            SecateurError: the layer has become dense.
        """
        if not self.is_packed:
            raise SecateurError("this layer was unpacked to a dense one")
        values, scales = _for_kernels(self.values, self.scales)
        return PackedTensor(self.shape, torch.bfloat16, self.is_transposed, self.masks, values, self.kept, scales)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`.

        Raises:
            SecateurError: a packed layer takes bfloat16 on the CPU, and got something else.
        """
        if not self.is_packed:
            return nn.functional.linear(x, self.weight.T if self.is_transposed else self.weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        if x.dtype != torch.bfloat16 or not x.is_cpu:
            raise SecateurError(
                f"a packed layer takes {torch.bfloat16} on the CPU, and got {x.dtype} on {x.device}: convert its "
                f"input, or unpack the model, as `model.to(dtype)` does for another dtype"
            )
        arguments = x, self.masks, self.values, self.offsets, self.bias, self.scales
        sizes = self.in_features, self.out_features
        is_plain = type(x) in (Tensor, nn.Parameter)
        if torch.compiler.is_compiling() or not is_plain or (torch.is_grad_enabled() and x.requires_grad):
            return packed_linear(*arguments, *sizes)
        return _multiply(*arguments, *sizes)

    def become_dense(self) -> None:
        """Unpack the weight, as it is stored, and let go of the packed one. Several threads may ask for it at once."""
        with _unpacking:
            if not self.is_packed:
                return
            # Not by `register_parameter`, which looks for an attribute of that name, and would come back here.
            self._parameters["weight"] = nn.Parameter(unpack(self.packed), requires_grad=False)
            self.is_packed = False
            del self.masks, self.values, self.offsets, self.scales

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("is_packed"):
            say_once("the model's code reads the weight of a packed layer itself, so it is unpacked to a dense one")
            self.become_dense()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.is_packed:
            mark = torch.full((16,), 1 + next(_marks) % 1000, dtype=torch.int16, device="cpu")
            probe = fn(mark.view(torch.bfloat16).clone())
            if probe.dtype != torch.bfloat16 or not probe.is_cpu:
                where = f"{probe.dtype} on {probe.device.type}"
                say_once(f"packed layers are unpacked to dense ones: no kernel serves {where}")
                self.become_dense()
            elif not torch.equal(probe.view(torch.int16), mark):  # `to_empty`: masks and values would no longer fit
                self.become_dense()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[f"{prefix}weight"] = unpack(self.packed)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        is_packed, is_int8 = self.is_packed, self.is_packed and self.scales is not None
        if is_packed:
            self.become_dense()
        super()._load_from_state_dict(*arguments, **named)
        if is_packed:
            weight: Tensor = self._parameters["weight"].data  # pyright: ignore[reportOptionalMemberAccess]
            if weight.dtype == torch.bfloat16 and weight.is_cpu:  # `assign=True` may bring another one
                del self.weight
                self._take((pack_int8_where_exact if is_int8 else pack)(weight, self.is_transposed))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickled layer, which may come from a machine with kernels."""
        super().__setstate__(state)
        if self.is_packed and kernels.level() == "none":
            say_once("packed layers are unpacked to dense ones: there are no kernels here (see `secateur env`)")
            self.become_dense()

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        own = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if not self.is_packed:
            return f"{own}, unpacked"
        return f"{own}, sparsity={1 - self.kept / (self.in_features * self.out_features):.2%}"


def _multiply(
    x: Tensor,
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    columns: int,
    rows: int,
) -> Tensor:
    """The product. `values` holds bfloat16 as int16, or is int8; `scales` holds float32 as int32."""
    values, scales = _for_kernels(values, scales)
    return kernels.multiply(x, masks, values, offsets, rows=rows, columns=columns, bias=bias, scales=scales)


def _for_kernels(values: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values and scales in their own dtypes, of the integers that a layer holds."""
    return (values.view(torch.bfloat16), None) if scales is None else (values, scales.view(torch.float32))


# The product as an operator that `torch.compile` keeps whole, and that has a gradient.
packed_linear = torch.library.custom_op("secateur::packed_linear", _multiply, mutates_args=())


@packed_linear.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], others[-1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, masks, values, offsets, _, scales, columns, rows = inputs
    ctx.save_for_backward(masks, values, offsets, scales)
    ctx.sizes = columns, rows


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return packed_linear_gradient(gradient, *ctx.saved_tensors, *ctx.sizes), *[None] * 7


packed_linear.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("secateur::packed_linear_gradient", mutates_args=())
def packed_linear_gradient(
    gradient: Tensor,
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    columns: int,
    rows: int,
) -> Tensor:
    """The gradient of the product's input, by the unpacked weight."""
    values, scales = _for_kernels(values, scales)
    return gradient @ kernels.unpack_rows(masks, values, offsets, columns, 0, rows, scales)


@packed_linear_gradient.register_fake
def _(gradient: Tensor, *others: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], others[-2]))


def is_served(packed: PackedTensor) -> bool:
    """Whether a kernel multiplies by this tensor here."""
    return packed.dtype == torch.bfloat16 and len(packed.shape) == 2 and kernels.level() != "none"


def say_once(message: str) -> None:
    """Say something to the user, once a process."""
    if message not in _said:
        _said.add(message)
        say(f"secateur: {message}")
