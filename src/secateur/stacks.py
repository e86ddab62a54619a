"""Which blocks a model runs, in which order: found by watching one forward pass, not by the model's name.

A *stack* is a list of blocks that run once each, one after another, each on what the one before gave: decoder layers,
or the layers of an encoder. Its blocks can be replayed one by one, so that each is pruned on what the pruned ones
before it give. A model that runs its layers in another way (loops over them, shares weights between them, changes
hidden states between them) is one block as a whole: every matrix is observed in place, in the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model import (
    Block,
    Call,
    Choice,
    UnsupportedModelError,
    body_of,
    device_of,
    hidden_of,
    matrices_of,
    run_without_cache,
)
from secateur.observe import Matrix

Layers = dict[str, nn.Module]  # path -> block


@dataclass(eq=False)
class Stack:
    """Blocks in the order they run. `whole` says why the model is a single block, where it is."""

    blocks: list[Block]
    whole: str | None = None


@dataclass(eq=False)
class Structure:
    """The stacks of a model in order of first use, the matrices of layers that never run, with the reason, and the
    number of weights of every matrix of the layers."""

    stacks: list[Stack]
    idle: dict[str, str]
    weights: dict[str, int]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order they run."""
        return [block for stack in self.stacks for block in stack.blocks]


@torch.no_grad()
def find_stacks(
    model: nn.Module, batch: dict[str, Tensor], include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> Structure:
    """The stacks that run on calibration inputs, with the matrices to prune in each block.

    Candidates are the outermost `ModuleList`s whose elements are modules of modules with matrices (a list of plain
    `Linear`s is heads or projections). Which of them run, and how, is watched on the first sequence of a batch.

    Args:
        batch: keyword inputs of the model.
        include: glob patterns on matrix paths; where given, only these are pruned, rules for dense ones or not.
        exclude: glob patterns on matrix paths to leave dense.

    Raises:
        UnsupportedModelError: no list of blocks that runs, or none with a prunable matrix.
        ValueError: a pattern that matches no matrix.

    Cost: a forward pass of one sequence.
    """
    lists = _lists_of_blocks(model)
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no prunable block: blocks are elements of a ModuleList that hold matrices in "
            f"modules of their own, and its parts are {_parts(model)}: put its layers into a ModuleList, or prune "
            f"single matrices by secateur.solve"
        )
    trace = _watch(model, lists, batch)
    if not trace.ran:
        raise UnsupportedModelError(
            f"none of the layers in {', '.join(lists)} runs on the calibration inputs: pass inputs that the model "
            f"takes, as a list of its keyword batches"
        )
    choice = Choice(list(include), list(exclude))
    layers = {path: layer for each in lists.values() for path, layer in each.items()}
    stacks = [
        Stack([choice.fill(Block(path, layers[path]), matrices_of(path, layers[path])) for path in paths])
        for paths in trace.ran.values()
    ]
    running = {path: layers[path] for paths in trace.ran.values() for path in paths}
    idle = {path: layer for path, layer in layers.items() if path not in running}
    if reason := trace.oddity or _sharing(stacks):
        block = Block("", body_of(model), input_name=getattr(model, "main_input_name", "input_ids"))
        stacks = [Stack([choice.fill(block, _distinct_matrices(running))], reason)]
    weights = {matrix.name: matrix.stored.numel() for matrix in _distinct_matrices(layers)}
    structure = Structure(stacks, _idle(idle, choice), weights)
    choice.check_all_matched()
    if not any(block.matrices for block in structure.blocks):
        raise UnsupportedModelError(f"no prunable matrix is left in the blocks of {', '.join(trace.ran)}")
    return structure


def _parts(model: nn.Module) -> str:
    """What a model consists of, for a message."""
    return ", ".join(f"{name} ({type(part).__name__})" for name, part in model.named_children()) or "none"


