"""The channel order of a model for an n:m pattern, from the Hessians of the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibration.dense_pass import DensePass, run_dense_pass, unlabelled
from secateur.calibration.input_groups import observation_passes
from secateur.calibration.stream import Batch, Stream, num_sequences
from secateur.errors import errors_within
from secateur.models.blocks import Block, ForwardError, config_of, on_device_of, run_without_cache
from secateur.models.discovery import BlockChain
from secateur.models.head import has_head
from secateur.models.matrices import Matrix
from secateur.models.placement import WeightPlacement
from secateur.models.stubs import stubbed
from secateur.numerics.hessian import Hessian
from secateur.permutation.channels import ChannelOrder, Channels, random_order
from secateur.permutation.discovery import (
    SAME,
    BlockLayout,
    as_dtype,
    calls_of,
    find_inner_channels,
    head_sizes_of,
    in_fp32,
    is_same,
    outer_channels,
    owners_of,
    residual_places,
)
from secateur.permutation.search import find_order
from secateur.recipe.patterns import NM, Pattern
from secateur.recipe.steps import ChannelPermutation
from secateur.runtime import distributed
from secateur.runtime.memory import MemoryBudget
from secateur.runtime.progress import Progress, no_progress
from secateur.solvers.base import zero_dead_inputs

RESIDUAL_ROWS = 1 << 15  # rows of all matrices that the order of the residual stream looks at
TRIAL_TOKENS = 48
TRIAL_WEIGHTS = 1 << 30  # of a block: larger ones (hundreds of experts) are not copied to fp32, and stay as they are
STAGE = "channel order"


@dataclass(eq=False)
class OrderSearch:
    """The search over a model's blocks, one after another.

    Args:
        dense_pass: of the chain.
        batches: of all ranks.
        patterns: of the matrices.
        pattern: for the residual stream, which all matrices share.
        options: of the step.
        placement: where the weights are.
        progress: called with the stage, what is done, and the total.
    """

    dense_pass: DensePass
    batches: Sequence[Batch]
    patterns: Mapping[str, Pattern]
    pattern: NM
    options: ChannelPermutation
    placement: WeightPlacement
    progress: Progress
    order: ChannelOrder = field(default_factory=ChannelOrder)
    _readers: list[Float[Tensor, "R C"]] = field(default_factory=list)
    _residual: list[Channels] | None = field(default_factory=list)

    @torch.no_grad()
    def run(self, model: nn.Module, chain: BlockChain, seed: int) -> ChannelOrder:
        """Find the order. Nothing of the model is changed.

        Cost: a dense pass of every block over `sequences` sequences with its Hessians, a few more runs of the block on
            one batch, and the searches.
        """
        sizes = [num_sequences(batch) for batch in self.batches]
        # A router shows an expert only some tokens.
        sequences = sum(sizes) if self.dense_pass.stream.routed else self.options.sequences
        stream = self.dense_pass.stream.first(sizes, sequences)
        # A later block may read this one's values, as Gemma 3n's do. Every rank has batches of the whole stream.
        hands_on = chain.stub_outputs is None and self.dense_pass.stream.hands_on
        heads = [] if hands_on else head_sizes_of(config_of(model))
        trial = run_dense_pass(
            model, chain, [self._few] * distributed.world_size(), no_progress, self.placement, stream.memory
        ).stream
        for number, block in enumerate(self.dense_pass.blocks, 1):
            with self.placement.onload_block(block):
                self._search_block(block, stream, trial, heads, seed)
                stream.hidden, trial.hidden = stream.outputs(block), trial.outputs(block)
            self.progress(STAGE, number, len(self.dense_pass.blocks))
        if self._residual and self._ends_follow(model, chain):
            self._search_residual(model, chain, seed)
        return distributed.broadcast_object(self.order)

    @property
    def _few(self) -> Batch:
        """A few real tokens to try orders on, the same on every rank; whole sequences of other inputs."""
        batch = unlabelled(self.batches[0])
        tokens = batch.get("input_ids")
        if tokens is None or any(value.shape != tokens.shape for value in batch.values()):
            return batch
        mask = batch.pop("attention_mask", torch.ones_like(tokens)).bool()
        row = int(mask.sum(1).argmax())
        return {name: value[row, mask[row]][None, :TRIAL_TOKENS] for name, value in batch.items()}

    def _search_block(
        self, block: Block, stream: Stream, trial: Stream, heads: list[tuple[int, int]], seed: int
    ) -> None:
        """Order the channels inside a block, and take note of what the residual stream is read by."""
        groups = stream.groups[block.name]
        layout = BlockLayout(block, groups, trial.calls[block.name][0], trial.hidden[0])
        can_try = can_copy(block.module.parameters(), stream.memory) and layout.tells_positions_apart
        inner = find_inner_channels(layout, heads) if can_try else {}
        follows = residual_places(layout, {*inner}) if self._residual is not None else None
        if follows is None or self._residual is None:
            self._residual = None
        else:
            self._residual.append(Channels(layout.hidden.shape[-1], follows))
        readers = {(place.parameter, place.dim) for place in follows or ()}

        def reads_residual(matrix: Matrix) -> bool:
            place = layout.columns_of(matrix)
            return (place.parameter, place.dim) in readers and self.patterns[matrix.name] == self.pattern

        def is_wanted(matrix: Matrix) -> bool:
            is_plain = matrix.index is None and isinstance(self.patterns[matrix.name], NM)
            return is_plain and (matrix.name in inner or reads_residual(matrix))

        wanted = [group for group in groups if any(is_wanted(matrix) for matrix, _ in group.members)]
        for observed in observation_passes(wanted, stream.memory.hessian_bytes):
            hessians = stream.observe(block, observed)
            for group in observed:
                hessian = hessians.pop(group.leader.name)
                for matrix, input_dim in group.members:
                    if is_wanted(matrix):
                        with errors_within(matrix.name):
                            scores = costs_of_zeros(matrix.weight(input_dim).float(), hessian)
                        for channels in inner.get(matrix.name, ()):
                            self._order_inner(layout, channels, scores, self.patterns[matrix.name], seed)
                        if reads_residual(matrix):
                            self._readers.append(_some_rows(scores, RESIDUAL_ROWS // self._num_matrices).cpu())

    @property
    def _num_matrices(self) -> int:
        return sum(len(block.matrices) for block in self.dense_pass.blocks)

    def _order_inner(
        self, layout: BlockLayout, channels: Channels, scores: Float[Tensor, "R C"], pattern: Pattern, seed: int
    ) -> None:
        """Order channels that one matrix takes in."""
        assert isinstance(pattern, NM)
        starts = channels.places[0].starts
        if channels.size % pattern.m or any(start % pattern.m for start in starts):
            return
        parts = torch.cat([scores[:, start : start + channels.size] for start in starts])
        order = find_order(parts, pattern, self.options.rounds, seed)
        self.order.add(channels, order, layout.shapes)

    def _ends_follow(self, model: nn.Module, chain: BlockChain) -> bool:
        """Whether the model without its blocks predicts the same in another order of the residual stream.

        A model without a head gives the residual stream itself, so its order stays.
        """
        if chain.stub_outputs is None or self._residual is None or not has_head(model):
            return False
        outer = _outer_parameters(model, chain)
        if not can_copy(outer.values(), self.dense_pass.stream.memory):
            return False
        shapes = {name: parameter.shape for name, parameter in outer.items()}
        order = random_order([outer_channels(outer, self._residual[0].size)], shapes)
        owners = owners_of(model, {*map(id, outer.values())})
        try:
            with self.placement.onload_model(model, chain.blocks), stubbed(chain.blocks, chain.stub_outputs):
                inputs = as_dtype(on_device_of(model, self._few), torch.float32)
                with in_fp32(list(outer.values())):
                    with calls_of(owners) as ran:
                        expected = run_without_cache(model, model, **inputs)[0]
                    with order.tried(outer):
                        found = run_without_cache(model, model, **inputs)[0]
        except ForwardError:
            return False
        # What did not run (a projector of pictures, where the text has none) would be left behind.
        return len(ran) == len(owners) and is_same(found, expected, SAME)

    def _search_residual(self, model: nn.Module, chain: BlockChain, seed: int) -> None:
        assert self._residual is not None
        width = self._residual[0].size
        if width % self.pattern.m or not self._readers:
            return
        order = find_order(torch.cat(self._readers), self.pattern, self.options.rounds, seed)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for channels in (*self._residual, outer_channels(_outer_parameters(model, chain), width)):
            self.order.add(channels, order, shapes)
        self.order.residual = order


def can_copy(parameters: Iterable[nn.Parameter], memory: MemoryBudget) -> bool:
    """Whether there is memory for copies of some weights in fp32, as they are and in another order."""
    weights = sum(parameter.numel() for parameter in parameters)
    return weights <= TRIAL_WEIGHTS and (memory.limit is None or 8 * weights <= memory.limit // 2)


def costs_of_zeros(W: Float[Tensor, "R C"], hessian: Hessian) -> Float[Tensor, "R C"]:
    """What each weight costs when pruned alone, `W_ij^2 / [H^-1]_jj`, as a share of the matrix's output energy."""
    scores = zero_dead_inputs(W, hessian).square() / hessian.damped.inverse_diagonal
    return scores / ((W @ hessian.H) * W).sum().clamp_min(torch.finfo(W.dtype).tiny)


def _some_rows(scores: Float[Tensor, "R C"], number: int) -> Float[Tensor, "N C"]:
    """Rows at equal distances."""
    number = max(1, min(number, len(scores)))
    return scores[torch.linspace(0, len(scores) - 1, number).round().long().to(scores.device)] * (len(scores) / number)


def _outer_parameters(model: nn.Module, chain: BlockChain) -> dict[str, nn.Parameter]:
    inside = {id(parameter) for block in chain.blocks for parameter in block.module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
