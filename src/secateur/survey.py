"""One dense pass that learns everything about a model that does not depend on pruning.

How each block is called, which matrices take part in products, which of them share an input. It changes nothing, so
what is wrong with a model or a text is found before any weight is changed.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from secateur import parallel
from secateur.capture import Batch, InputGroup, Progress, Stream, real_tokens
from secateur.experts import owner_of
from secateur.lockstep import Lockstep
from secateur.memory import HiddenStates, Memory
from secateur.model import (
    Block,
    Call,
    UnsupportedModelError,
    body_of,
    device_of,
    hidden_of,
    run_without_cache,
    without_cache,
)
from secateur.observe import Matrix, Use, WeightWatcher
from secateur.stacks import same_tensor

# Names of functions that multiply matrices: a weight that enters one must not be called dense.
PRODUCTS = {"linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "scaled_mm"}


@torch.no_grad()
def survey(
    model: nn.Module,
    blocks: list[Block],
    batches: Sequence[Batch],
    progress: Progress,
    missed: dict[str, ValueError] | None = None,
    memory: Memory | None = None,
    lockstep: Lockstep | None = None,
) -> Stream:
    """Run the dense model once over the calibration batches and record how its blocks are called.

    Each process takes the batches that are dealt to it; what they find is put together.

    Args:
        missed: takes the matrices that should be pruned but can't be observed, with the error of each. Without it, the
            first is raised.
        memory: where hidden states go; None = they are held, whatever their size.
        lockstep: how passes go side by side; None = one after another.

    Raises:
        UnsupportedModelError: blocks that are skipped, run twice, or not chained one after another.
        ValueError: NaN or infinity in an activation, or a prunable matrix that saw no token.
    """
    memory, lockstep = memory or Memory(), lockstep or Lockstep()
    device = device_of(model)
    dealt = parallel.dealt(len(batches))
    padding: list[Tensor | None] = [None] * len(dealt)
    recorder = _Recorder(blocks, HiddenStates(memory, len(dealt)))

    def run(number: int) -> None:
        on_device = {name: tensor.to(device) for name, tensor in batches[dealt[number]].items()}
        padding[number] = real = _real_tokens(on_device)
        if real is None:
            on_device.pop("attention_mask", None)
        with recorder.one_pass(number, real):
            run_without_cache(model, body_of(model), **on_device)
        progress("dense pass", recorder.passes, len(dealt))

    with recorder.watch(), without_cache(model):
        waiting, width = [*range(len(dealt))], 1
        while waiting:
            lockstep.run([partial(run, number) for number in waiting[:width]])
            waiting, width = waiting[width:], lockstep.width(recorder.hidden[0].nbytes)
    groups = recorder.finish()
    if missed is not None:
        missed |= recorder.missed
    elif recorder.missed:
        raise next(iter(recorder.missed.values()))
    return Stream(recorder.hidden, recorder.calls, padding, groups, recorder.routed(padding), memory=memory)


def _real_tokens(batch: Batch) -> Tensor | None:
    """The batch's attention mask; None where all tokens are real.

    Raises:
        UnsupportedModelError: padding beside decoder inputs, where one mask doesn't tell of both stacks' tokens.
    """
    masks = {name: value for name, value in batch.items() if name.endswith("attention_mask") and not bool(value.all())}
    if masks and any(name.startswith("decoder_") for name in batch):
        raise UnsupportedModelError(
            f"{' and '.join(masks)} leaves tokens out beside decoder inputs: pass encoder-decoders sequences of equal "
            f"length, without padding"
        )
    mask = masks.get("attention_mask")
    return None if mask is None else mask.bool()


@dataclass(eq=False)
class _Pass:
    """One forward pass: its batch's number, its real tokens, what its last block gave, and how often each ran."""

    number: int
    real: Tensor | None
    last_output: tuple[str, Tensor, int] | None = None
    calls: Counter[str] = field(default_factory=Counter)


_PASS: ContextVar[_Pass] = ContextVar("pass")


