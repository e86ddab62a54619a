"""Diagonal Fisher information of each matrix's outputs.

Shape legend: T tokens, R output rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from secateur.calibration.dense_pass import unlabelled
from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.stream import Batch, num_sequences
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import (
    Block,
    BlockCall,
    body_of,
    hidden_of,
    on_device_of,
    run_without_cache,
    with_hidden,
)
from secateur.models.determinism import without_gradients
from secateur.models.head import body_gives, body_output_with, logits_of, position_chunks, takes_positions
from secateur.models.matrices import Matrix
from secateur.models.placement import WeightPlacement
from secateur.models.weight_uses import WeightUse, WeightWatcher
from secateur.numerics.hessian import sum_dtype
from secateur.runtime import distributed
from secateur.runtime.memory import MemoryBudget
from secateur.runtime.progress import Progress

STAGE = "gradients"


def output_fisher_information(
    model: Any,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    sequences: int,
    seed: int,
    placement: WeightPlacement,
    memory: MemoryBudget | None = None,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, " R"]]:
    """Mean over all tokens of `(dL/dy_r)^2` for each output row r of each matrix, by its name.

    L is the log-likelihood of labels drawn from the model's own predictions. So a small change dy of an output moves
    the predictions by a Kullback-Leibler divergence of `E[(g . dy)^2] / 2`, g = dL/dy. A token that an expert does not
    see counts as zero, so rarely used experts weigh little.

    Args:
        model: the dense model.
        blocks: its blocks.
        batches: model inputs, padding allowed; sequences are taken one at a time, by the rank that has their batch.
        sequences: how many are taken.
        seed: of the labels.
        placement: where the weights are.
        memory: where hidden states go; None = they are held in memory.
        progress: called with the stage, the sequences that are done, and their number.

    Raises:
        SecateurError: a matrix that saw none of the sequences, or predictions that are not finite.

    Cost: a forward pass of one sequence, to see how the head is called. Then for each sequence a forward pass of the
    whole model, and one more and a backward pass (no weight gradients) of each block in turn. The activations of one
    block are held at a time, with the hidden states in front of every other. What a block hands to a later one next to
    hidden states (Gemma 3n's shared keys and values) carries no gradient.
    """
    sums, tokens, done = _GradientSquares(), 0, 0
    generator = torch.Generator()
    matrices = [matrix for block in blocks for matrix in block.matrices]
    with without_gradients(model.parameters()), torch.enable_grad():
        own, by_chunks = [*_own_sequences(batches, sequences)], False
        for number, sequence in own:
            if done == 0:
                with placement.onload_model(model), torch.no_grad():
                    by_chunks = _has_head_apart(model, on_device_of(model, sequence))
            generator.manual_seed(seed + number)  # every rank draws the same labels for a sequence
            with (
                placement.onload_model(model),
                _recorded(blocks, HiddenStates(memory or MemoryBudget(), len(blocks))) as record,
            ):
                inputs = on_device_of(model, sequence)
                tokens, done = tokens + _backward_to_last_block(model, inputs, generator, by_chunks), done + 1
            gradient: Tensor | None = None
            for place, (block, call) in reversed([*enumerate(record.calls)]):
                gradient = _sum(gradient, record.gradients.pop(block.name, None))
                with placement.onload_block(block):
                    gradient = _backward(block, record.hidden.pop(place), call, gradient, sums)
            if progress is not None:
                progress(STAGE, done, len(own))
    return _means(sums, matrices, tokens, done)


def _means(
    sums: _GradientSquares, matrices: Sequence[Matrix], tokens: int, done: int
) -> dict[str, Float[Tensor, " R"]]:
    """Means over the tokens of all ranks."""
    totals: dict[str, Tensor] = {}
    for part in distributed.all_gather({name: total.cpu() for name, total in sums.totals.items()}):
        for name, total in part.items():
            totals[name] = totals[name] + total if name in totals else total
    tokens, done = (sum(numbers) for numbers in zip(*distributed.all_gather((tokens, done)), strict=True))
    for matrix in [matrix for matrix in matrices if matrix.index is not None and matrix.name not in totals]:
        # An expert that no token reaches weighs nothing; its rows are as many as those of any other of its kind.
        kind = [each.name for each in matrices if each.parameter is matrix.parameter and each.name in totals]
        if kind:
            totals[matrix.name] = torch.zeros_like(totals[kind[0]])
    if unseen := [matrix.name for matrix in matrices if matrix.name not in totals]:
        raise SecateurError(
            f"{unseen[0]} saw no token of the {done} sequences that the allocation looks at: raise "
            f"‹allocation.tokens›, or use ‹settings.allocation=none›"
        )
    return {name: (total / tokens).float() for name, total in totals.items()}


@dataclass(eq=False)
class _Record:
    """A forward pass block by block.

    Args:
        hidden: hidden states in front of each block.
        calls: how each block was called, in order.
        gradients: gradient of each block's output from what isn't a block (the head), by block.
    """

    hidden: HiddenStates
    calls: list[tuple[Block, BlockCall]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _recorded(blocks: Sequence[Block], hidden_states: HiddenStates) -> Iterator[_Record]:
    """Record the blocks of a forward pass, in order.

    Each block runs without gradients, and its output starts new ones. So whatever else in the model uses the output
    gives a gradient of it.
    """
    record = _Record(hidden_states)

    def begins(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = BlockCall.split(block, args, kwargs)
        record.hidden.append(hidden.detach().clone())  # a block may change its input in place
        record.calls.append((block, call))
        torch.set_grad_enabled(False)

    def ends(block: Block, output: Any) -> Any:
        torch.set_grad_enabled(True)
        begun = hidden_of(output, block).detach().requires_grad_(True)
        begun.register_hook(lambda gradient: record.gradients.update({block.name: gradient}))
        return with_hidden(output, begun)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # restored where a block fails
        for block in blocks:
            before = block.module.register_forward_pre_hook(
                lambda _module, args, kwargs, block=block: begins(block, args, kwargs), with_kwargs=True
            )
            # Before transformers' own hooks, which keep hidden states that a head may use.
            after = block.module.register_forward_hook(
                lambda _module, _args, output, block=block: ends(block, output), prepend=True
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield record


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _backward(
    block: Block, hidden: Tensor, call: BlockCall, gradient: Tensor | None, sums: _GradientSquares
) -> Tensor | None:
    """Gradient of a block's input from that of its output; the gradients of its products are added to `sums`.

    None = nothing behind the block depends on it.
    """
    start = hidden.detach().requires_grad_(True)
    with WeightWatcher(block.matrices, lambda _use: None, sums.watch):
        output = call.replay(block, start.clone())  # a block may change its input in place
    if gradient is not None:
        output.backward(gradient)
    return start.grad


def _backward_to_last_block(model: Any, inputs: Batch, generator: torch.Generator, by_chunks: bool) -> int:
    """Backpropagate the likelihood of drawn labels to the last block's output; returns the number of real tokens.

    `by_chunks` holds the logits of a chunk of positions at a time.
    """
    if not by_chunks:
        logits = _logits(run_without_cache(model, model, **inputs), inputs)
        _nll_of_drawn_labels(logits, generator).backward()
        return len(logits)
    (body_output,) = _body_outputs(model, inputs)
    hidden, tokens = body_output.last_hidden_state, 0
    leaf = hidden.detach().requires_grad_(True)
    inputs = unlabelled(inputs)
    real = _real_tokens(inputs, hidden.shape[1])
    for positions in position_chunks(model, hidden.shape[1], 1, hidden.device):
        with body_gives(model, body_output_with(body_output, leaf)):
            logits = logits_of(model, inputs, positions)[0]
        own = logits if real is None else logits[real[positions]]
        _nll_of_drawn_labels(own, generator).backward()
        tokens += len(own)
    if not hidden.requires_grad:
        raise UnsupportedModelError(
            "the model's output has no gradient with respect to its last block, which the curve allocation needs: use "
            "‹recipe=fast›, or ‹settings.allocation=none›"
        )
    hidden.backward(leaf.grad)
    return tokens


def _has_head_apart(model: Any, inputs: Batch) -> bool:
    """Whether logits of chosen positions can be formed from what the model's body gives. OPT runs a part of it only."""
    if not takes_positions(model):
        return False
    found = _body_outputs(model, inputs)
    return len(found) == 1 and getattr(found[0], "last_hidden_state", None) is not None


def _body_outputs(model: Any, inputs: Batch) -> list[Any]:
    """What the body gives each time that a forward pass of the whole model runs it."""
    found: list[Any] = []
    with body_of(model).register_forward_hook(lambda _module, _args, output: found.append(output)):
        run_without_cache(model, model, **unlabelled(inputs), logits_to_keep=1)  # the head is run on chunks later
    return found


def _nll_of_drawn_labels(logits: Float[Tensor, "T V"], generator: torch.Generator) -> Float[Tensor, ""]:
    """Negative log-likelihood of labels that are drawn from the predictions.

    Raises:
        SecateurError: the predictions are not finite.
    """
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise SecateurError("the dense model's predictions are not finite: try another dtype")
    if not len(logits):  # of padding alone
        return logits.sum()
    labels = draw_labels(logits.detach().softmax(-1).cpu(), generator).to(logits.device)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def draw_labels(probabilities: Float[Tensor, "T V"], generator: torch.Generator) -> Int[Tensor, " T"]:
    """A label for each row of probabilities, by inverse sampling; one of probability zero is never drawn.

    It takes one random number a row. `torch.multinomial` takes V, which is slow for large vocabularies.
    """
    sums = probabilities.cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]  # below the last sum, even when rounded
    return torch.searchsorted(sums, drawn, right=True)[:, 0]


