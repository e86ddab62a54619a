"""Stub blocks return their input, so one cheap forward pass shows how the model calls each block.

Stubs are used only where a trial on one sequence shows that they change no call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError
from secateur.models.blocks import Block, BlockCall, replaced_forward


@dataclass(frozen=True)
class StubOutput:
    """What a stub returns: hidden states, alone or in a tuple.

    Args:
        rest: what follows the hidden states in the tuple, None in place of tensors; None = they are returned alone.
    """

    rest: tuple[Any, ...] | None

    @classmethod
    def like(cls, output: Any) -> StubOutput | None:
        """The form of a block's output; None where it is neither a tensor nor a tuple."""
        if isinstance(output, Tensor):
            return cls(None)
        if type(output) is tuple:
            return cls(tuple(None if _has_tensor(each) else each for each in output[1:]))
        return None

    def of(self, hidden: Tensor) -> Any:
        """The output with these hidden states."""
        return hidden if self.rest is None else (hidden, *self.rest)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return not (value is None or isinstance(value, bool | int | float | str))


@contextmanager
def stubbed(blocks: Sequence[Block], outputs: Mapping[str, StubOutput]) -> Iterator[None]:
    """Within this context each block returns its hidden states unchanged."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_stub(block, outputs[block.name]))
        yield


@contextmanager
def _stub(block: Block, output: StubOutput) -> Iterator[None]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output.of(BlockCall.split(block, args, kwargs)[0])

    with replaced_forward(block.module, forward):
        yield


@dataclass(eq=False)
class CallSample:
    """How blocks were called on one sequence, and what they returned, by name."""

    calls: dict[str, BlockCall] = field(default_factory=dict)
    outputs: dict[str, StubOutput | None] = field(default_factory=dict)


@contextmanager
def sampled(blocks: Sequence[Block]) -> Iterator[CallSample]:
    """Record the calls of blocks in one forward pass."""
    sample = CallSample()
    with ExitStack() as stack:
        for block in blocks:
            for hook in _sampling_hooks(block, sample):
                stack.callback(hook.remove)
        yield sample


def _sampling_hooks(block: Block, sample: CallSample) -> tuple[Any, Any]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            sample.calls[block.name] = BlockCall.split(block, args, kwargs)[1]
        except UnsupportedModelError:
            return  # whoever watches the structure reports it

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        sample.outputs[block.name] = StubOutput.like(output)

    return (
        block.module.register_forward_pre_hook(before, with_kwargs=True),
        block.module.register_forward_hook(after),
    )


def same_calls(one: CallSample, other: CallSample) -> bool:
    """Whether blocks were called alike, hidden states apart."""
    return one.calls.keys() == other.calls.keys() and all(
        call.hidden_name == other.calls[name].hidden_name
        and _same(call.args, other.calls[name].args)
        and _same(call.kwargs, other.calls[name].kwargs)
        for name, call in one.calls.items()
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal. What can't be compared is taken for different."""
    if one is other:  # earlier blocks may have filled a shared container
        return not isinstance(one, MutableMapping | MutableSequence) or _is_plain(one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str | type(None) | torch.dtype | torch.device) and one == other


def _is_plain(value: Any) -> bool:
    return not _has_tensor(value)
