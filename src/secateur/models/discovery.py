"""Which blocks a model runs, in which order: found by watching one forward pass, not by the model's name.

A chain is a list of blocks that run once each, one after another, each on the output of the one before: decoder layers,
or the layers of an encoder. Its blocks can be replayed one by one, so each is pruned on what the pruned ones before it
give. A model that runs its layers in another way (loops over them, shares weights between them, changes hidden states
between them) is one block: every matrix is observed in place, in the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import (
    Block,
    BlockCall,
    ForwardError,
    body_of,
    hidden_of,
    on_device_of,
    run_without_cache,
    same_tensor,
)
from secateur.models.matrices import Matrix, MatrixFilter, matrices_of
from secateur.models.placement import InMemory, WeightPlacement
from secateur.models.stubs import CallSample, StubOutput, same_calls, sampled, stubbed
from secateur.recipe.recipe import Recipe

Layers = dict[str, nn.Module]  # path -> layer


@dataclass(frozen=True, eq=False)
class BlockChain:
    """Blocks in the order they run.

    Args:
        blocks: the blocks.
        whole: why the model is a single block, where it is.
        stub_outputs: what stubs of the blocks return, by name, where stubs change no call.
    """

    blocks: list[Block]
    whole: str | None = None
    stub_outputs: dict[str, StubOutput] | None = None


@dataclass(frozen=True, eq=False)
class ModelStructure:
    """The chains of a model.

    Args:
        chains: in order of first use.
        dense: why each matrix stays dense that no chain prunes, by name.
        weights: number of weights of every matrix of the layers, by name.
    """

    chains: list[BlockChain]
    dense: dict[str, str]
    weights: dict[str, int]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order they run."""
        return [block for chain in self.chains for block in chain.blocks]


@torch.no_grad()
def find_block_chains(
    model: nn.Module, batch: dict[str, Tensor], recipe: Recipe, placement: WeightPlacement | None = None
) -> ModelStructure:
    """The chains that run on calibration inputs, with the matrices to prune in each block.

    Candidates are the outermost `ModuleList`s whose elements hold matrices in submodules (a list of plain
    `Linear`s is heads or projections). Which of them run, and how, is watched on the first sequence of a batch.

    Args:
        model: the model.
        batch: keyword inputs of the model.
        recipe: its rules say which matrices are pruned.
        placement: where the weights are; None = in memory.

    Raises:
        UnsupportedModelError: no list of blocks that runs, or none with a prunable matrix.
        SecateurError: a rule that matches no matrix, or that leaves one of two matrices dense which are one tensor; a
            matrix to prune that is used outside of the layers too.

    Cost: a forward pass of one sequence, and one with stubbed blocks for each chain.
    """
    placement = placement or InMemory()
    lists = _lists_of_layers(model)
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no prunable block: blocks are elements of a ModuleList that hold matrices in "
            f"submodules, and its parts are {_parts(model)}. Put its layers into a ModuleList, or prune "
            f"single matrices by secateur.solve"
        )
    inputs = _first_sequence(batch)
    trace, sample = _watch(model, lists, inputs, placement)
    if not trace.ran:
        raise UnsupportedModelError(
            f"none of the layers in {', '.join(lists)} runs on the calibration inputs: pass inputs that the model "
            f"takes, as a list of its keyword batches"
        )
    layers = {path: layer for each in lists.values() for path, layer in each.items()}
    everything, matrices = _distinct_matrices(layers), MatrixFilter(recipe)
    by_all_names = _all_matrices(layers)
    matrices.check_all_matched(matrix.name for matrix in by_all_names)
    running = {path: layers[path] for paths in trace.ran.values() for path in paths}
    chains = [BlockChain([_block(path, layers[path], matrices) for path in paths]) for paths in trace.ran.values()]
    if reason := trace.oddity or _shared_weights(chains):
        pruned, dense = matrices.partition(_distinct_matrices(running))
        input_name = getattr(model, "main_input_name", "input_ids")
        chains = [BlockChain([Block("", body_of(model), pruned, dense, input_name)], reason)]
    else:
        chains = [replace(chain, stub_outputs=_stubs(model, chain, inputs, sample, placement)) for chain in chains]
    idle = {path: layer for path, layer in layers.items() if path not in running}
    weights = {matrix.name: matrix.stored.numel() for matrix in everything}
    structure = ModelStructure(chains, _why_idle(idle, matrices), weights)
    if not any(block.matrices for block in structure.blocks):
        reasons = sorted({reason for block in structure.blocks for reason in block.dense.values()})
        raise UnsupportedModelError(
            f"no matrix is left to prune in the blocks of {', '.join(trace.ran)} ({', '.join(reasons) or 'none found'}"
            f"): a rule with `dense: false` prunes what is dense by default"
        )
    _check_other_names(structure.blocks, by_all_names, matrices)
    _check_inside(model, structure.blocks, layers)
    return structure


