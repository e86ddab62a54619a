"""The calibration stream: what flows into each block, and the Hessians of what flows into each matrix.

`run_dense_pass` makes a stream; `Stream.observe` and `Stream.advance` then serve one block at a time.

Shape legend: B sequences, T positions, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn

from secateur.calibration.experts import borrowed_share, recorded_calls, run_all_tokens
from secateur.calibration.hidden_states import HiddenStates
from secateur.calibration.input_groups import InputGroup
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import Block, BlockCall, hidden_of
from secateur.models.matrices import owner_of
from secateur.models.weight_uses import WeightUse, WeightWatcher
from secateur.numerics.damping import DEFAULT_DAMPING, Damping
from secateur.numerics.hessian import Hessian, HessianAccumulator
from secateur.runtime import distributed
from secateur.runtime.memory import MemoryBudget

Batch = dict[str, Tensor]  # the model's keyword inputs


def num_sequences(batch: Batch) -> int:
    """Sequences of a batch. One whose inputs differ in length (patches of several pictures) can't be cut: it is one."""
    lengths = {len(value) for value in batch.values()}
    return lengths.pop() if len(lengths) == 1 else 1


@dataclass(eq=False)
class Stream:
    """Hidden states of this rank's batches in front of one block, and how to run each block on them.

    Args:
        hidden: the pruned stream.
        calls: arguments of each block by batch, without hidden states.
        real: which tokens of each batch are real (B, T), the others being padding; None = all are.
        groups: matrices of each block by input.
        routed: matrices that do not see every token (experts).
        dense: the same texts in the dense model, where something aims at it. It starts at the chain's first block (a
            decoder's encoder is pruned by then). What blocks put into a container that they share (Gemma 3n's keys and
            values) is the pruned stream's in both.
        memory: where hidden states go.
        damping: of the Hessians.
        num_tokens: real tokens of all batches of all ranks.
    """

    hidden: MutableSequence[Tensor]
    calls: dict[str, list[BlockCall]]
    real: list[Tensor | None]
    groups: dict[str, list[InputGroup]]
    routed: frozenset[str] = frozenset()
    dense: MutableSequence[Tensor] | None = None
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    damping: Damping = DEFAULT_DAMPING
    num_tokens: int = 0

    @property
    def hands_on(self) -> bool:
        """Whether blocks hand on more than hidden states: tensors that they return, or a container that they share."""
        calls = [calls[0] for calls in self.calls.values() if calls]
        arguments = [each for call in calls for each in call.arguments().values()]
        shared = Counter(id(each) for each in arguments if isinstance(each, MutableMapping | MutableSequence) and each)
        return any(call.handed for call in calls) or any(count > 1 for count in shared.values())

    def first(self, sizes: Sequence[int], sequences: int) -> Stream:
        """A stream of the first batches, as many as hold this many sequences; this one stays as it is.

        Args:
            sizes: sequences of each batch, of all ranks.
            sequences: how many.
        """
        enough = int((torch.tensor(sizes).cumsum(0) < sequences).sum()) + 1
        count = len(distributed.shard(min(enough, len(sizes))))
        calls = {name: calls[:count] for name, calls in self.calls.items()}
        return Stream(
            self.hidden[:count],
            calls,
            self.real[:count],
            self.groups,
            self.routed,
            memory=self.memory,
            damping=self.damping,
        )

    def outputs(self, block: Block, of_dense: bool = False) -> HiddenStates:
        """The block's outputs on the pruned stream, or on the dense one. Cost: one forward of it on all batches."""
        stream = self.dense if of_dense else self.hidden
        assert stream is not None
        calls = [self._call(block, index, of_dense) for index in range(len(stream))]
        outputs = (call.replay(block, hidden.clone()) for call, hidden in zip(calls, stream, strict=True))
        return HiddenStates.of(outputs, self.memory, len(calls))

    def _call(self, block: Block, index: int, of_dense: bool) -> BlockCall:
        call = self.calls[block.name][index]
        return call.of_dense if of_dense else call

    def observe(
        self, block: Block, groups: Sequence[InputGroup], outputs: HiddenStates | None = None
    ) -> dict[str, Hessian]:
        """Hessians by the name of each group's leader.

        Those of fused experts with fewer tokens than inputs are mixed with all tokens' (`experts`). Experts that can't
        be sent more tokens (modules, and unknown forms of fused ones) keep theirs.

        Args:
            block: the block.
            groups: of its matrices.
            outputs: takes the block's outputs, where they are wanted too.

        Raises:
            SecateurError: a group that saw no token, or inputs that are not finite.

        Cost: one forward of the block on all batches; with such experts one more, and each on all tokens.
        """
        sums = _HessianSums()
        for index, hidden in enumerate(self.hidden):
            output = self.replay_watched(block, groups, index, hidden, sums.add)
            if outputs is not None:
                outputs.append(output)
        sums.all_reduce(groups)
        short = {
            group.leader.name: share
            for group in groups
            if group.leader.name in self.routed
            and group.leader.index is not None
            and (share := borrowed_share(sums.tokens(group.leader.name), group.columns))
        }
        everything: dict[str, Hessian] = {}
        if short:
            everything = self._observe_all_tokens(block, [group for group in groups if group.leader.name in short])
        with_own = [group for group in groups if short.get(name := group.leader.name) != 1.0 or name not in everything]
        hessians = finished_hessians(with_own, sums.by_name, self.damping)
        for name, whole in everything.items():
            hessians[name] = _mixed(hessians.get(name), whole, short[name], self.damping)
        return hessians

    def _observe_all_tokens(self, block: Block, groups: Sequence[InputGroup]) -> dict[str, Hessian]:
        """Hessians of fused experts as if every token were sent to them; of those that it can be sent to.

        Raises:
            SecateurError: an expert that is in no product even then, such as one that pads a parameter.
        """
        sums = _HessianSums()
        by_owner: dict[nn.Module, list[InputGroup]] = {}
        unsent: set[str] = set()
        for group in groups:
            by_owner.setdefault(owner_of(block.module, group.leader), []).append(group)
        for owner, owned in by_owner.items():
            for index, hidden in enumerate(self.hidden):
                with recorded_calls(owner) as calls:
                    self.calls[block.name][index].replay(block, hidden.clone())
                tokens = hidden.shape[:-1].numel()
                for group, call in product(owned, calls):
                    if not run_all_tokens(owner, call, tokens, group.leader, self._adding(sums, index)):
                        unsent.add(group.leader.name)
        unsent = set().union(*distributed.all_gather(unsent))
        groups = [group for group in groups if group.leader.name not in unsent]
        sums.all_reduce(groups)
        for group in groups:
            if not sums.tokens(name := group.leader.name):
                raise SecateurError(
                    f"{name} enters no product even when every token is sent to it, so nothing depends on it: leave it "
                    f"dense with ‹exclude='{name}'›"
                )
        return finished_hessians(groups, sums.by_name, self.damping)

    def _adding(self, sums: _HessianSums, index: int) -> Callable[[WeightUse], None]:
        """Adds what a matrix takes of batch `index`, without padding."""
        return lambda use: sums.add(use.matrix.name, real_tokens(use, self.real[index]))

    def replay_watched(
        self,
        block: Block,
        groups: Sequence[InputGroup],
        index: int,
        hidden: Tensor,
        on_input: Callable[[str, Tensor], None],
        of_dense: bool = False,
    ) -> Tensor:
        """Run the block on hidden states of batch `index`; returns its output.

        Args:
            block: the block.
            groups: whose leaders are watched.
            index: number of the batch.
            hidden: its hidden states.
            on_input: called with a leader's name and its input (real tokens, C), for each use.
            of_dense: whether the hidden states are the dense stream's.
        """
        call = self._call(block, index, of_dense)
        leaders = {group.leader.name for group in groups}

        def on_matmul(use: WeightUse) -> None:
            if use.matrix.name in leaders:
                on_input(use.matrix.name, real_tokens(use, self.real[index]))

        with WeightWatcher([group.leader for group in groups], on_matmul):
            return call.replay(block, hidden.clone())  # a block may change its input in place

    def advance(self, block: Block) -> None:
        """Replace the hidden states by the block's output, and what it hands to later blocks next to them.

        Cost: one forward of the block on all batches.
        """
        for index, call in enumerate(self.calls.pop(block.name)):
            output = call.run(block, self.hidden[index].clone())
            self.hidden[index] = hidden_of(output, block)
            for later in self.calls.values():
                later[index] = later[index].after(block, output)


