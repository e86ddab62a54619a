"""The dense pass: everything about a model and its inputs that does not depend on pruning.

How each block is called, which matrices take part in products, which of them share an input. It changes nothing, so
what is wrong with a model or a text is found before any weight is changed.

The model runs once a batch with its blocks stubbed: each returns its input and records its call. Then the blocks run
one by one, each on all batches, so a block is onloaded once. Where blocks hand on more than hidden states, stubs would
change the calls of later blocks, and the whole model runs instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.input_groups import Observations, observed_block, routed_matrices
from secateur.calibration.stream import Batch, Stream, real_tokens
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import (
    Block,
    BlockCall,
    body_of,
    forward_errors,
    hidden_of,
    on_device_of,
    parts_of,
    run_without_cache,
    same_tensor,
    without_cache,
)
from secateur.models.discovery import BlockChain
from secateur.models.placement import InMemory, WeightPlacement
from secateur.models.stubs import stubbed
from secateur.models.weight_uses import WeightUse, WeightWatcher
from secateur.numerics.damping import DEFAULT_DAMPING, Damping
from secateur.runtime import distributed
from secateur.runtime.memory import MemoryBudget
from secateur.runtime.progress import Progress


@dataclass(frozen=True, eq=False)
class DensePass:
    """What the dense pass found.

    Args:
        stream: the stream in front of the first block.
        blocks: the chain's blocks, without matrices that turned out to stay dense.
        missed: matrices that should be pruned but can't be observed, with the error of each.
    """

    stream: Stream
    blocks: list[Block]
    missed: dict[str, SecateurError]

    def check_none_missed(self) -> None:
        """Raise the error of the first matrix that was missed, if any."""
        for error in self.missed.values():
            raise error


@torch.no_grad()
def run_dense_pass(
    model: nn.Module,
    chain: BlockChain,
    batches: Sequence[Batch],
    progress: Progress,
    placement: WeightPlacement | None = None,
    memory: MemoryBudget | None = None,
    damping: Damping = DEFAULT_DAMPING,
) -> DensePass:
    """Run the dense model over this rank's calibration batches and record how a chain's blocks are called.

    Args:
        model: the model.
        chain: the blocks to record.
        batches: of all ranks.
        progress: called with the stage, what is done, and the total.
        placement: where the weights are; None = in memory.
        memory: where hidden states go; None = they are held in memory.
        damping: of the stream's Hessians.

    Raises:
        UnsupportedModelError: blocks that are skipped, run twice, or are not called one after another.
        SecateurError: NaN or infinity in an activation.

    Cost: one forward of each block on all batches, and of the rest of the model once a batch.
    """
    placement, memory = placement or InMemory(), memory or MemoryBudget()
    own = [batches[number] for number in distributed.shard(len(batches))]
    stubs = chain.stub_outputs
    calls = _CallRecorder(chain.blocks, HiddenStates(memory, len(own)), hands_on=stubs is None)
    uses = _UseRecorder(chain.blocks)
    with without_cache(model), calls.recording(), ExitStack() as stack:
        if stubs is not None:
            stack.enter_context(placement.onload_model(body_of(model), chain.blocks))
            stack.enter_context(stubbed(chain.blocks, stubs))
        else:
            part = placement.onload_block(chain.blocks[0]) if chain.whole else placement.onload_model(body_of(model))
            stack.enter_context(part)
            stack.enter_context(uses.recording(chain.blocks))
        for number, batch in enumerate(own, 1):
            _run_batch(model, batch, calls, uses)
            if stubs is None:
                progress("dense pass", number, len(own))
    if stubs is not None:
        _run_blocks(chain.blocks, calls, uses, placement, progress)
    return _put_together(chain.blocks, calls, uses.seen.of_all_ranks(), memory, damping)


def _run_batch(model: nn.Module, batch: Batch, calls: _CallRecorder, uses: _UseRecorder) -> None:
    inputs, uses.real = inputs_of(model, batch)
    with calls.one_pass(uses.real):
        run_without_cache(model, body_of(model), **inputs)


def inputs_of(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor | None]:
    """A batch on the model's device, without an attention mask that leaves nothing out; and its real tokens.

    Raises:
        UnsupportedModelError: padding next to decoder inputs.
    """
    inputs = on_device_of(model, batch)
    real = _real_positions(inputs)
    if real is None:
        inputs.pop("attention_mask", None)
    return inputs, real


def unlabelled(batch: Batch) -> Batch:
    """Inputs without labels: a loss of them needs the logits of all positions at once."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _run_blocks(
    blocks: Sequence[Block],
    recorded: _CallRecorder,
    uses: _UseRecorder,
    placement: WeightPlacement,
    progress: Progress,
) -> None:
    """Run the blocks one by one, each on all batches, and record the uses of their matrices."""
    hidden = recorded.hidden.copy()
    for number, block in enumerate(blocks, 1):
        with placement.onload_block(block), uses.recording([block]):
            for index, call in enumerate(recorded.calls[block.name]):
                uses.real = recorded.real[index]
                with forward_errors(block.module):
                    hidden[index] = call.replay(block, hidden[index].clone())
        progress("dense pass", number, len(blocks))