def _check_other_names(blocks: Sequence[Block], by_all_names: Sequence[Matrix], matrices: MatrixFilter) -> None:
    """Check that no rule leaves a matrix dense that is pruned under another name.

    Raises:
        SecateurError: one does.
    """
    pruned = {(id(matrix.parameter), matrix.index): matrix.name for block in blocks for matrix in block.matrices}
    for matrix in by_all_names:
        taken_as = pruned.get((id(matrix.parameter), matrix.index), matrix.name)
        if taken_as != matrix.name and (reason := matrices.why_dense(matrix.name)):
            raise SecateurError(
                f"{matrix.name} stays dense ({reason}), and {taken_as} is the same tensor: exclude or include both"
            )


def _check_inside(model: nn.Module, blocks: Sequence[Block], layers: Layers) -> None:
    """Check that no matrix to prune is also used outside of the layers, such as in the head.

    Raises:
        SecateurError: one is.
    """
    outside = {id(parameter): name for name, parameter in _around(model, {*map(id, layers.values())})}
    for matrix in [matrix for block in blocks for matrix in block.matrices]:
        if other := outside.get(id(matrix.parameter)):
            raise SecateurError(
                f"{matrix.name} is the same tensor as {other}, outside of the layers, which would get its zeros too: "
                f"leave it dense with ‹exclude='{matrix.name}'›"
            )