@dataclass(eq=False)
class _HessianSums:
    """Hessians that are being summed, by leader's name."""

    by_name: dict[str, HessianAccumulator] = field(default_factory=dict)

    def add(self, name: str, X: Tensor) -> None:
        if name not in self.by_name:
            self.by_name[name] = HessianAccumulator(X.shape[1], X.device)
        self.by_name[name].add(X)

    def all_reduce(self, groups: Sequence[InputGroup]) -> None:
        """Add what every other rank has summed; some may have seen no token of an expert."""
        if distributed.world_size() == 1:
            return
        for group in groups:
            if group.leader.name not in self.by_name:
                self.by_name[group.leader.name] = HessianAccumulator(group.columns, group.leader.stored.device)
            distributed.all_reduce(self.by_name[group.leader.name].upper)
        counts = distributed.all_gather({group.leader.name: self.tokens(group.leader.name) for group in groups})
        for group in groups:
            self.by_name[group.leader.name].tokens = sum(count[group.leader.name] for count in counts)

    def tokens(self, name: str) -> int:
        return self.by_name[name].tokens if name in self.by_name else 0


def _mixed(routed: Hessian | None, everything: Hessian, share: float, damping: Damping) -> Hessian:
    """Weighted mean of an expert's Hessian and that of all tokens; `share` is the weight of the latter."""
    if routed is None:
        return replace(everything, tokens=0, borrowed=1.0)
    tokens = round(1 / ((1 - share) ** 2 / routed.tokens + share**2 / everything.tokens))  # the effective number
    H = torch.lerp(routed.H, everything.H, share)
    return Hessian(H, routed.tokens, share, damping.relative, damping.shrinkage_of(len(H), tokens))