class _Recorder:
    """Records calls, products and shared inputs over the batches of a dense pass, whose passes may come in any order,
    but each block runs for one at a time."""

    def __init__(self, blocks: list[Block], hidden: HiddenStates) -> None:
        self.blocks, self.hidden = blocks, hidden
        self.calls: dict[str, list[Call]] = {block.name: [] for block in blocks}
        self._arrived: dict[str, list[int]] = {block.name: [] for block in blocks}  # batches that a block has run on
        self.tokens: dict[str, int] = {}
        self.input_dim: dict[str, int] = {}
        self.inputs_seen: dict[str, list[Any]] = {}
        self.other_uses: dict[str, set[str]] = {}
        self._inputs: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._number_of_inputs = 0
        self.passes = 0
        self._entered: set[int] = set()
        self.missed: dict[str, ValueError] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch forward passes of the whole model, each within `one_pass`."""
        watcher = WeightWatcher([], self._on_use)  # looks for a block's matrices when that begins to run
        with ExitStack() as stack:
            entering = register_module_forward_pre_hook(lambda module, _args: self._entered.add(id(module)))
            stack.callback(entering.remove)
            for block in self.blocks:
                module = block.module
                before = module.register_forward_pre_hook(self._before(block, watcher), with_kwargs=True)
                after = module.register_forward_hook(self._after(block, watcher), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(watcher)
            yield
        self._inputs.clear()
        self.other_uses = watcher.other_uses

    @contextmanager
    def one_pass(self, number: int, real: Tensor | None) -> Iterator[None]:
        """Take what runs meanwhile for one forward pass of the whole model, on the batch of that number."""
        token = _PASS.set(_Pass(number, real))
        try:
            yield
            calls = _PASS.get().calls
            if odd := [name for name in self.calls if calls[name] != 1]:
                raise UnsupportedModelError(
                    f"each block must run once a forward pass; {odd[0]} ran {calls[odd[0]]} times in one"
                )
        finally:
            _PASS.reset(token)
        self.passes += 1

    def _before(self, block: Block, watcher: WeightWatcher) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watcher.look_for(block.matrices)
            hidden, call = Call.split(block, args, kwargs)
            self._inputs.clear()
            own = _PASS.get()
            own.calls[block.name] += 1
            place = bisect(self._arrived[block.name], own.number)
            self._arrived[block.name].insert(place, own.number)
            if own.last_output is None:
                if block is not self.blocks[0]:
                    raise UnsupportedModelError(
                        f"{block.name} runs before {self.blocks[0].name}: blocks must run in order"
                    )
                self._check_padding(block, hidden, own.real)
                self.hidden.insert(place, hidden.detach().clone())
            elif not same_tensor(hidden, *own.last_output[1:]):
                raise UnsupportedModelError(
                    f"the input of {block.name} is not the output of {own.last_output[0]} on all calibration inputs: "
                    f"the model changes hidden states between its blocks, which a block by block replay would miss"
                )
            self.calls[block.name].insert(place, call)

        return hook

    def _check_padding(self, block: Block, hidden: Tensor, real: Tensor | None) -> None:
        """Raise UnsupportedModelError where the attention mask is not that of a block's positions (a decoder's)."""
        if real is not None and tuple(hidden.shape[: real.ndim]) != tuple(real.shape):
            raise UnsupportedModelError(
                f"the attention mask {tuple(real.shape)} doesn't fit the positions in front of {block.name}, whose "
                f"hidden states are {tuple(hidden.shape)}: pass sequences of equal length, without padding"
            )

    def _after(self, block: Block, watcher: WeightWatcher) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            watcher.look_for([])  # copies of its weights may go, and their addresses to others
            hidden, own = hidden_of(output, block), _PASS.get()
            real = hidden if own.real is None else hidden[own.real]
            if not bool(torch.isfinite(real).all()):
                raise ValueError(
                    f"{block.name} gives NaN or infinite activations in the dense model: try another dtype"
                )
            own.last_output = (block.name, hidden, hidden._version)

        return hook

    def _on_use(self, use: Use) -> None:
        name, x = use.matrix.name, use.inputs
        known_dim = self.input_dim.setdefault(name, use.input_dim)
        if known_dim != use.input_dim:
            raise UnsupportedModelError(f"{name} is used both as stored and transposed: it has no single input")
        key = (x.data_ptr(), x.shape[-1], x.numel(), x.stride()[-1], x._version)
        if key not in self._inputs:  # the tensor is kept, so that its address is not given to another
            self._number_of_inputs += 1
            self._inputs[key] = (x, self._number_of_inputs)
        self.inputs_seen.setdefault(name, []).append(self._inputs[key][1])
        self.tokens[name] = self.tokens.get(name, 0) + len(real_tokens(use, _PASS.get().real))

    def finish(self) -> dict[str, list[InputGroup]]:
        """The input groups of each block, in order of first use; a matrix with no product goes to `block.dense`."""
        self._put_together()
        groups: dict[str, list[InputGroup]] = {}
        for block in self.blocks:
            unused = [matrix for matrix in block.matrices if not self.tokens.get(matrix.name)]
            for matrix in unused:
                self._explain_unused(block, matrix)
            by_name = {matrix.name: matrix for matrix in block.matrices}
            found: dict[tuple[Any, ...], InputGroup] = {}
            for name, inputs in self.inputs_seen.items():  # in order of first use
                if name in by_name:
                    group = found.setdefault(tuple(inputs), InputGroup(by_name[name]))
                    group.members.append((by_name[name], self.input_dim[name]))
            alone = [
                InputGroup(matrix, [(matrix, self.input_dim[matrix.name])])
                for matrix in unused
                if matrix.name in self.input_dim
            ]
            groups[block.name] = [*found.values(), *alone]
        return groups

    def _put_together(self) -> None:
        """Take in what every other process saw, in the order of ranks, so that all go on with the same."""
        if parallel.size() == 1:
            return
        places = {
            id(module): (number, path)
            for number, block in enumerate(self.blocks)
            for path, module in block.module.named_modules()
        }
        entered = {places[module] for module in self._entered if module in places}
        parts = parallel.gather((self.tokens, self.input_dim, self.inputs_seen, self.other_uses, entered))
        self.tokens, self.input_dim, self.inputs_seen, self.other_uses = {}, {}, {}, {}
        for rank, (tokens, input_dim, inputs_seen, other_uses, its_entered) in enumerate(parts):
            self.input_dim |= input_dim
            for name, count in tokens.items():
                self.tokens[name] = self.tokens.get(name, 0) + count
            for name, inputs in inputs_seen.items():
                self.inputs_seen.setdefault(name, []).extend((rank, number) for number in inputs)
            for name, uses in other_uses.items():
                self.other_uses.setdefault(name, set()).update(uses)
            self._entered |= {module for module, place in places.items() if place in its_entered}

    def routed(self, padding: Sequence[Tensor | None]) -> frozenset[str]:
        """Experts that saw only some tokens: slices of a 3-D parameter, and elements of a list that differ in theirs.

        Cross-attention sees another number of tokens than the rest of its block, but all of them.
        """
        own = sum(
            (hidden.shape[:-1] if hidden.is_floating_point() else hidden.shape).numel()
            if real is None
            else int(real.sum())
            for hidden, real in zip(self.hidden, padding, strict=True)
        )
        everything = sum(parallel.gather(own))
        routed: set[str] = set()
        for block in self.blocks:
            alike: dict[str, list[str]] = {}
            for matrix in block.matrices:
                if matrix.index is None:
                    inside = matrix.name.removeprefix(block.name)
                    alike.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", inside), []).append(matrix.name)
                elif self.tokens.get(matrix.name, 0) < everything and matrix.name in self.input_dim:
                    routed.add(matrix.name)
            for names in alike.values():
                if block.name and len({self.tokens.get(name, 0) for name in names}) > 1:
                    routed |= set(names)
        return frozenset(routed)

    def _explain_unused(self, block: Block, matrix: Matrix) -> None:
        """Say why a matrix took part in no product, or count it as missed where that must not pass.

        Fine are: an expert without tokens, since others of its kind tell how it would be used; a module that is never
        called, though what it is a part of is (cross-attention without an encoder); a bare parameter in no product
        (Mamba's A_log). A module's weight must be in one.
        """
        kind = [name for name in self.input_dim if matrix.index is not None and name.startswith(f"{_stem(matrix)}[")]
        if kind:
            self.input_dim[matrix.name] = self.input_dim[kind[0]]
            return
        if self._is_never_called(block, matrix):
            block.matrices.remove(matrix)
            block.dense[matrix.name] = "its module is never called on the calibration inputs"
            return
        uses = self.other_uses.get(matrix.name, set())
        if products := sorted(use for use in uses if use.rsplit(".", 1)[-1].strip("_") in PRODUCTS):
            self.missed[matrix.name] = UnsupportedModelError(
                f"{matrix.name} enters {products[0]} in an unknown form, so its inputs can't be observed: "
                f"leave it dense with --exclude '{matrix.name}'"
            )
            return
        module_weights = {id(module.weight) for module in block.module.modules() if hasattr(module, "weight")}
        if uses and id(matrix.parameter) not in module_weights:
            block.matrices.remove(matrix)
            block.dense[matrix.name] = f"enters no matrix product (used by {', '.join(sorted(uses))})"
            return
        self.missed[matrix.name] = ValueError(
            f"{matrix.name} saw no calibration token: it entered no matrix product. Use more calibration text, "
            f"or leave it dense with --exclude '{matrix.name}'"
        )

    def _is_never_called(self, block: Block, matrix: Matrix) -> bool:
        """Whether the matrix's module isn't called, in an element of a list (a layer, an expert) that is."""
        owner = owner_of(block.module, matrix)
        if matrix.name in self.other_uses or id(owner) in self._entered:
            return False
        path = next(name for name, module in block.module.named_modules() if module is owner)
        element = module = block.module
        for step in path.split("."):
            child = module.get_submodule(step)
            element = child if isinstance(module, nn.ModuleList | nn.ModuleDict) else element
            module = child
        return id(element) in self._entered


def _stem(matrix: Matrix) -> str:
    """The path of the parameter that an expert is a slice of."""
    return matrix.name.partition("[")[0]
