"""The calibration stream: what flows into each block, and the Gram matrices of what flows into each matrix.

One dense pass (`survey`) learns everything that does not depend on pruning: how each block is called, which matrices
take part in products, which of them share an input. It changes nothing, so what is wrong with a model or a text is
found before any weight is changed. `Stream.observe` and `Stream.advance` then serve one block at a time.

Shape legend: B sequences, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from secateur.gram import Gram, GramAccumulator
from secateur.model import Block, Call, UnsupportedModelError, hidden_of
from secateur.observe import Matrix, Use, WeightWatcher

# Names of functions that multiply matrices: a weight that enters one must not be called dense.
PRODUCTS = {"linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "scaled_mm"}

Batch = dict[str, Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class InputGroup:
    """Matrices with one input (q, k, v) and so one Gram matrix; the leader's use is the one that is accumulated."""

    leader: Matrix
    members: list[tuple[Matrix, int]] = field(default_factory=list)  # (matrix, input_dim)


@dataclass(eq=False)
class Stream:
    """Hidden states of every batch in front of one block, and how to run each block on them.

    `hidden` is the pruned stream; `dense` is the same texts in the dense model, where something aims at it. `routed`
    names the matrices that don't see every token (experts).
    """

    hidden: list[Tensor]
    calls: dict[str, list[Call]]
    padding: list[Tensor | None]  # True = a real token, None = all are
    groups: dict[str, list[InputGroup]]
    routed: frozenset[str] = frozenset()
    dense: list[Tensor] | None = None

    def outputs(self, block: Block, of_dense: bool = False) -> list[Tensor]:
        """What the block gives on the stream, or on the dense one. Cost: one forward of the block on all batches."""
        stream = self.dense if of_dense else self.hidden
        assert stream is not None
        calls = self.calls[block.name]
        return [call.replay(block, hidden.clone()) for call, hidden in zip(calls, stream, strict=True)]

    def observe(self, block: Block, groups: Sequence[InputGroup]) -> dict[str, Gram]:
        """Gram matrices by the name of each group's leader. Cost: one forward of the block on all batches."""
        sums: dict[str, GramAccumulator] = {}

        def accumulate(name: str, X: Tensor) -> None:
            if name not in sums:
                sums[name] = GramAccumulator(X.shape[1], X.device)
            sums[name].add(X)

        for index, hidden in enumerate(self.hidden):
            self.replay_watched(block, groups, index, hidden, accumulate)
        return finished_grams(groups, sums)

    def replay_watched(
        self,
        block: Block,
        groups: Sequence[InputGroup],
        index: int,
        hidden: Tensor,
        on_input: Callable[[str, Tensor], None],
    ) -> Tensor:
        """Run the block on hidden states of batch `index`; returns its output.

        Args:
            on_input: called with the name of a group's leader and its input (real tokens, C), for each use.
        """
        leaders = {group.leader.name for group in groups}

        def on_use(use: Use) -> None:
            if use.matrix.name in leaders:
                on_input(use.matrix.name, real_tokens(use, self.padding[index]))

        with WeightWatcher([group.leader for group in groups], on_use):
            return self.calls[block.name][index].replay(block, hidden.clone())  # a block may change its input in place

    def advance(self, block: Block) -> None:
        """Replace the hidden states by the block's output. Cost: one forward of the block on all batches."""
        for index, call in enumerate(self.calls[block.name]):
            self.hidden[index] = call.replay(block, self.hidden[index])
        del self.calls[block.name]


def finished_grams(groups: Sequence[InputGroup], sums: dict[str, GramAccumulator]) -> dict[str, Gram]:
    """The Gram matrix of each group.

    Raises:
        ValueError: a group that saw no token, or inputs that are not finite.
    """
    names = [group.leader.name for group in groups]
    if silent := [name for name in names if name not in sums or sums[name].tokens == 0]:
        raise ValueError(
            f"{silent[0]} saw tokens in the whole dense pass, but none here (a router sends pruned hidden states "
            f"elsewhere): use more calibration text, or leave it dense with --exclude '{silent[0]}'"
        )
    grams = {name: sums[name].finish() for name in names}
    for name, gram in grams.items():
        if not bool(torch.isfinite(gram.xx).all()):
            raise ValueError(
                f"the input of {name} holds NaN or infinite activations after pruning the blocks before it"
            )
    return grams


def real_tokens(use: Use, real: Tensor | None) -> Tensor:
    """A product's input as (tokens, C), without padded positions."""
    X = use.inputs.reshape(-1, use.inputs.shape[-1])
    if real is None:
        return X
    if len(X) != real.numel():
        raise UnsupportedModelError(
            f"{use.matrix.name} was applied to {len(X)} rows where the batch has {real.numel()} positions, so padded "
            f"ones can't be told apart: pass sequences of equal length, without padding"
        )
    return X[real.reshape(-1)]


@torch.no_grad()
def survey(model: nn.Module, blocks: list[Block], batches: Sequence[Batch], progress: Progress) -> Stream:
    """Run the dense model once over the calibration batches and record how its blocks are called.

    Raises:
        UnsupportedModelError: blocks that are skipped, run twice, or not chained one after another.
        ValueError: NaN or infinity in an activation, or a prunable matrix that saw no token.
    """
    recorder = _Recorder(blocks)
    body: nn.Module = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    extra = {"use_cache": False} if "use_cache" in signature(body.forward).parameters else {}
    padding: list[Tensor | None] = []
    for index, batch in enumerate(batches):
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        mask = on_device.get("attention_mask")
        padding.append(None if mask is None or bool(mask.all()) else mask.bool())
        if padding[-1] is None:
            on_device.pop("attention_mask", None)
        with recorder.watch(padding[-1]):
            body(**on_device, **extra)
        progress("dense pass", index + 1, len(batches))
    return Stream(recorder.hidden, recorder.calls, padding, recorder.finish(), recorder.routed(padding))