def _put_together(
    blocks: Sequence[Block], calls: _CallRecorder, seen: Observations, memory: MemoryBudget, damping: Damping
) -> DensePass:
    observed = [observed_block(block, seen) for block in blocks]
    found = [each.block for each in observed]
    num_tokens = sum(distributed.all_gather(_num_real_tokens(calls.hidden, calls.real)))
    stream = Stream(
        calls.hidden,
        calls.calls,
        calls.real,
        {each.block.name: each.groups for each in observed},
        routed_matrices(found, seen, num_tokens),
        memory=memory,
        damping=damping,
        num_tokens=num_tokens,
    )
    return DensePass(stream, found, {name: error for each in observed for name, error in each.missed.items()})


def _num_real_tokens(hidden: Sequence[Tensor], real: Sequence[Tensor | None]) -> int:
    return sum(
        (each.shape[:-1] if each.is_floating_point() else each.shape).numel() if mask is None else int(mask.sum())
        for each, mask in zip(hidden, real, strict=True)
    )


def _real_positions(batch: Batch) -> Tensor | None:
    """The batch's attention mask; None where all tokens are real.

    Raises:
        UnsupportedModelError: padding next to decoder inputs, where one mask doesn't tell both sides' tokens.
    """
    masks = {name: value for name, value in batch.items() if name.endswith("attention_mask") and not bool(value.all())}
    if masks and any(name.startswith("decoder_") for name in batch):
        raise UnsupportedModelError(
            f"{' and '.join(masks)} leaves tokens out next to decoder inputs: pass encoder-decoders sequences of equal "
            f"length, without padding"
        )
    mask = masks.get("attention_mask")
    return None if mask is None else mask.bool()


@dataclass(eq=False)
class _Pass:
    """One forward pass of the model.

    Args:
        real: its real tokens.
        last_output: the hidden states that the last block gave, with its name and their version.
        num_calls: how often each block ran.
        given: tensors that blocks gave, by id: each with the block and the place in its output. They are not held:
            attention weights would take too much memory.
    """

    real: Tensor | None
    last_output: tuple[str, Tensor, int] | None = None
    num_calls: Counter[str] = field(default_factory=Counter)
    given: dict[int, tuple[ref[Tensor], tuple[str, Any]]] = field(default_factory=dict)

    def origin(self, value: Any) -> tuple[str, Any] | None:
        """The block that gave a tensor, and the place in its output; None where no block did."""
        tensor, origin = self.given.get(id(value), (None, None))
        return origin if tensor is not None and tensor() is value else None


