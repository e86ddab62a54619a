"""Hold the zeros of a model while its weights change."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from secateur.errors import SecateurError

LEAST_SHARE = 0.01  # of zeros, for a matrix to count as sparse: no dense one has as many


class keep_zeros:
    """A context in which every weight of a model that is zero stays zero.

        with secateur.keep_zeros(model):
            train(model)

    After each step of any torch optimizer, and at the end, the weights that were zero at the start are set to zero
    again. So the context also serves what changes weights in another way, such as merging a LoRA. It is the projection
    of projected gradient descent.

    Memory: a byte for each weight of the sparse matrices. Cost: one read and write of them a step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hold the zeros of a model.

        Raises:
            SecateurError: it has no sparse matrix.
        """
        self.model = model
        self._kept = {
            name: (parameter, parameter.detach() != 0)
            for name, parameter in model.named_parameters()
            if _is_sparse(parameter)
        }
        if not self._kept:
            raise SecateurError(
                f"no matrix of this {type(model).__name__} has zeros to keep: prune it first, or load the pruned one"
            )
        self._hook: Any = None

    @property
    def names(self) -> list[str]:
        """The sparse matrices."""
        return list(self._kept)

    def __enter__(self) -> keep_zeros:
        self._hook = register_optimizer_step_post_hook(lambda *_: self.restore())
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._hook.remove()
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights that were zero to zero."""
        for name, (parameter, kept) in self._kept.items():
            if kept.device != parameter.device:
                kept = kept.to(parameter.device)
                self._kept[name] = (parameter, kept)
            parameter.mul_(kept)

    def broken(self) -> list[str]:
        """The matrices with a weight that was zero and is not any more."""
        return [name for name, (parameter, kept) in self._kept.items() if _has_others(parameter.detach(), kept)]


def _is_sparse(parameter: Tensor) -> bool:
    if parameter.ndim not in (2, 3) or not parameter.is_floating_point() or not parameter.numel():
        return False
    zeros = parameter.numel() - int(torch.count_nonzero(parameter.detach()))
    return zeros >= max(1, LEAST_SHARE * parameter.numel())


def _has_others(weight: Tensor, kept: Tensor) -> bool:
    return bool((weight[~kept.to(weight.device)] != 0).any())
