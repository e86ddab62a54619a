"""Hold the zeros of a model while its weights change."""

from __future__ import annotations

import weakref
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from secateur.errors import SecateurError

LEAST_SHARE = 0.01  # of zeros, for a matrix to count as sparse: no trained dense one has as many


class keep_zeros:
    """A context in which the zeros of a model's sparse matrices stay zero.

        with secateur.keep_zeros(model):
            train(model)

    After each step of any torch optimizer, and at the end, the weights that were zero at the start are set to zero
    again. So it also covers changes without an optimizer, such as merging a LoRA. It is the projection of projected
    gradient descent. Sparse matrices have at least 1% zeros. All-zero matrices, such as a new LoRA's, don't count.

    Memory: a byte for each weight of the sparse matrices. Cost: one read and write of them a step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hold the zeros of a model.

        Raises:
            SecateurError: it has no sparse matrix.
        """
        self.model = model
        self._zeros = {
            name: (parameter, parameter.detach() == 0)
            for name, parameter in model.named_parameters()
            if _is_sparse(parameter)
        }
        if not self._zeros:
            raise SecateurError(
                f"no matrix of this {type(model).__name__} has zeros to keep: prune it first, or load the pruned one"
            )
        self._release: weakref.finalize[..., keep_zeros] | None = None

    @property
    def names(self) -> list[str]:
        """The sparse matrices."""
        return list(self._zeros)

    def __enter__(self) -> keep_zeros:
        held = weakref.ref(self)  # training that was interrupted may never leave the context

        def after_step(*_: object) -> None:
            if (alive := held()) is not None:
                alive.restore()

        self._release = weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Restore the zeros a last time.

        Raises:
            SecateurError: a sparse matrix was replaced by another tensor.
        """
        self.release()
        self.restore()
        if kind is None:
            self._check_not_replaced()

    def release(self) -> None:
        """Let go of the optimizers."""
        if self._release is not None:
            self._release()

    def _check_not_replaced(self) -> None:
        present = {id(parameter) for parameter in self.model.parameters()}
        replaced = [name for name, (parameter, _) in self._zeros.items() if id(parameter) not in present]
        if replaced:
            raise SecateurError(
                f"{len(replaced)} sparse matrices were replaced by other tensors, whose zeros were not kept (first: "
                f"{replaced[0]}): change weights in place (load_state_dict without assign=True)"
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights that were zero to zero."""
        for name, (parameter, zero) in self._zeros.items():
            if zero.device != parameter.device:
                zero = zero.to(parameter.device)
                self._zeros[name] = (parameter, zero)
            parameter.masked_fill_(zero, 0.0)  # a product would leave -0.0, which packing keeps, and NaN

    def broken(self) -> list[str]:
        """The matrices with a weight that was zero and is not any more."""
        return [name for name, (parameter, zero) in self._zeros.items() if _has_others(parameter.detach(), zero)]


def _is_sparse(parameter: Tensor) -> bool:
    if parameter.ndim not in (2, 3) or not parameter.is_floating_point() or not parameter.numel():
        return False
    zeros = parameter.numel() - int(torch.count_nonzero(parameter.detach()))
    return max(1, LEAST_SHARE * parameter.numel()) <= zeros < parameter.numel()


def _has_others(weight: Tensor, zero: Tensor) -> bool:
    return bool((weight[zero.to(weight.device)] != 0).any())