class _Recorder:
    """Records calls, products and shared inputs over the batches of a dense pass."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self.calls: dict[str, list[Call]] = {block.name: [] for block in blocks}
        self.tokens: dict[str, int] = {}
        self.input_dim: dict[str, int] = {}
        self.inputs_seen: dict[str, list[int]] = {}
        self.other_uses: dict[str, set[str]] = {}
        self._inputs: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._number_of_inputs = 0
        self._last_output: tuple[str, Tensor, int] | None = None
        self._real: Tensor | None = None

    @contextmanager
    def watch(self, real: Tensor | None) -> Iterator[WeightWatcher]:
        """Watch one forward pass of the whole model."""
        self._real = real
        self._last_output = None
        watcher = WeightWatcher([matrix for block in self.blocks for matrix in block.matrices], self._on_use)
        with ExitStack() as stack:
            for block in self.blocks:
                module = block.module
                before = module.register_forward_pre_hook(self._before(block), with_kwargs=True)
                after = module.register_forward_hook(self._after(block), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield stack.enter_context(watcher)
        self._inputs.clear()
        for name, uses in watcher.other_uses.items():
            self.other_uses.setdefault(name, set()).update(uses)
        num_calls = {block.name: len(self.calls[block.name]) for block in self.blocks}
        if odd := [f"{name} ran {count} times" for name, count in num_calls.items() if count != len(self.hidden)]:
            raise UnsupportedModelError(
                f"each block must run once a forward pass; of {len(self.hidden)} passes {odd[0]}"
            )

    def _before(self, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = Call.split(args, kwargs)
            self._inputs.clear()
            if self._last_output is None:
                if block is not self.blocks[0]:
                    raise UnsupportedModelError(
                        f"{block.name} runs before {self.blocks[0].name}: blocks must run in order"
                    )
                self.hidden.append(hidden.detach().clone())
            elif not self._is_last_output(hidden):
                raise UnsupportedModelError(
                    f"the input of {block.name} is not the output of {self._last_output[0]}: the model changes hidden "
                    f"states between its blocks, which a block by block replay would miss"
                )
            self.calls[block.name].append(call)

        return hook

    def _after(self, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            hidden = hidden_of(output, block)
            real = hidden if self._real is None else hidden[self._real]
            if not bool(torch.isfinite(real).all()):
                raise ValueError(
                    f"{block.name} gives NaN or infinite activations in the dense model: try another dtype"
                )
            self._last_output = (block.name, hidden, hidden._version)

        return hook

    def _is_last_output(self, hidden: Tensor) -> bool:
        """Whether hidden states are the output of the block before, unchanged."""
        assert self._last_output is not None
        _, output, version = self._last_output
        return output._version == version and (hidden is output or torch.equal(hidden, output))

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
        self.tokens[name] = self.tokens.get(name, 0) + len(real_tokens(use, self._real))

    def finish(self) -> dict[str, list[InputGroup]]:
        """The input groups of each block, in order of first use; a matrix with no product goes to `block.dense`."""
        groups: dict[str, list[InputGroup]] = {}
        for block in self.blocks:
            for matrix in [matrix for matrix in block.matrices if not self.tokens.get(matrix.name)]:
                self._explain_unused(block, matrix)
            by_name = {matrix.name: matrix for matrix in block.matrices}
            found: dict[tuple[int, ...], InputGroup] = {}
            for name, inputs in self.inputs_seen.items():  # in order of first use
                if name in by_name:
                    group = found.setdefault(tuple(inputs), InputGroup(by_name[name]))
                    group.members.append((by_name[name], self.input_dim[name]))
            groups[block.name] = list(found.values())
        return groups

    def routed(self, padding: Sequence[Tensor | None]) -> frozenset[str]:
        """Matrices that saw fewer tokens than there are."""
        everything = sum(
            hidden.shape[:-1].numel() if real is None else int(real.sum())
            for hidden, real in zip(self.hidden, padding, strict=True)
        )
        return frozenset(name for name, seen in self.tokens.items() if seen < everything)

    def _explain_unused(self, block: Block, matrix: Matrix) -> None:
        """A bare parameter in no product is no matrix of the model (Mamba's A_log); a module's weight must be one."""
        uses = self.other_uses.get(matrix.name, set())
        if products := sorted(use for use in uses if use.rsplit(".", 1)[-1].strip("_") in PRODUCTS):
            raise UnsupportedModelError(
                f"{matrix.name} enters {products[0]} in an unknown form, so its inputs can't be observed: "
                f"leave it dense with --exclude '{matrix.name}'"
            )
        module_weights = {id(module.weight) for module in block.module.modules() if hasattr(module, "weight")}
        if uses and matrix.index is None and id(matrix.parameter) not in module_weights:
            block.matrices.remove(matrix)
            block.dense[matrix.name] = f"enters no matrix product (used by {', '.join(sorted(uses))})"
            return
        raise ValueError(
            f"{matrix.name} saw no calibration token: it entered no matrix product. Use more calibration text, "
            f"or leave it dense with --exclude '{matrix.name}'"
        )
