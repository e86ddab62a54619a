"""Block refit: hold the masks of a pruned block and move its kept weights until its output is near the dense model's.

Solvers see one matrix at a time, with inputs from before the block's pruning. What counts is the block's output: on the
pruned stream of hidden states it should be what the dense block gives on the dense stream, which also corrects errors
of earlier blocks. That is a local regression on calibration data, without labels and without the rest of the model
(BRECQ, arXiv 2102.05426, and OmniQuant, arXiv 2308.13137, do it for quantisation; EBFT, arXiv 2402.12419, for pruning).

Errors of earlier blocks can't be corrected in full, and a refit that tries overfits the calibration text. So the target
lies between the dense stream's outputs and what the dense block gives on the pruned stream (`strength`).

The learning rate rises over the first tenth of the steps and falls to zero as a cosine. Where no epoch helps on the
validation batches, half and a quarter of the way are tried. Where they don't help either, or the first epoch ends far
off, a quarter of the rate is tried, and then a sixteenth. The weights as solved are always a candidate, so a block
never ends worse on the validation batches than it began.

Shape legend: B sequences, T positions, C channels, R x C a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.stream import Stream
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import Block
from secateur.numerics.int8 import coarser, nearest_int8
from secateur.pruning.context import RunContext, StorageOf, keep_dtype
from secateur.recipe.steps import BlockRefit
from secateur.reporting.figures import OUTPUT_ERROR
from secateur.runtime import distributed

BETAS = (0.9, 0.95)
ATTEMPTS, NEXT_RATE = 3, 0.25
# Stop if the loss after epoch 1 exceeds this multiple of the best: a lower rate was then better.
STOP_AFTER_FIRST = 1.05
STEPS_BACK = (0.5, 0.25)  # of the way from the weights as solved to those of a last step that went too far
Int8Matrices = Sequence[tuple[Tensor, torch.dtype]]  # as (outputs, inputs), and the dtype that holds the rounded ones
ADAM_EPS = 1e-16  # far below any gradient: steps must not depend on the scale of the hidden states


def check_batches(batches: int) -> None:
    """Check that there are batches to train on and to validate on.

    Raises:
        SecateurError: there are fewer than two.
    """
    if batches < 2:
        raise SecateurError(
            f"the block refit needs 2 calibration batches or more, one of them for validation, but there is {batches}: "
            f"use more ‹samples› (split token tensors into several), or ‹settings.refit=none›"
        )


def refit_targets(on_pruned: HiddenStates, on_dense: HiddenStates, strength: float) -> HiddenStates:
    """Targets of a block's refit, batch by batch: `y = s y_d + (1 - s) f(x_p)`, f the block while it is dense.

    Args:
        on_pruned: f(x_p), its outputs on the pruned stream. The targets take their place, for memory's sake.
        on_dense: y_d, its outputs on the dense stream.
        strength: s.
    """
    for index, (pruned, dense) in enumerate(zip(on_pruned, on_dense, strict=True)):
        on_pruned[index] = pruned.float().lerp(dense.float(), strength).to(dense.dtype)
    return on_pruned


def int8_matrices_of(block: Block, stream: Stream, context: RunContext) -> Int8Matrices:
    """The matrices of a block that is saved in 8 bits; else none."""
    if context.recipe.values != "int8":
        return []
    members = [member for group in stream.groups[block.name] for member in group.members]
    views = [(matrix.name, matrix.weight(input_dim)) for matrix, input_dim in members]
    return [(view, coarser(view.dtype, context.storage_of(name, view.dtype))) for name, view in views]


def refit_block(
    block: Block,
    objective: Objective,
    num_batches: int,
    options: BlockRefit,
    seed: int = 0,
    storage_of: StorageOf = keep_dtype,
    int8_matrices: Int8Matrices = (),
) -> dict[str, Any]:
    """Refit a pruned block's kept weights in place; zeros stay zero, and nothing outside the block changes.

    Master weights and Adam's moments are fp32; products run in the model's dtype.

    Where ranks share the batches, each step's gradient comes from the rank that has its batch, and all take the step.
    So the steps, and the bits, are those of one process, and the time is not divided.

    Args:
        block: the block, pruned.
        objective: what to minimise.
        num_batches: of this rank.
        options: epochs, rate and the rest.
        seed: fixes the validation batches and the order of the others.
        storage_of: dtype that each matrix is saved in; every candidate is rounded to it, so that the validation batches
            judge what is saved.
        int8_matrices: the block's matrices that are saved in 8 bits; rounded like that too, while the masters are not
            (a straight-through estimator, arXiv 1308.3432).

    Returns:
        `val_loss_before`, `val_loss_after`, `best_epoch` (0 = as solved) and `rate`, of that epoch or the last attempt.

    Raises:
        SecateurError: the loss is not finite before the first step.

    Cost: 3 forward passes of the block an epoch over the batches, up to three times; about 30 bytes a weight of the
    block (fp32 master, gradient, Adam's moments, the best weights so far), and the activations of one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = _Shared(objective, num_batches)
    order = torch.randperm(shared.num_batches, generator=generator).tolist()
    num_val = min(max(1, round(options.val_fraction * len(order))), len(order) - 1)
    val, train = order[:num_val], order[num_val:]
    weights = MaskedMasterWeights(block, storage_of, int8_matrices)
    as_solved, before = weights.snapshot(), shared.mean(val)
    if not math.isfinite(before):
        raise SecateurError(
            f"the refit of {block.name} begins at a validation loss of {before}: leave out calibration batches that "
            f"are all padding, or, if the model's outputs are not finite in {weights.parameters[0].dtype}, load it in "
            f"another dtype"
        )
    best = _Best(as_solved, before)
    highest = rate = options.rate * objective.rate_factor
    for rate in (highest * NEXT_RATE**attempt for attempt in range(ATTEMPTS)):
        best = _descend(weights, shared, train, val, options.epochs, rate, generator, best)
        if best.epoch > 0:
            break
        weights.start_again(as_solved)
    weights.restore(best.weights)
    return {"val_loss_before": before, "val_loss_after": best.loss, "best_epoch": best.epoch, "rate": rate}


@dataclass(frozen=True)
class _Best:
    """Weights with the least validation loss so far, and their epoch (0 = as solved)."""

    weights: list[Tensor]
    loss: float
    epoch: int = 0


def _descend(
    weights: MaskedMasterWeights,
    objective: _Shared,
    train: Sequence[int],
    val: Sequence[int],
    epochs: int,
    rate: float,
    generator: torch.Generator,
    best: _Best,
) -> _Best:
    """Adam over the training batches from the weights as solved; the best weights of all epochs and before."""
    groups = [{"params": [part]} for part in weights.parts]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=ADAM_EPS, fused=True)
    steps, step = epochs * len(train), 0
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(train), generator=generator).tolist():
            for group, scale in zip(optimizer.param_groups, weights.scales, strict=True):
                group["lr"] = rate * scale * _schedule(step, steps)
            with weights.trainable(), torch.enable_grad():
                if objective.has(train[index]):
                    objective.backward(train[index])
                weights.collect_gradients(objective.owner(train[index]))
            optimizer.step()
            weights.write_back()
            step += 1
        loss = objective.mean(val)
        if loss < best.loss:
            best = _Best(weights.snapshot(), loss, epoch)
        elif epoch == 1 and not loss <= STOP_AFTER_FIRST * best.loss:  # a NaN too
            return best
    return best if best.epoch > 0 else _part_of_the_way(weights, objective, val, epochs, best)


