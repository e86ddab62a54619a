"""Blocks: the layers that are pruned one by one, and how the model calls each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.matrices import Matrix

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, eq=False)
class Block:
    """One block.

    Args:
        name: its path; "" is the whole model.
        module: what runs.
        matrices: the matrices to prune.
        dense: why each of its other matrices stays dense, by name.
        input_name: keyword of its hidden states, where they come by keyword.
    """

    name: str
    module: nn.Module
    matrices: list[Matrix] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    input_name: str = "hidden_states"

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the matrices to prune, by name without `.weight`."""
        return {matrix.parameter_name: matrix.parameter for matrix in self.matrices}


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of a block on one batch, without its hidden states, which each replay supplies.

    Args:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        hidden_name: keyword of the hidden states; None = the first positional argument.
        handed: arguments that earlier blocks returned (a router's states), by name or position: the block, and the
            place in its output.
        recorded: the call as the dense model made it, where pruned blocks have handed on others since.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None
    handed: Mapping[int | str, tuple[str, Any]] = field(default_factory=dict)
    recorded: BlockCall | None = None

    @property
    def of_dense(self) -> BlockCall:
        """The call as the dense model made it."""
        return self.recorded or self

    @classmethod
    def split(cls, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """Separate the hidden states from the other arguments of a call.

        Raises:
            UnsupportedModelError: the call has no tensor of hidden states.
        """
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], dict(kwargs), None)
        name = block.input_name
        if not isinstance(kwargs.get(name), Tensor):
            raise UnsupportedModelError(f"{block.name} is not called with a tensor of hidden states")
        return kwargs[name], cls(args, {key: value for key, value in kwargs.items() if key != name}, name)

    def replay(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block on hidden states; returns its new hidden states, from a tensor or a tuple."""
        return hidden_of(self.run(block, hidden), block)

    def run(self, block: Block, hidden: Tensor) -> Any:
        """Run the block on hidden states; returns all that it gives."""
        args, kwargs = self.with_hidden(hidden)
        return block.module(*args, **kwargs)

    def arguments(self) -> dict[int | str, Any]:
        """All arguments, by position or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}

    def after(self, block: Block, output: Any) -> BlockCall:
        """The call with what an earlier block hands to it in this output."""
        mine = {place: key for place, (name, key) in self.handed.items() if name == block.name}
        if not mine:
            return self
        found = self.arguments() | {place: parts_of(output)[key] for place, key in mine.items()}
        args = tuple(found[place] for place in range(len(self.args)))
        kwargs = {name: found[name] for name in self.kwargs}
        return replace(self, args=args, kwargs=kwargs, recorded=self.of_dense)

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call on these hidden states."""
        if self.hidden_name is None:
            return (hidden, *self.args), self.kwargs
        return self.args, self.kwargs | {self.hidden_name: hidden}


def hidden_of(output: Any, block: Block) -> Tensor:
    """The hidden states in a block's output. A tensor is taken whole: indexing it would take batch item 0.

    Raises:
        UnsupportedModelError: the output starts with something else.
    """
    first = next(iter(parts_of(output).values()), None)
    if not isinstance(first, Tensor):
        raise UnsupportedModelError(f"block {block.name} returns {type(first).__name__}, not a tensor of hidden states")
    return first


def parts_of(output: Any) -> dict[Any, Any]:
    """The parts of a block's output, by name or position."""
    if isinstance(output, Mapping):
        return dict(output)
    return dict(enumerate(output if isinstance(output, tuple | list) else [output]))


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with other hidden states, of the same form."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):  # transformers' ModelOutput
        return type(output)(**{**output, next(iter(output)): hidden})
    rest = (hidden, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)  # a named tuple takes each alone


def same_tensor(hidden: Tensor, output: Tensor, version: int) -> bool:
    """Whether hidden states equal a block's output, which nobody changed since it had this version."""
    return output._version == version and (hidden is output or torch.equal(hidden, output))


def run_without_cache(model: Any, part: nn.Module, **inputs: Any) -> Any:
    """Call the model or a part of it without a cache of keys, values or states, which would outlive the call.

    Some models take `use_cache` as an argument that defaults to True, others read it from a configuration.
    """
    extra = {"use_cache": False} if "use_cache" in signature(part.forward).parameters else {}
    with without_cache(model), forward_errors(part):
        return part(**inputs, **extra)


class ForwardError(SecateurError):
    """The model's own forward pass failed on its inputs."""


@contextmanager
def forward_errors(part: nn.Module) -> Iterator[None]:
    """Explain an error of a model's own code; an error of this package's hooks passes as it is.

    Raises:
        ForwardError: the forward pass failed.
    """
    try:
        yield
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if _is_from_here(error):
            raise
        raise ForwardError(
            f"the forward pass of {type(part).__name__} fails on these inputs ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}): pass batches of the inputs that the model takes; an "
            f"encoder-decoder takes decoder_input_ids too"
        ) from error


def _is_from_here(error: BaseException) -> bool:
    """Whether an error was raised by a file of this package.

    A mode that watches torch's functions (`WeightWatcher`) is the last frame of every error in one of them.
    """
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    while frames and frames[-1].co_name == "__torch_function__":
        frames.pop()
    return bool(frames) and Path(frames[-1].co_filename).is_relative_to(PACKAGE)


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Within this context no configuration of the model or its parts asks for a cache, or for outputs without names."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed = [
        (config, name, value)
        for config in configs.values()
        for name, value in (("use_cache", True), ("return_dict", False))
        if getattr(config, name, None) is value
    ]
    for config, name, value in changed:
        setattr(config, name, not value)
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context a module runs another function. A `forward` that was patched before is back afterwards."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def body_of(model: Any) -> nn.Module:
    """The model without its head, where transformers keeps them apart."""
    return getattr(model, "base_model", model)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the accelerator that any part of it is on, else the CPU."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def on_device_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs where they go. While weights are onloaded, that is where they are onloaded to."""
    device = device_of(model)
    return {name: value.to(device) for name, value in inputs.items()}


def config_of(model: Any) -> Any:
    """The model's configuration.

    Raises:
        UnsupportedModelError: it has none.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers `config`: pass a transformers model, without a wrapper "
            f"(`model.module` of a DataParallel). secateur.solve prunes a single matrix of any model"
        )
    return model.config
