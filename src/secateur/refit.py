"""Block refit: hold the masks of a pruned block and move its kept weights until its output is the dense model's.

The layer-wise solvers see one matrix at a time, with inputs from before the block's own pruning. What counts is what
leaves the block: on the *pruned* stream of hidden states it should give what the dense block gives on the *dense*
stream, so that errors of earlier blocks are corrected too. That is a local regression on calibration data, without
labels and without the rest of the model (BRECQ, arXiv 2102.05426, and OmniQuant, arXiv 2308.13137, do it for
quantisation; EBFT, arXiv 2402.12419, for pruning).

Shape legend: B sequences, T positions, C channels, R x C a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.capture import Stream
from secateur.model import Block

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class BlockRefit:
    """Adam on the kept weights of a block.

    Args:
        passes: passes over the calibration batches; 0 leaves the weights as the solver gave them.
        rate: Adam's step at its peak, relative to the root mean square of a matrix's kept weights; it rises over the
            first tenth of the steps and falls to zero as a cosine.
        held_out: share of the batches that is never trained on. After each pass they decide which weights are kept,
            the solver's own among them, so a block never ends worse on them than it began.
    """

    passes: int = 4
    rate: float = 0.025
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise ValueError(f"refit passes are {self.passes}; 0 or more are needed")
        if not 0 < self.rate < 1:
            raise ValueError(f"the refit rate is {self.rate:g}; it must lie between 0 and 1 (default 0.025)")
        if not 0 < self.held_out < 1:
            raise ValueError(f"the held-out share is {self.held_out:g}; it must lie between 0 and 1 (default 0.125)")

    def check_batches(self, batches: int) -> None:
        """Raise ValueError unless there are batches to train on and to hold out."""
        if batches < 2:
            raise ValueError(
                f"the block refit needs 2 calibration batches or more, one of them held out, but there is {batches}: "
                f"use more --samples, or --refit none"
            )


def refit_block(
    block: Block, stream: Stream, dense_outputs: Sequence[Tensor], options: BlockRefit, seed: int = 0
) -> dict[str, Any]:
    """Refine a pruned block's kept weights in place; zeros stay zero, and nothing outside the block changes.

    Minimises the mean over tokens of `|f(x_p) - y_d|^2 / |y_d|^2`, x_p the pruned stream's hidden states, y_d the
    dense block's output on the dense stream. Each token counts alike whatever its norm, as it does for the next
    block's normalisation layer. Master weights and Adam's moments are fp32, products run in the model's dtype.

    Args:
        dense_outputs: y_d of every batch.
        seed: fixes which batches are held out and the order of the others.

    Returns:
        `held_out_before`, `held_out_after` (the objective on held-out batches) and `best_pass` (0 = as solved).

    Cost: 3 forward passes of the block a pass over the batches; 16 bytes a weight of the block.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(stream.hidden), generator=generator).tolist()
    num_held_out = min(max(1, round(options.held_out * len(order))), len(order) - 1)
    held_out, trained = order[:num_held_out], order[num_held_out:]
    weights = KeptWeights(block)
    objective = _Objective(block, stream, dense_outputs)
    before = best_loss = objective.mean(held_out)
    best, best_pass = weights.snapshot(), 0
    steps = options.passes * len(trained)
    optimizer = torch.optim.Adam([{"params": [master]} for master in weights.masters], betas=BETAS, fused=True)
    step = 0
    for number in range(1, options.passes + 1):
        for index in torch.randperm(len(trained), generator=generator).tolist():
            for group, scale in zip(optimizer.param_groups, weights.scales, strict=True):
                group["lr"] = options.rate * scale * _schedule(step, steps)
            with weights.trainable(), torch.enable_grad():
                objective(trained[index]).backward()
            weights.collect_gradients()
            optimizer.step()
            weights.write_back()
            step += 1
        loss = objective.mean(held_out)
        if loss < best_loss:
            best, best_loss, best_pass = weights.snapshot(), loss, number
    weights.restore(best)
    return {"held_out_before": before, "held_out_after": best_loss, "best_pass": best_pass}


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a linear rise over a tenth of the steps, then half a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Objective:
    """The objective on one batch of the stream."""

    def __init__(self, block: Block, stream: Stream, dense_outputs: Sequence[Tensor]) -> None:
        self.block, self.stream, self.targets = block, stream, dense_outputs

    def __call__(self, index: int) -> Float[Tensor, ""]:
        call = self.stream.calls[self.block.name][index]
        output = call.replay(self.block, self.stream.hidden[index].clone()).float()
        target = self.targets[index].float()
        error = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        real = self.stream.padding[index]
        return error.mean() if real is None else error[real].mean()

    def mean(self, indices: Sequence[int]) -> float:
        return sum(float(self(index)) for index in indices) / len(indices)


class KeptWeights:
    """fp32 masters of what a refit may move: the kept weights of the block's pruned matrices.

    Norms and biases stay: moving them too was measured to gain nothing.
    """

    def __init__(self, block: Block) -> None:
        self.parameters = list({id(matrix.parameter): matrix.parameter for matrix in block.matrices}.values())
        self.kept = [parameter.data != 0 for parameter in self.parameters]
        self.masters = [parameter.data.float().clone() for parameter in self.parameters]
        self.scales = [
            float((master.square().sum() / kept.sum().clamp_min(1)).sqrt())
            for master, kept in zip(self.masters, self.kept, strict=True)
        ]
        self.module = block.module

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Gradients for these weights alone, whatever the model's owner had asked for."""
        before = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)

    def collect_gradients(self) -> None:
        """Move each parameter's gradient to its master, without what belongs to pruned weights."""
        for parameter, master, kept in zip(self.parameters, self.masters, self.kept, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() * kept
            parameter.grad = None

    def write_back(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data.copy_(master)

    def snapshot(self) -> list[Tensor]:
        return [parameter.data.clone() for parameter in self.parameters]

    def restore(self, snapshot: list[Tensor]) -> None:
        for parameter, saved in zip(self.parameters, snapshot, strict=True):
            parameter.data.copy_(saved)