def _part_of_the_way(
    weights: MaskedMasterWeights, objective: _Shared, val: Sequence[int], epochs: int, best: _Best
) -> _Best:
    """The best weights between those as solved and those of a last step that went too far."""
    as_solved, last = best.weights, [master.clone() for master in weights.masters]
    for share in STEPS_BACK:
        weights.mix(as_solved, last, share)
        loss = objective.mean(val)
        if loss < best.loss:
            best = _Best(weights.snapshot(), loss, epochs)
    return best


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over a tenth of the steps, then a half cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@runtime_checkable
class Objective(Protocol):
    """What a refit minimises.

    Attributes:
        name: of the report.
        loss_scale: brings the gradient of the block's output near 1, as the plain one underflows in fp16. Adam's
            steps do not depend on it.
        rate_factor: what it multiplies the learning rate by.
    """

    name: str
    loss_scale: float
    rate_factor: float

    def __call__(self, index: int, /) -> Float[Tensor, ""]:
        """The loss on this rank's batch `index`."""
        ...


class OutputError:
    """The mean over tokens of `|f(x_p) - y|^2 / |y|^2`, x_p the pruned stream's hidden states, y the target.

    Each token counts the same whatever its norm, as it does for the next block's normalisation.
    """

    name = OUTPUT_ERROR
    loss_scale: float
    rate_factor = 1.0

    def __init__(self, block: Block, stream: Stream, targets: Sequence[Tensor]) -> None:
        """Compare a block's outputs with targets (`refit_targets`), batch by batch."""
        self.block, self.stream, self.targets = block, stream, targets
        norms = targets[0].float().norm(dim=-1)
        self.loss_scale = float(norms.mean()) * norms.numel()  # a gradient is of size `error / (|y|^2 T)`

    def __call__(self, index: int) -> Float[Tensor, ""]:
        """The loss on this rank's batch `index`."""
        call = self.stream.calls[self.block.name][index]
        output = call.replay(self.block, self.stream.hidden[index].clone()).float()
        target = self.targets[index].float()
        error = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        real = self.stream.real[index]
        return error.mean() if real is None else error[real].mean()