def _around(module: nn.Module, layers: set[int], path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are reached without going through a layer (by id), by name."""
    if id(module) not in layers:
        yield from module.named_parameters(path, recurse=False)
        for name, part in module.named_children():
            yield from _around(part, layers, f"{path}.{name}" if path else name)


def _block(path: str, module: nn.Module, matrices: MatrixFilter) -> Block:
    return Block(path, module, *matrices.partition(matrices_of(path, module)))


def _parts(model: nn.Module) -> str:
    """The model's children, for a message."""
    return ", ".join(f"{name} ({type(part).__name__})" for name, part in model.named_children()) or "none"


def _lists_of_layers(model: nn.Module) -> dict[str, Layers]:
    """The outermost lists whose elements hold matrices in submodules, by path."""
    lists: dict[str, Layers] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in lists):
            continue
        if any(matrices_of("", element) and list(element.children()) for element in module):
            lists[name] = {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return lists


def _all_matrices(layers: Layers) -> list[Matrix]:
    """Every matrix of the layers; one that layers share comes by each of its paths."""
    return [matrix for path, layer in layers.items() for matrix in matrices_of(path, layer)]


def _distinct_matrices(layers: Layers) -> list[Matrix]:
    """Every matrix of the layers; one that layers share comes once, by its first path."""
    found: dict[tuple[int, int | None], Matrix] = {}
    for matrix in _all_matrices(layers):
        found.setdefault((id(matrix.parameter), matrix.index), matrix)
    return list(found.values())


def _why_idle(layers: Layers, matrices: MatrixFilter) -> dict[str, str]:
    """Why the matrices of layers stay dense that no calibration input runs through."""
    pruned, dense = matrices.partition(_distinct_matrices(layers))
    return dense | {matrix.name: "its layer never runs on the calibration inputs" for matrix in pruned}


def _shared_weights(chains: Sequence[BlockChain]) -> str | None:
    """Which two matrices to prune are one tensor, if any: they can't be pruned one after the other."""
    seen: dict[tuple[int, int], str] = {}
    for matrix in [matrix for chain in chains for block in chain.blocks for matrix in block.matrices]:
        place = (matrix.stored.data_ptr(), matrix.stored.numel())
        if matrix.parameter.device.type != "meta" and seen.setdefault(place, matrix.name) != matrix.name:
            return f"{matrix.name} and {seen[place]} are one tensor"
    return None


@dataclass(eq=False)
class _Trace:
    """Which elements of which lists ran, in order, and the first thing that keeps them from being chains."""

    ran: dict[str, list[str]] = field(default_factory=dict)
    oddity: str | None = None
    _last: tuple[str, str, Tensor, int] | None = None  # list, block, its output with its version

    def enter(self, name: str, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record that an element of a list begins to run."""
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
            hidden, _ = BlockCall.split(block, args, kwargs)
        except UnsupportedModelError as error:
            return error.raw
        if not ran:
            return None
        if self._last is None or self._last[0] != name:
            return f"{name} and other lists of layers run in turn"
        _, before, output, version = self._last
        return None if same_tensor(hidden, output, version) else f"the input of {block.name} is not what {before} gave"

    def leave(self, name: str, block: Block, output: Any) -> None:
        """Record what an element of a list gave."""
        try:
            hidden = hidden_of(output, block)
        except UnsupportedModelError as error:
            self.oddity = self.oddity or error.raw
        else:
            self._last = (name, block.name, hidden, hidden._version)


def _first_sequence(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first sequence of a batch; the whole batch where its inputs have several lengths (patches of pictures)."""
    one_size = len({len(value) for value in batch.values()}) == 1
    return {key: value[:1] if one_size else value for key, value in batch.items()}


def _watch(
    model: nn.Module, lists: dict[str, Layers], inputs: dict[str, Tensor], placement: WeightPlacement
) -> tuple[_Trace, CallSample]:
    """Run one sequence and watch the elements of the lists.

    Raises:
        UnsupportedModelError: the forward pass changes a weight, which would be saved as changed.
    """
    trace = _Trace(oddity=_same_module(lists.values()))
    every = {path: Block(path, layer) for layers in lists.values() for path, layer in layers.items()}
    with placement.onload_model(body_of(model)), ExitStack() as hooks:
        sample = hooks.enter_context(sampled(list(every.values())))
        for name, layers in lists.items():
            for path in layers:
                for hook in _hooks(trace, name, every[path]):
                    hooks.callback(hook.remove)
        versions = {name: _version(each) for name, each in model.named_parameters()}
        run_without_cache(model, body_of(model), **on_device_of(model, inputs))
        changed = [name for name, each in model.named_parameters() if _version(each) != versions[name]]
    if changed:
        raise UnsupportedModelError(
            f"a forward pass of the model changes its weights ({changed[0]}), and they would be saved like that: turn "
            f"it off in the model's config (RWKV's: rescale_every=0)"
        )
    return trace, sample


def _version(parameter: nn.Parameter) -> int:
    """How often a parameter was written in place; parameters of inference mode don't count it."""
    return 0 if parameter.is_inference() else parameter._version


def _stubs(
    model: nn.Module, chain: BlockChain, inputs: dict[str, Tensor], sample: CallSample, placement: WeightPlacement
) -> dict[str, StubOutput] | None:
    """What stubs of a chain's blocks return; None where stubs change a call, or the model can't run with them."""
    outputs = {block.name: output for block in chain.blocks if (output := sample.outputs.get(block.name)) is not None}
    if len(outputs) < len(chain.blocks):
        return None
    own = CallSample({block.name: sample.calls[block.name] for block in chain.blocks})
    try:
        with (
            placement.onload_model(body_of(model), chain.blocks),
            sampled(chain.blocks) as trial,
            stubbed(chain.blocks, outputs),
        ):
            run_without_cache(model, body_of(model), **on_device_of(model, inputs))
    except ForwardError:
        return None
    return outputs if same_calls(own, trial) else None


def _same_module(lists: Iterable[Layers]) -> str | None:
    """Which two layers are one module, if any."""
    seen: dict[int, str] = {}
    for layers in lists:
        for path, layer in layers.items():
            if seen.setdefault(id(layer), path) != path:
                return f"{seen[id(layer)]} and {path} are one module"
    return None


def _hooks(trace: _Trace, name: str, block: Block) -> Sequence[Any]:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.enter(name, block, args, kwargs)

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        trace.leave(name, block, output)

    return (
        block.module.register_forward_pre_hook(enter, with_kwargs=True),
        block.module.register_forward_hook(leave, with_kwargs=True),
    )
