"""How far the model's predictions are from the dense model's, as a function of one block's output.

Near the end of a model the error of a block's output says little of the predictions: the final norm and the head look
at few of its directions. There the later blocks, which are still dense, the final norm and the head can be run as they
are (LFQ does it for the last block of a quantised model, ICML 2026).

Shape legend: B sequences, T positions, C channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibration.dense_pass import inputs_of, unlabelled
from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.stream import Batch, Stream
from secateur.models.blocks import Block, ForwardError, body_of, run_without_cache
from secateur.models.determinism import without_gradients
from secateur.models.discovery import BlockChain
from secateur.models.head import (
    ALL,
    body_gives,
    body_output_with,
    has_head,
    kl_divergence,
    logits_of,
    position_chunks,
    takes_positions,
)
from secateur.models.placement import WeightPlacement
from secateur.models.stubs import stubbed
from secateur.reporting.figures import PREDICTIONS
from secateur.runtime import distributed

POSITION_STRIDE = 4  # a step looks at every fourth position of a batch, and each epoch at others


@dataclass(eq=False)
class ModelEnd:
    """What lies behind a block: later blocks, the final norm and the head.

    Args:
        model: the model.
        chain: its only chain; stubs of it change no call.
        batches: this rank's.
        placement: where the weights are.
    """

    model: nn.Module
    chain: BlockChain
    batches: Sequence[Batch]
    placement: WeightPlacement

    @classmethod
    def of(
        cls, model: nn.Module, chains: Sequence[BlockChain], batches: Sequence[Batch], placement: WeightPlacement
    ) -> ModelEnd | None:
        """The end of a model; None where it does not predict a token at every position, or can't be run from a block.

        `batches` are those of all ranks.

        That is: a model without a head, one with several chains (encoder and decoder), or one that hands on more than
        hidden states between its blocks.
        """
        if len(chains) > 1 or chains[0].stub_outputs is None or not has_head(model):
            return None
        own = [batches[number] for number in distributed.shard(len(batches))]
        found = cls(model, chains[0], own, placement)
        return found if found._predicts_tokens() else None

    def _predicts_tokens(self) -> bool:
        """Whether the logits of a sequence are (B, T, V), T the positions of the hidden states."""
        last, stubs = self.chain.blocks[-1], self.chain.stub_outputs
        assert stubs is not None
        with torch.no_grad(), self.behind(last), stubbed(self.chain.blocks, stubs):
            inputs = self._inputs(0)
            output = run_without_cache(self.model, body_of(self.model), **inputs)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                return False
            few = {"logits_to_keep": torch.arange(1, device=hidden.device)} if takes_positions(self.model) else {}
            calls: list[Any] = []  # OPT's head looks at a part of the body, which is not the body's call
            count_calls = body_of(self.model).register_forward_hook(lambda *call: calls.append(call))
            try:
                with count_calls, body_gives(self.model, output):
                    whole = run_without_cache(self.model, self.model, **inputs, **few)
            except ForwardError:  # such as a classifier of sequences, which wants to know their padding
                return False
            if not calls:
                return False
        logits = getattr(whole, "logits", None)
        expected = (len(hidden), 1) if few else hidden.shape[:2]
        return logits is not None and logits.ndim == 3 and logits.shape[:2] == expected

    @contextmanager
    def behind(self, block: Block) -> Iterator[None]:
        """Within this context all that lies behind a block is onloaded, and gathers no gradients of its weights."""
        own = {id(parameter) for parameter in block.module.parameters()}
        others = [each for each in self.model.parameters() if id(each) not in own]
        with without_gradients(others), self.placement.onload_model(self.model, self._until(block)):
            yield

    def _until(self, block: Block) -> Sequence[Block]:
        """The blocks of the chain up to this one."""
        names = [each.name for each in self.chain.blocks]
        return self.chain.blocks[: names.index(block.name) + 1]

    def body_output(self, block: Block, output: Float[Tensor, "B T C"], index: int) -> Any:
        """What the model's body gives where a block gives `output`, on batch `index`. Within `behind`."""
        stubs = self.chain.stub_outputs
        assert stubs is not None
        give_output = block.module.register_forward_hook(lambda _module, _args, _output: stubs[block.name].of(output))
        with give_output, stubbed(self._until(block), stubs):
            return run_without_cache(self.model, body_of(self.model), **self._inputs(index))

    def _inputs(self, index: int) -> Batch:
        """The model's inputs as in the dense pass, without labels."""
        inputs, _ = inputs_of(self.model, self.batches[index])
        return unlabelled(inputs)

    def divergence(
        self, body_output: Any, dense: Float[Tensor, "B T C"], index: int, real: Tensor | None, share: slice = ALL
    ) -> tuple[float, Float[Tensor, "B T C"]]:
        """Mean over tokens of `KL(dense || model)`, and its gradient with respect to the body's hidden states.

        Args:
            body_output: of the model as it is pruned.
            dense: the body's hidden states in the dense model.
            index: of the batch.
            real: real tokens (B, T); None = all are.
            share: the positions that count.

        Returns:
            the mean, and the gradient, which is zero where gradients are off.

        Cost: three products with the head a token; the logits of a chunk of positions are held, three times.
        """
        inputs = self._inputs(index)
        hidden = body_output.last_hidden_state.detach()
        counted = torch.ones(hidden.shape[:2], device=hidden.device) if real is None else real.float()
        total, tokens, gradient = 0.0, 0.0, torch.zeros_like(hidden, dtype=torch.float32)
        leaf = hidden.clone().requires_grad_(torch.is_grad_enabled())
        for positions in position_chunks(self.model, hidden.shape[1], len(hidden), hidden.device, share):
            chosen = positions if takes_positions(self.model) else None
            with torch.no_grad(), body_gives(self.model, body_output_with(body_output, dense)):
                theirs = logits_of(self.model, inputs, chosen).float().log_softmax(-1)
            with body_gives(self.model, body_output_with(body_output, leaf)):
                logits = logits_of(self.model, inputs, chosen)
            ours, weight = logits.detach().float().log_softmax(-1), counted[:, positions]
            total += float((weight * kl_divergence(theirs, ours)).sum())
            tokens += float(weight.sum())
            if logits.requires_grad:  # by the logits of a token, the gradient is q - p
                by_logits = weight[..., None] * (ours.exp() - theirs.exp())
                gradient += torch.autograd.grad(logits, leaf, by_logits.to(logits.dtype))[0]
        return total / max(1.0, tokens), gradient / max(1.0, tokens)


