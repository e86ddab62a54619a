"""Block refit: hold the masks of a pruned block and move its kept weights until its output is near the dense model's.

The layer-wise solvers see one matrix at a time, with inputs from before the block's own pruning. What counts is what
leaves the block: on the *pruned* stream of hidden states it should give what the dense block gives on the *dense*
stream, so that errors of earlier blocks are corrected too. That is a local regression on calibration data, without
labels and without the rest of the model (BRECQ, arXiv 2102.05426, and OmniQuant, arXiv 2308.13137, do it for
quantisation; EBFT, arXiv 2402.12419, for pruning).

Errors of earlier blocks are in part beyond correction, and a refit that tries all the same fits the calibration text
and little else. So it aims between that and what the dense block gives on the pruned stream.

Shape legend: B sequences, T positions, C channels, R x C a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur import parallel
from secateur.capture import Stream
from secateur.memory import HiddenStates
from secateur.model import Block

BETAS = (0.9, 0.95)
ATTEMPTS, NEXT_RATE = 3, 0.25  # where no pass is better on held-out batches than the weights as solved
HOPELESS = 1.05  # a first pass that ends above this times their error: a lower rate ended better, as measured
ADAM_EPS = 1e-16  # far below any gradient: steps must not depend on the scale of the hidden states


@dataclass(frozen=True)
class BlockRefit:
    """Adam on the kept weights of a block.

    Args:
        passes: passes over the calibration batches; 0 leaves the weights as the solver gave them.
        rate: Adam's step at its peak, relative to the root mean square of a matrix's kept weights; it rises over the
            first tenth of the steps and falls to zero as a cosine. Where no pass helps, or the first one ends far
            off, a quarter of it is tried, and a sixteenth.
        held_out: share of the batches that is never trained on. After each pass they decide which weights are kept,
            the solver's own among them, so a block never ends worse on them than it began.
        step_tokens: tokens of the texts behind each step, in whole windows, at least one; the caller's own batches are
            taken as they are.
        strength: from 0, the dense block on the pruned stream, to 1, the dense block on the dense stream, how far the
            target goes in correcting the errors of earlier blocks.
    """

    passes: int = 4
    rate: float = 0.025
    held_out: float = 0.0625
    step_tokens: int = 512
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise ValueError(f"refit passes are {self.passes}; 0 or more are needed")
        if not 0 < self.rate < 1:
            raise ValueError(f"the refit rate is {self.rate:g}; it must lie between 0 and 1 (default 0.025)")
        if not 0 < self.held_out < 1:
            raise ValueError(f"the held-out share is {self.held_out:g}; it must lie between 0 and 1 (default 0.0625)")
        if self.step_tokens < 1:
            raise ValueError(f"the refit's tokens a step are {self.step_tokens}; at least 1 is needed (default 512)")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"the refit strength is {self.strength:g}; it must lie between 0 and 1 (default 1)")

    def check_batches(self, batches: int) -> None:
        """Raise ValueError unless there are batches to train on and to hold out."""
        if batches < 2:
            raise ValueError(
                f"the block refit needs 2 calibration batches or more, one of them held out, but there is {batches}: "
                f"use more --samples (split token tensors into several), or --refit none"
            )


def refit_targets(block: Block, stream: Stream, dense_outputs: HiddenStates, strength: float) -> HiddenStates:
    """What a block is refit to, batch by batch: `y = s y_d + (1 - s) f(x_p)`, f the block while it is dense.

    Args:
        dense_outputs: y_d, what it gives on the dense stream.

    Cost: one forward pass of the block over the batches, where s < 1.
    """
    if strength == 1:
        return dense_outputs
    calls = zip(stream.calls[block.name], stream.hidden, strict=True)
    pruned_outputs = (call.replay(block, hidden.clone()) for call, hidden in calls)
    pairs = zip(dense_outputs, pruned_outputs, strict=True)
    blends = (pruned.float().lerp(dense.float(), strength).to(dense.dtype) for dense, pruned in pairs)
    return HiddenStates.of(blends, stream.memory, len(dense_outputs))


def refit_block(
    block: Block,
    stream: Stream,
    targets: Sequence[Tensor],
    options: BlockRefit,
    seed: int = 0,
    storage_of: Callable[[str, torch.dtype], torch.dtype] = lambda _name, own: own,
) -> dict[str, Any]:
    """Refine a pruned block's kept weights in place; zeros stay zero, and nothing outside the block changes.

    Minimises the mean over tokens of `|f(x_p) - y|^2 / |y|^2`, x_p the pruned stream's hidden states, y the target.
    Each token counts alike whatever its norm, as it does for the next block's normalisation layer. Master weights and
    Adam's moments are fp32, products run in the model's dtype.

    Where several processes share the batches, each step's gradient comes from the one that has its batch, and all take
    the step: the steps, and so the bits, are those of one process. They come one after another, so this divides work
    and memory but not the time.

    Args:
        targets: y of every batch (`refit_targets`).
        seed: fixes which batches are held out and the order of the others.
        storage_of: from a matrix's name and its own dtype to the one it is saved in; every weight that is tried is
            rounded to it, so that what the held-out batches choose is what is saved.

    Returns:
        `held_out_before`, `held_out_after` (the objective on held-out batches), `best_pass` (0 = as solved) and
        `rate`, which that pass, or the last attempt, was made at.

    Cost: 3 forward passes of the block a pass over the batches, up to three times where none helps; about 30 bytes a
    weight of the block (fp32 master, gradients, Adam's moments, the best weights so far), and the activations of one
    batch.
    """
    generator = torch.Generator().manual_seed(seed)
    objective = _Objective(block, stream, targets)
    order = torch.randperm(objective.batches, generator=generator).tolist()
    num_held_out = min(max(1, round(options.held_out * len(order))), len(order) - 1)
    held_out, trained = order[:num_held_out], order[num_held_out:]
    weights = KeptWeights(block, storage_of)
    as_solved, before = weights.snapshot(), objective.mean(held_out)
    best = _Best(as_solved, before)
    rate = options.rate
    for rate in (options.rate * NEXT_RATE**attempt for attempt in range(ATTEMPTS)):
        best = _descend(weights, objective, trained, held_out, options.passes, rate, generator, best)
        if best.number > 0:
            break
        weights.begin_again(as_solved)
    weights.restore(best.weights)
    return {"held_out_before": before, "held_out_after": best.loss, "best_pass": best.number, "rate": rate}


@dataclass(frozen=True)
class _Best:
    """The weights that did best on the held-out batches so far, and the pass they are from (0 = as solved)."""

    weights: list[Tensor]
    loss: float
    number: int = 0


def _descend(
    weights: KeptWeights,
    objective: _Objective,
    trained: Sequence[int],
    held_out: Sequence[int],
    passes: int,
    rate: float,
    generator: torch.Generator,
    best: _Best,
) -> _Best:
    """Adam over the trained batches from the weights as solved, to no further than a hopeless first pass; the best
    weights of all passes, or what was known."""
    groups = [{"params": [master]} for master in weights.masters]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=ADAM_EPS, fused=True)
    steps, step = passes * len(trained), 0
    for number in range(1, passes + 1):
        for index in torch.randperm(len(trained), generator=generator).tolist():
            for group, scale in zip(optimizer.param_groups, weights.scales, strict=True):
                group["lr"] = rate * scale * _schedule(step, steps)
            with weights.trainable(), torch.enable_grad():
                if objective.has(trained[index]):
                    (objective.gradient_scale * objective(trained[index])).backward()
                weights.collect_gradients(objective.owner(trained[index]))
            optimizer.step()
            weights.write_back()
            step += 1
        loss = objective.mean(held_out)
        if loss < best.loss:
            best = _Best(weights.snapshot(), loss, number)
        elif number == 1 and loss > HOPELESS * best.loss:
            break
    return best


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a linear rise over a tenth of the steps, then half a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Objective:
    """The objective on one batch, by its number among those of all processes.

    `gradient_scale` (tokens x norm of a target) brings the gradient of the output near 1, since the plain one, of the
    size `error / (|y|^2 T)`, underflows in fp16. Adam's steps don't depend on it.
    """

    def __init__(self, block: Block, stream: Stream, targets: Sequence[Tensor]) -> None:
        self.block, self.stream, self.targets = block, stream, targets
        norms = targets[0].float().norm(dim=-1)
        self.gradient_scale = parallel.from_first(float(norms.mean()) * norms.numel())
        self.batches = sum(parallel.gather(len(stream.hidden)))

    def owner(self, number: int) -> int:
        """The process that has a batch."""
        return number % parallel.size()

    def has(self, number: int) -> bool:
        """Whether this process has a batch."""
        return self.owner(number) == parallel.rank()

    def __call__(self, number: int) -> Float[Tensor, ""]:
        index = number // parallel.size()
        call = self.stream.calls[self.block.name][index]
        output = call.replay(self.block, self.stream.hidden[index].clone()).float()
        target = self.targets[index].float()
        error = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        real = self.stream.padding[index]
        return error.mean() if real is None else error[real].mean()

    def mean(self, numbers: Sequence[int]) -> float:
        losses = parallel.gather_items({number: float(self(number)) for number in numbers if self.has(number)})
        return sum(losses[number] for number in numbers) / len(numbers)


class KeptWeights:
    """fp32 masters of what a refit may move: the kept weights of the block's pruned matrices.

    Norms and biases stay: moving them too was measured to gain nothing.
    """

    def __init__(self, block: Block, storage_of: Callable[[str, torch.dtype], torch.dtype]) -> None:
        self.parameters = list({id(matrix.parameter): matrix.parameter for matrix in block.matrices}.values())
        self.kept = [_kept(block, parameter) for parameter in self.parameters]
        names = {id(matrix.parameter): matrix.name for matrix in block.matrices}
        self.storage = [storage_of(names[id(parameter)], parameter.dtype) for parameter in self.parameters]
        self.masters = [parameter.data.float().clone() for parameter in self.parameters]
        self.scales = [
            float(((master * kept).square().sum() / kept.sum().clamp_min(1)).sqrt())
            for master, kept in zip(self.masters, self.kept, strict=True)
        ]
        self.module = block.module

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Gradients for these weights alone; what the owner had asked for, and has accumulated, is given back."""
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.module.parameters()]
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

    def collect_gradients(self, owner: int) -> None:
        """Move each parameter's gradient, of the process `owner`, to its master, without that of pruned weights."""
        for parameter, master, kept in zip(self.parameters, self.masters, self.kept, strict=True):
            # An expert that no token of the batch reached has no gradient.
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float() * kept
            parallel.send(master.grad, owner)

    def write_back(self) -> None:
        """Show the masters to the model as they would be saved."""
        for parameter, master, storage in zip(self.parameters, self.masters, self.storage, strict=True):
            parameter.data.copy_(master.to(storage))

    def snapshot(self) -> list[Tensor]:
        return [parameter.data.clone() for parameter in self.parameters]

    def begin_again(self, snapshot: list[Tensor]) -> None:
        """Masters and parameters from a snapshot."""
        self.restore(snapshot)
        for master, saved in zip(self.masters, snapshot, strict=True):
            master.copy_(saved)

    def restore(self, snapshot: list[Tensor]) -> None:
        for parameter, saved in zip(self.parameters, snapshot, strict=True):
            parameter.data.copy_(saved)


def _kept(block: Block, parameter: nn.Parameter) -> Bool[Tensor, ...]:
    """Where a parameter may move: the non-zero weights of its matrices that are pruned; other experts stay."""
    kept = torch.zeros_like(parameter, dtype=torch.bool)
    for matrix in block.matrices:
        if matrix.parameter is parameter:
            place = kept if matrix.index is None else kept[matrix.index]
            place.copy_(matrix.stored != 0)
    return kept