class _Shared:
    """An objective whose batches lie on several ranks; a batch has one number among those of all ranks."""

    def __init__(self, objective: Objective, num_batches: int) -> None:
        self.objective = objective
        self.scale = distributed.broadcast_object(objective.loss_scale)
        self.num_batches = sum(distributed.all_gather(num_batches))

    def owner(self, number: int) -> int:
        """The rank that has a batch."""
        return number % distributed.world_size()

    def has(self, number: int) -> bool:
        """Whether this rank has a batch."""
        return self.owner(number) == distributed.rank()

    def _loss(self, number: int) -> Float[Tensor, ""]:
        return self.objective(number // distributed.world_size())

    def backward(self, number: int) -> None:
        """Gradients of the scaled loss on a batch that this rank has.

        Raises:
            UnsupportedModelError: a block whose output has none (Reformer's).
        """
        loss = self.scale * self._loss(number)
        if not loss.requires_grad:
            raise UnsupportedModelError(
                "the block's output has no gradient with respect to its weights, which a refit needs: use "
                "‹recipe=fast›, or ‹settings.refit=none›"
            )
        loss.backward()

    def mean(self, numbers: Sequence[int]) -> float:
        """Mean loss of several batches."""
        own = {number: float(self._loss(number)) for number in numbers if self.has(number)}
        losses = distributed.all_gather_items(own)
        return sum(losses[number] for number in numbers) / len(numbers)


class MaskedMasterWeights:
    """fp32 masters (fp64 in a model of fp64) of what a refit may move: the kept weights of the block's pruned matrices.

    Norms and biases stay: moving them gained nothing when it was measured.
    """

    def __init__(self, block: Block, storage_of: StorageOf, int8_matrices: Int8Matrices = ()) -> None:
        """Copy a pruned block's matrices and their masks."""
        self.int8_matrices = int8_matrices
        self.parameters = list({id(matrix.parameter): matrix.parameter for matrix in block.matrices}.values())
        kept = [_kept(block, parameter) for parameter in self.parameters]
        names = {id(matrix.parameter): matrix.name for matrix in block.matrices}
        self.storage = [storage_of(names[id(parameter)], parameter.dtype) for parameter in self.parameters]
        self.masters = [_master(parameter) for parameter in self.parameters]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        self.parts = _matrices_in(self.masters)
        for part, gradient in zip(self.parts, _matrices_in(self.gradients), strict=True):
            part.grad = gradient  # a view, as the part is
        self.scales = [
            float(((part * mask).square().sum() / mask.sum().clamp_min(1)).sqrt())
            for part, mask in zip(self.parts, _matrices_in(kept), strict=True)
        ]
        # In the gradients' dtype, as products of mixed dtypes take several times as long.
        self.factors = [mask.to(parameter.dtype) for mask, parameter in zip(kept, self.parameters, strict=True)]
        self.module = block.module

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Ask for gradients of these weights alone; afterwards each parameter has its own flag and gradient again."""
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
        """Move each parameter's gradient, of rank `owner`, to its master, without that of pruned weights."""
        for parameter, gradient, factor in zip(self.parameters, self.gradients, self.factors, strict=True):
            if parameter.grad is None:  # an expert that no token of the batch reached
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad.mul_(factor))
            distributed.broadcast(gradient, owner)

    def write_back(self) -> None:
        """Write the masters to the model, rounded as they are saved."""
        for parameter, master, storage in zip(self.parameters, self.masters, self.storage, strict=True):
            parameter.data.copy_(master if storage == parameter.dtype else master.to(storage))
        for matrix, dtype in self.int8_matrices:
            matrix.copy_(nearest_int8(matrix.to(dtype)))

    def snapshot(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.data.clone() for parameter in self.parameters]

    def start_again(self, snapshot: list[Tensor]) -> None:
        """Reset masters and parameters to a snapshot."""
        self.restore(snapshot)
        for master, saved in zip(self.masters, snapshot, strict=True):
            master.copy_(saved)

    def mix(self, start: list[Tensor], end: list[Tensor], share: float) -> None:
        """Set masters and parameters to `start + share (end - start)`."""
        for master, first, last in zip(self.masters, start, end, strict=True):
            master.copy_(first.to(last.dtype).lerp(last, share))
        self.write_back()

    def restore(self, snapshot: list[Tensor]) -> None:
        """Reset the parameters to a snapshot."""
        for parameter, saved in zip(self.parameters, snapshot, strict=True):
            parameter.data.copy_(saved)


def _master(parameter: Tensor) -> Tensor:
    """A contiguous copy in fp32, or fp64 for fp64: weights that stay then keep their bits.

    torch's fused Adam goes through the memory of a view as if it were contiguous.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.data.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _matrices_in(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of the parameters' matrices: the experts of one with three dimensions, or itself."""
    return [part for each in parameters for part in (each.unbind() if each.ndim == 3 else [each])]


def _kept(block: Block, parameter: nn.Parameter) -> Bool[Tensor, ...]:
    """Where a parameter may move: the nonzero weights of its pruned matrices; other experts stay."""
    kept = torch.zeros_like(parameter, dtype=torch.bool)
    for matrix in block.matrices:
        if matrix.parameter is parameter:
            place = kept if matrix.index is None else kept[matrix.index]
            place.copy_(matrix.stored != 0)
    return kept