def _logits(output: Any, inputs: Batch) -> Float[Tensor, "T V"]:
    """Logits of the model at the real tokens of one sequence; one row for a picture or a classified text.

    Raises:
        SecateurError: the model has no logits.
    """
    if getattr(output, "logits", None) is None:
        raise SecateurError(
            f"allocation curve weighs matrices by their effect on the model's predictions, and the model gives no "
            f"logits (its output is {type(output).__name__}): use ‹settings.allocation=none›"
        )
    if output.logits.ndim == 2:
        return output.logits
    if output.logits.ndim > 3:
        raise SecateurError(
            f"allocation curve weighs matrices by their effect on the model's predictions, and the model gives logits "
            f"of shape {tuple(output.logits.shape)}, not a row for each token or sequence: use "
            f"‹settings.allocation=none›"
        )
    logits = output.logits[0]
    real = _real_tokens(inputs, len(logits))
    return logits if real is None else logits[real]


def _real_tokens(inputs: Batch, length: int) -> Bool[Tensor, " T"] | None:
    """Which positions of a sequence are not padding; None = all, or the mask is of something else."""
    of_decoder = any(name.startswith("decoder_") for name in inputs)
    mask = inputs.get("decoder_attention_mask" if of_decoder else "attention_mask")
    return None if mask is None or len(mask[0]) != length else mask[0].bool()


