"""Fused experts that a router sends too few tokens: all tokens of the layer are run through them.

An expert with fewer tokens than inputs has a Hessian of low rank, and a mask chosen by it says nothing about most
directions. Its Hessian is mixed with that of all the layer's tokens, as they would look inside that expert:

    H = (1 - s) H_routed + s H_all,    s = max(0, 1 - tokens / inputs).

Shape legend: T tokens, K experts a token, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.matrices import Matrix
from secateur.models.weight_uses import WeightUse, WeightWatcher

Invocation = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a call, by position and by name


def borrowed_share(tokens: int, columns: int) -> float:
    """Weight s of all the layer's tokens in the Hessian of an expert that saw `tokens`."""
    return max(0.0, 1.0 - tokens / columns)


@contextmanager
def recorded_calls(owner: nn.Module) -> Iterator[list[Invocation]]:
    """The arguments of every call of a module."""
    calls: list[Invocation] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    with owner.register_forward_pre_hook(keep, with_kwargs=True):
        yield calls


def run_all_tokens(
    owner: nn.Module, call: Invocation, tokens: int, matrix: Matrix, on_matmul: Callable[[WeightUse], None]
) -> bool:
    """Repeat a call of fused experts with every token sent to one expert, and watch its matrix.

    Returns False, and does nothing, where the module takes other arguments than `_all_sent_to` knows.

    Args:
        owner: the module of the experts.
        call: what it was called with.
        tokens: of the layer, padding included.
        matrix: of the expert.
        on_matmul: called for each product with the matrix.
    """
    bound = signature(owner.forward).bind(*call[0], **call[1])
    tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
    changed = _all_sent_to(matrix, tensors, tokens)
    if changed is None:
        return False
    bound.arguments.update(changed)
    with WeightWatcher([matrix], on_matmul):
        owner.forward(*bound.args, **bound.kwargs)
    return True


def _all_sent_to(matrix: Matrix, tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor] | None:
    """The arguments that send every token to the expert of a matrix; None = fused experts of another form.

    Most take hidden states, the indices (T, K) of each token's experts, and their weights (T, K). Llama 4's take the
    hidden states once for each expert, times the router's score: zero where a token is sent to others.
    """
    assert matrix.index is not None
    experts = len(matrix.parameter)
    index = next((name for name, value in tensors.items() if not value.is_floating_point()), None)
    if index is not None:
        shape = tensors[index].shape
        if not any(value.is_floating_point() and value.shape == shape for value in tensors.values()):
            return None
        # The expert stands in the first place of each token, its neighbour in the others, so it sees each token once.
        sent = torch.full_like(tensors[index], (matrix.index + 1) % experts)
        sent[..., 0] = matrix.index
        return {index: sent}
    name, stacked = next(iter(tensors.items()), ("", torch.empty(0)))
    if len(tensors) != 1 or stacked.shape[:-1] != (experts * tokens,):
        return None
    by_expert = stacked.view(experts, tokens, -1)
    sent = torch.zeros_like(by_expert)
    sent[matrix.index] = by_expert.sum(0)
    return {name: sent.view_as(stacked)}