def _lists_of_blocks(model: nn.Module) -> dict[str, Layers]:
    """The outermost lists whose elements hold matrices in modules of their own, by path."""
    lists: dict[str, Layers] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in lists):
            continue
        if any(matrices_of("", element) and list(element.children()) for element in module):
            lists[name] = {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return lists


def _distinct_matrices(layers: Layers) -> list[Matrix]:
    """Every matrix of the layers; one that layers share comes once, by its first path."""
    found: dict[tuple[int, int | None], Matrix] = {}
    for path, layer in layers.items():
        for matrix in matrices_of(path, layer):
            found.setdefault((id(matrix.parameter), matrix.index), matrix)
    return list(found.values())


def _idle(layers: Layers, choice: Choice) -> dict[str, str]:
    """Why the matrices of layers that no calibration input runs through stay dense."""
    idle = choice.fill(Block("", nn.Module()), _distinct_matrices(layers))
    return idle.dense | {matrix.name: "its layer never runs on the calibration inputs" for matrix in idle.matrices}


def _sharing(stacks: Sequence[Stack]) -> str | None:
    """Which two matrices to prune are one tensor, if any are: they can't be pruned one after the other."""
    seen: dict[tuple[int, int], str] = {}
    for matrix in [matrix for stack in stacks for block in stack.blocks for matrix in block.matrices]:
        place = (matrix.stored.data_ptr(), matrix.stored.numel())
        if matrix.parameter.device.type != "meta" and seen.setdefault(place, matrix.name) != matrix.name:
            return f"{matrix.name} and {seen[place]} are one tensor"
    return None


@dataclass(eq=False)
class _Trace:
    """Which elements of which lists ran, in order, and the first thing that keeps them from being stacks."""

    ran: dict[str, list[str]] = field(default_factory=dict)
    oddity: str | None = None
    _last: tuple[str, str, Tensor, int] | None = None  # list, block, its output with its version

    def enters(self, name: str, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that an element of a list begins to run."""
        ran = self.ran.setdefault(name, [])
        self.oddity = self.oddity or self._why_odd(name, block, ran, args, kwargs)
        if block.name not in ran:
            ran.append(block.name)

    def _why_odd(
        self, name: str, block: Block, ran: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        if block.name in ran:
            return f"{block.name} runs more than once a forward pass"
        try:
            hidden, _ = Call.split(block, args, kwargs)
        except UnsupportedModelError as error:
            return str(error)
        if not ran:
            return None
        if self._last is None or self._last[0] != name:
            return f"{name} and other lists of layers run in turn"
        _, before, output, version = self._last
        return None if same_tensor(hidden, output, version) else f"the input of {block.name} is not what {before} gave"

    def leaves(self, name: str, block: Block, output: Any) -> None:
        """Note what an element of a list gave."""
        try:
            hidden = hidden_of(output, block)
        except UnsupportedModelError as error:
            self.oddity = self.oddity or str(error)
        else:
            self._last = (name, block.name, hidden, hidden._version)


def same_tensor(hidden: Tensor, output: Tensor, version: int) -> bool:
    """Whether hidden states are a block's output, unchanged since it had this version."""
    return output._version == version and (hidden is output or torch.equal(hidden, output))


def _watch(model: nn.Module, lists: dict[str, Layers], batch: dict[str, Tensor]) -> _Trace:
    """Run the first sequence of a batch and watch the elements of the lists."""
    trace = _Trace()
    device = device_of(model)
    one_size = len({len(value) for value in batch.values()}) == 1
    inputs = {key: (value[:1] if one_size else value).to(device) for key, value in batch.items()}
    with ExitStack() as hooks:
        for name, layers in lists.items():
            for path, layer in layers.items():
                for hook in _hooks(trace, name, Block(path, layer)):
                    hooks.callback(hook.remove)
        run_without_cache(model, body_of(model), **inputs)
    return trace


def _hooks(trace: _Trace, name: str, block: Block) -> Sequence[Any]:
    def enters(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.enters(name, block, args, kwargs)

    def leaves(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        trace.leaves(name, block, output)

    return (
        block.module.register_forward_pre_hook(enters, with_kwargs=True),
        block.module.register_forward_hook(leaves, with_kwargs=True),
    )
