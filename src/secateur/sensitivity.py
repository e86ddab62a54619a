"""What the model's predictions feel of a small change of a matrix's outputs: diagonal Fisher information.

Shape legend: T tokens, R output rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.capture import Batch
from secateur.model import Block, Call
from secateur.observe import Use, WeightWatcher


def output_sensitivity(
    model: Any, blocks: Sequence[Block], batches: Sequence[Batch], windows: int, seed: int
) -> dict[str, Float[Tensor, " R"]]:
    """The mean over tokens of `(dL/dy_r)^2` for each output row r of each matrix, by its name.

    L is the log-likelihood of labels drawn from the model's own predictions, so that a small change dy of an output
    moves the predictions by a Kullback-Leibler divergence of `E[(g . dy)^2] / 2`, g = dL/dy.

    Args:
        batches: model inputs, padding allowed; sequences are taken one at a time.
        windows: how many sequences.
        seed: of the labels.

    Cost: a forward and a backward pass of the whole model (no weight gradients) for each sequence.
    """
    sums = _GradientSquares()
    generator = torch.Generator().manual_seed(seed)
    matrices = [matrix for block in blocks for matrix in block.matrices]
    extra = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    with _activation_gradients(model, blocks[0]), torch.enable_grad():
        for sequence in _sequences(batches, windows):
            inputs = {name: value.to(next(model.parameters()).device) for name, value in sequence.items()}
            with WeightWatcher(matrices, lambda _use: None, sums.watch):
                logits = model(**inputs, **extra).logits[0].float()
            real = inputs.get("attention_mask")
            logits = logits if real is None else logits[real[0].bool()]
            odds = logits.detach().softmax(-1).cpu()
            labels = torch.multinomial(odds, 1, generator=generator)[:, 0].to(logits.device)
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return {name: total / sums.tokens[name] for name, total in sums.totals.items()}


def _sequences(batches: Sequence[Batch], windows: int) -> Iterator[Batch]:
    """The first sequences of the batches, each as a batch of one."""
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            if windows == 0:
                return
            windows -= 1
            yield {name: value[row : row + 1] for name, value in batch.items()}


class _GradientSquares:
    """Sums squared gradients of products over tokens, row by row."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def watch(self, use: Use, output: Tensor) -> None:
        """Note a product's output; its gradient is added when it is known."""
        name = use.matrix.name

        def add(gradient: Tensor) -> None:
            by_row = (gradient.mT if use.output_is_transposed else gradient).float().flatten(0, -2)
            squares = by_row.square().sum(0)
            self.totals[name] = self.totals[name] + squares if name in self.totals else squares
            self.tokens[name] = self.tokens.get(name, 0) + len(by_row)

        output.register_hook(add)


@contextmanager
def _activation_gradients(model: nn.Module, first: Block) -> Iterator[None]:
    """Gradients begin at the hidden states in front of the first block; no weight gets one."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = Call.split(args, kwargs)
        return call.with_hidden(hidden.detach().requires_grad_(True))

    hook = first.module.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for parameter in required:
            parameter.requires_grad_(True)