class _CallRecorder:
    """Records how the blocks are called, batch by batch, and checks that they run one after another.

    Where blocks may hand on more than hidden states, it records which arguments earlier blocks returned.
    """

    def __init__(self, blocks: Sequence[Block], hidden: HiddenStates, hands_on: bool) -> None:
        self.blocks, self.hidden, self.hands_on = blocks, hidden, hands_on
        self.calls: dict[str, list[BlockCall]] = {block.name: [] for block in blocks}
        self.real: list[Tensor | None] = []
        self._pass = _Pass(None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record forward passes of the model, each within `one_pass`."""
        with ExitStack() as stack:
            for block in self.blocks:
                module = block.module
                stack.callback(module.register_forward_pre_hook(self._before(block), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after(block)).remove)
            yield

    @contextmanager
    def one_pass(self, real: Tensor | None) -> Iterator[None]:
        """Take what runs within this context for one forward pass of the model."""
        self._pass = _Pass(real)
        self.real.append(real)
        yield
        calls = self._pass.num_calls
        if odd := [name for name in self.calls if calls[name] != 1]:
            raise UnsupportedModelError(
                f"each block must run once a forward pass; {odd[0]} ran {calls[odd[0]]} times in one"
            )

    def _before(self, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = BlockCall.split(block, args, kwargs)
            self._pass.num_calls[block.name] += 1
            last = self._pass.last_output
            if last is None:
                if block is not self.blocks[0]:
                    raise UnsupportedModelError(
                        f"{block.name} runs before {self.blocks[0].name}: blocks must run in order"
                    )
                self._check_padding(block, hidden)
                self.hidden.append(hidden.detach().clone())
            elif not same_tensor(hidden, *last[1:]):
                raise UnsupportedModelError(
                    f"the input of {block.name} is not the output of {last[0]} on all calibration inputs: the model "
                    f"changes hidden states between its blocks, which a replay block by block would miss"
                )
            origins = {place: self._pass.origin(each) for place, each in call.arguments().items()}
            handed = {place: origin for place, origin in origins.items() if origin is not None}
            self.calls[block.name].append(replace(call, handed=handed))

        return hook

    def _check_padding(self, block: Block, hidden: Tensor) -> None:
        """Check that the attention mask is that of the block's positions (a decoder's may be the encoder's)."""
        real = self._pass.real
        if real is not None and tuple(hidden.shape[: real.ndim]) != tuple(real.shape):
            raise UnsupportedModelError(
                f"the attention mask {tuple(real.shape)} doesn't fit the positions in front of {block.name}, whose "
                f"hidden states are {tuple(hidden.shape)}: pass sequences of equal length, without padding"
            )

    def _after(self, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = hidden_of(output, block)
            self._pass.last_output = (block.name, hidden, hidden._version)
            if self.hands_on:
                tensors = {place: each for place, each in parts_of(output).items() if isinstance(each, Tensor)}
                self._pass.given |= {id(each): (ref(each), (block.name, place)) for place, each in tensors.items()}

        return hook


class _UseRecorder:
    """Records the uses of the matrices of blocks while these run.

    Attributes:
        seen: what was recorded.
        real: real tokens of the batch that runs; None = all are.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.seen = Observations()
        self.real: Tensor | None = None
        self._places = {
            id(module): (block.name, path) for block in blocks for path, module in block.module.named_modules()
        }
        self._inputs: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._num_inputs = 0

    @contextmanager
    def recording(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Record whatever runs of these blocks within this context."""
        watcher = WeightWatcher([], self._on_matmul)  # looks for a block's matrices when that begins to run
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            for block in blocks:
                module = block.module
                stack.callback(module.register_forward_pre_hook(self._before(block, watcher)).remove)
                stack.callback(module.register_forward_hook(self._after(block, watcher)).remove)
            stack.enter_context(watcher)
            yield
        self._inputs.clear()
        _add_sets(self.seen.other_uses, watcher.other_uses)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if id(module) in self._places:
            self.seen.entered.add(self._places[id(module)])

    def _before(self, block: Block, watcher: WeightWatcher) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            watcher.look_for(block.matrices)
            self._inputs.clear()

        return hook

    def _after(self, block: Block, watcher: WeightWatcher) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            watcher.look_for([])  # copies of its weights may go, and their addresses to others
            hidden = hidden_of(output, block)
            real = hidden if self.real is None else hidden[self.real]
            if not bool(torch.isfinite(real).all()):
                raise SecateurError(
                    f"{block.name} gives NaN or infinite activations in the dense model: try another dtype"
                )

        return hook

    def _on_matmul(self, use: WeightUse) -> None:
        name, x, seen = use.matrix.name, use.inputs, self.seen
        if seen.input_dim.setdefault(name, use.input_dim) != use.input_dim:
            raise UnsupportedModelError(f"{name} is used both as stored and transposed: it has no single input")
        key = (x.data_ptr(), x.dtype, x._version, *_layout(x))
        if key not in self._inputs:  # the tensor is kept, so its address is not given to another
            self._num_inputs += 1
            self._inputs[key] = (x, self._num_inputs)
        seen.inputs.setdefault(name, []).append(self._inputs[key][1])
        seen.tokens[name] = seen.tokens.get(name, 0) + len(real_tokens(use, self.real))
        if use.is_sent:
            seen.sent.add(name)


def _layout(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of a tensor, the same for (B, T, C) and (B * T, C) of one memory."""
    merged: list[tuple[int, int]] = []
    for size, stride in sorted(zip(x.shape[:-1], x.stride()[:-1], strict=True), key=lambda each: -each[1]):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return [*merged, (x.shape[-1], x.stride()[-1])]


def _add_sets(target: dict[str, set[str]], more: Mapping[str, set[str]]) -> None:
    for name, values in more.items():
        target.setdefault(name, set()).update(values)