class PredictionDivergence:
    """The loss of a block's refit on one batch: the divergence of the model's predictions from the dense model's.

    The later blocks are dense, so this is what the block's error alone does to the predictions, with that of earlier
    blocks. A gradient looks at a quarter of a batch's positions, at another one in each epoch: the head of a large
    vocabulary costs more than the block. The loss without a gradient, which decides, looks at all.
    """

    name = PREDICTIONS
    loss_scale: float
    rate_factor = 1 / 16  # larger steps made the divergence on validation text rise (SmolLM2, 16k tokens)

    def __init__(self, block: Block, stream: Stream, dense_outputs: HiddenStates, end: ModelEnd) -> None:
        """Keep the dense model's last hidden states.

        Args:
            block: the block.
            stream: in front of it.
            dense_outputs: its outputs on the dense stream.
            end: what lies behind it; within its context.

        Cost: a forward pass of what lies behind the block, without the head.
        """
        self.block, self.stream, self.end = block, stream, end
        self.visits: dict[int, int] = {}  # steps so far on each batch
        with torch.no_grad():
            self.dense = HiddenStates.of(
                (end.body_output(block, output, index).last_hidden_state for index, output in enumerate(dense_outputs)),
                stream.memory,
                len(dense_outputs),
            )
        self.loss_scale = float(self.dense[0].shape[:-1].numel())  # the loss is a mean over tokens

    def __call__(self, index: int) -> Float[Tensor, ""]:
        """The loss on this rank's batch `index`."""
        output = self.stream.calls[self.block.name][index].replay(self.block, self.stream.hidden[index].clone())
        body_output = self.end.body_output(self.block, output, index)
        share = self._share(index)
        value, gradient = self.end.divergence(body_output, self.dense[index], index, self.stream.real[index], share)
        hidden = body_output.last_hidden_state
        surrogate = (hidden.float() * gradient.float()).sum()  # its gradient is known; its value is not wanted
        return value + surrogate - surrogate.detach()

    def _share(self, index: int) -> slice:
        """The positions of a batch that the next call looks at, whatever rank has the batch."""
        if not torch.is_grad_enabled():
            return ALL
        number = index * distributed.world_size() + distributed.rank()
        visits = self.visits[index] = self.visits.get(index, 0) + 1
        return slice((number + visits) % POSITION_STRIDE, None, POSITION_STRIDE)
