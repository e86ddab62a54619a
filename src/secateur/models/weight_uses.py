"""Watch the uses of weights: every matrix product with a known parameter as an operand.

Modules need not be `nn.Linear`: Mamba multiplies `weight @ x`, Falcon `x @ weight.T`, GPT-2 `addmm(b, x, weight)`,
experts take slices of one 3-D parameter. All of them multiply. So a `TorchFunctionMode` looks at the operands of
products, and knows a parameter by storage, offset, shape and strides: views and transposes match, and so does a whole
3-D parameter in a batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from secateur.models.matrices import Matrix

# Function -> positions of its (left, right) operands: the left's last dimension is contracted with the right's second
# last.
_MATMUL: dict[Any, tuple[int, int]] = {
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.addmm: (1, 2),
    Tensor.baddbmm: (1, 2),
    Tensor.__matmul__: (0, 1),
    Tensor.__rmatmul__: (1, 0),
}
_OPERAND_NAMES: dict[Any, tuple[str, str]] = {
    torch.matmul: ("input", "other"),
    torch.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    torch.addmm: ("mat1", "mat2"),
    torch.baddbmm: ("batch1", "batch2"),
    Tensor.matmul: ("self", "other"),
    Tensor.mm: ("self", "mat2"),
    Tensor.bmm: ("self", "mat2"),
    Tensor.addmm: ("mat1", "mat2"),
    Tensor.baddbmm: ("batch1", "batch2"),
}


@dataclass(frozen=True, eq=False)
class WeightUse:
    """A product in which a matrix took part.

    Args:
        matrix: the matrix.
        input_dim: its stored dimension that is contracted.
        inputs: the other operand; its rows are tokens.
        output_is_transposed: the matrix is the left operand, so the product's columns are tokens.
        item: index of the matrix's output in that of a batched product with the whole 3-D parameter.
    """

    matrix: Matrix
    input_dim: int
    inputs: Tensor
    output_is_transposed: bool = False
    item: tuple[Any, ...] | None = None

    @property
    def is_sent(self) -> bool:
        """Whether the matrix is an expert that is run by itself, on the tokens that a router sends it, in its order."""
        return self.matrix.index is not None and self.item is None


class WeightWatcher(TorchFunctionMode):
    """Calls `on_matmul` before each product with one of the matrices, and `on_output` after it.

    Attributes:
        other_uses: by matrix, the functions that took it in another way. They explain a matrix without a product.
    """

    def __init__(
        self,
        matrices: Iterable[Matrix],
        on_matmul: Callable[[WeightUse], None],
        on_output: Callable[[WeightUse, Tensor], None] | None = None,
    ) -> None:
        """Watch some matrices as they lie now."""
        super().__init__()
        self.on_matmul, self.on_output = on_matmul, on_output
        self._last_uses: list[WeightUse] = []
        self.other_uses: dict[str, set[str]] = {}
        self.look_for(matrices)

    def look_for(self, matrices: Iterable[Matrix]) -> None:
        """Watch these matrices and no others, as they lie now."""
        self._by_storage: dict[int, list[Matrix]] = {}
        self._by_layout: dict[tuple[Any, ...], tuple[Matrix, bool]] = {}
        self._stacks: dict[tuple[Any, ...], tuple[list[Matrix], bool]] = {}
        with torch._C.DisableTorchFunction():  # these views are not uses
            for matrix in matrices:
                self._register(matrix)

    def _register(self, matrix: Matrix) -> None:
        stored = matrix.stored
        self._by_storage.setdefault(_storage(stored), []).append(matrix)
        self._by_layout[_layout(stored)] = (matrix, False)
        self._by_layout.setdefault(_layout(stored.T), (matrix, True))
        if matrix.index is not None:
            whole = matrix.parameter.data
            for view in (whole, whole[:, None]):
                self._stacks.setdefault(_layout(view), ([], False))[0].append(matrix)
                self._stacks.setdefault(_layout(view.mT), ([], True))[0].append(matrix)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._observe_product(func, args, kwargs):
            self._note_other_use(func, args, kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if self.on_output is not None:
            for use in self._last_uses:
                self.on_output(use, output)
        return output

    def _observe_product(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Report a product with a known matrix; False where this call is something else."""
        if func is nn.functional.linear:
            inputs = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return self._report(weight, 1, inputs)
        if func not in _MATMUL:
            return False
        left, right = _operands(func, args, kwargs)
        return self._report(right, 0, left) or self._report(left, 1, right.mT if right.ndim > 1 else right, left=True)

    def _report(self, operand: Tensor, contracted: int, inputs: Tensor, left: bool = False) -> bool:
        layout = _layout(operand)
        if operand.ndim == 2 and layout in self._by_layout:
            matrix, transposed = self._by_layout[layout]
            uses = [WeightUse(matrix, contracted ^ transposed, inputs, output_is_transposed=left)]
        elif layout in self._stacks:
            matrices, transposed = self._stacks[layout]
            uses = []
            for matrix in matrices:
                item = (..., matrix.index, *[slice(None)] * (operand.ndim - 1))
                own = inputs[item] if inputs.ndim >= operand.ndim and inputs.shape[-operand.ndim] > 1 else inputs
                uses.append(WeightUse(matrix, contracted ^ transposed, own, left, item))
        else:
            return False
        self._last_uses = uses
        with torch._C.DisableTorchFunction():
            for use in uses:
                self.on_matmul(use)
        return True

    def _note_other_use(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
                for matrix in self._by_storage.get(_storage(value), ()):
                    self.other_uses.setdefault(matrix.name, set()).add(resolve_name(func) or str(func))


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    left, right = (
        args[position] if position < len(args) else kwargs[_OPERAND_NAMES[func][k]]
        for k, position in enumerate(_MATMUL[func])
    )
    return left, right


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunction():
        return (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
        )