def finished_hessians(
    groups: Sequence[InputGroup], sums: dict[str, HessianAccumulator], damping: Damping
) -> dict[str, Hessian]:
    """The Hessian of each group; the sums are used up.

    Raises:
        SecateurError: a group that saw no token, or inputs that are not finite.
    """
    names = [group.leader.name for group in groups]
    if silent := [name for name in names if name not in sums or sums[name].tokens == 0]:
        raise SecateurError(
            f"{silent[0]} saw tokens in the dense pass, but none here (a router sends other hidden states to other "
            f"experts): use more calibration text, or leave it dense with ‹exclude='{silent[0]}'›"
        )
    hessians = {name: sums.pop(name).finish(damping) for name in names}
    for name, hessian in hessians.items():
        if not bool(torch.isfinite(hessian.H).all()):
            raise SecateurError(
                f"the input of {name} holds NaN or infinite activations, and held none in the dense pass: load the "
                f"model in a wider dtype, or use a larger ‹settings.damping›"
            )
    return hessians


def _without_ones(sizes: Sequence[int]) -> list[int]:
    """Sizes other than 1: latent attention multiplies (B, 1, T, C)."""
    return [size for size in sizes if size > 1]


def real_tokens(use: WeightUse, real: Tensor | None) -> Tensor:
    """A product's input as (tokens, C), without padded positions, and without zeros in place of other experts' tokens.

    Raises:
        UnsupportedModelError: there is padding, and which rows are of padded positions is not known: the product has
            other rows than the batch has positions, or those of an expert, in the order that the router sent them.
    """
    X, rows = use.inputs.reshape(-1, use.inputs.shape[-1]), use.inputs.shape[:-1]
    if real is not None:
        if rows == real.T.shape and real.shape[0] != real.shape[1]:  # (T, B, C), as Longformer's
            real = real.T
        is_in_order = _without_ones(rows) in (_without_ones(real.shape), [real.numel()])
        if use.is_sent or not is_in_order:
            raise UnsupportedModelError(
                f"{use.matrix.name} was applied to rows {tuple(rows)} where the batch has positions "
                f"{tuple(real.shape)}, so padded ones can't be told apart: pass sequences of equal length, without "
                f"padding"
            )
        X = X[real.reshape(-1)]
    return X if use.item is None else X[X.any(-1)]  # Llama 4 multiplies the tokens of other experts by zero