def _own_sequences(batches: Sequence[Batch], sequences: int) -> Iterator[tuple[int, Batch]]:
    """This rank's part of the first sequences of all batches, each as a batch of one, numbered."""
    dealt = distributed.shard(len(batches))
    number = 0
    for index, batch in enumerate(batches):
        rows = num_sequences(batch)
        for row in range(rows):
            if number == sequences:
                return
            if index in dealt:
                yield number, batch if rows == 1 else {name: value[row : row + 1] for name, value in batch.items()}
            number += 1


class _GradientSquares:
    """Sums squared gradients of products over tokens, row by row.

    Attributes:
        totals: sums by matrix (R).
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def watch(self, use: WeightUse, output: Tensor) -> None:
        """Add the squared gradient of a product's output once it is known."""
        name = use.matrix.name
        rows = output.shape[-2 if use.output_is_transposed else -1]
        self.totals.setdefault(name, torch.zeros(rows, dtype=sum_dtype(output.device), device=output.device))
        if not output.requires_grad:  # it does not depend on hidden states
            return

        def add(gradient: Tensor) -> None:
            gradient = gradient if use.item is None else gradient[use.item]
            by_row = (gradient.mT if use.output_is_transposed else gradient).float().flatten(0, -2)
            self.totals[name] += by_row.square().sum(0)

        output.register_hook(add)
