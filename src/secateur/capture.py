"""The calibration stream: what flows into each block, and the Gram matrices of what flows into each matrix.

`survey` makes a stream; `Stream.observe` and `Stream.advance` then serve one block at a time.

Shape legend: B sequences, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from secateur import parallel
from secateur.experts import borrowed_share, owner_of, recorded_calls, run_all_tokens
from secateur.gram import Gram, GramAccumulator
from secateur.memory import HiddenStates, Memory
from secateur.model import Block, Call, UnsupportedModelError
from secateur.observe import Matrix, Use, WeightWatcher

Batch = dict[str, Tensor]  # the model's keyword inputs
Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class InputGroup:
    """Matrices with one input (q, k, v) and so one Gram matrix; the leader's use is the one that is accumulated."""

    leader: Matrix
    members: list[tuple[Matrix, int]] = field(default_factory=list)  # (matrix, input_dim)

    @property
    def columns(self) -> int:
        """Number of inputs."""
        matrix, input_dim = self.members[0]
        return matrix.weight(input_dim).shape[1]


def passes(groups: Sequence[InputGroup], gram_bytes: int) -> list[list[InputGroup]]:
    """The groups that are observed at a time: as many as the sums of their Gram matrices fit into so many bytes."""
    found: list[list[InputGroup]] = []
    room = 0
    for group in groups:
        needed = 8 * group.columns**2
        if not found or needed > room:
            found.append([])
            room = gram_bytes
        found[-1].append(group)
        room -= needed
    return found


@dataclass(eq=False)
class Stream:
    """Hidden states of every batch in front of one block, and how to run each block on them.

    Where several processes share a run, the batches are those dealt to this one.

    `hidden` is the pruned stream; `dense` is the same texts in the dense model, where something aims at it: from the
    stack's first block on (a decoder's encoder is pruned by then), and but for what blocks hand on beside hidden states
    (Gemma 3n's shared keys and values are the pruned stream's in both). `routed`
    names the matrices that don't see every token (experts).
    """

    hidden: MutableSequence[Tensor]
    calls: dict[str, list[Call]]
    padding: list[Tensor | None]  # True = a real token, None = all are
    groups: dict[str, list[InputGroup]]
    routed: frozenset[str] = frozenset()
    dense: MutableSequence[Tensor] | None = None
    memory: Memory = field(default_factory=Memory)

    def outputs(self, block: Block, of_dense: bool = False) -> HiddenStates:
        """What the block gives on the stream, or on the dense one. Cost: one forward of the block on all batches."""
        stream = self.dense if of_dense else self.hidden
        assert stream is not None
        calls = self.calls[block.name]
        outputs = (call.replay(block, hidden.clone()) for call, hidden in zip(calls, stream, strict=True))
        return HiddenStates.of(outputs, self.memory, len(calls))

    def observe(self, block: Block, groups: Sequence[InputGroup]) -> dict[str, Gram]:
        """Gram matrices by the name of each group's leader.

        Those of experts with fewer tokens than inputs are shrunk toward all tokens' (`experts`).

        Cost: one forward of the block on all batches; with such experts one more, and each on all tokens.
        """
        sums = _Sums()
        for index, hidden in enumerate(self.hidden):
            self.replay_watched(block, groups, index, hidden, sums.add)
        sums.add_up(groups)
        short = {
            group.leader.name: share
            for group in groups
            if group.leader.name in self.routed
            and (share := borrowed_share(sums.tokens(group.leader.name), group.columns))
        }
        grams = finished_grams([group for group in groups if short.get(group.leader.name) != 1.0], sums.by_name)
        if short:
            everything = self._observe_all_tokens(block, [group for group in groups if group.leader.name in short])
            grams |= {name: _shrunk(grams.get(name), gram, short[name]) for name, gram in everything.items()}
        return grams

    def _observe_all_tokens(self, block: Block, groups: Sequence[InputGroup]) -> dict[str, Gram]:
        """Gram matrices of experts as if every token were sent to them.

        Raises:
            ValueError: an expert that is in no product even so, such as one that fills up a parameter.
        """
        sums = _Sums()
        by_owner: dict[nn.Module, list[InputGroup]] = {}
        for group in groups:
            by_owner.setdefault(owner_of(block.module, group.leader), []).append(group)
        for owner, owned in by_owner.items():
            for index, hidden in enumerate(self.hidden):
                with recorded_calls(owner) as calls:
                    self.calls[block.name][index].replay(block, hidden.clone())
                for group, call in product(owned, calls):
                    run_all_tokens(owner, call, group.leader, self._adding(sums, index))
        sums.add_up(groups)
        for group in groups:
            if not sums.tokens(name := group.leader.name):
                raise ValueError(
                    f"{name} enters no product even where every token is sent to it, so nothing depends on it: "
                    f"leave it dense with --exclude '{name}'"
                )
        return finished_grams(groups, sums.by_name)

    def _adding(self, sums: _Sums, index: int) -> Callable[[Use], None]:
        """Adds what a matrix takes of batch `index`, without padding."""
        return lambda use: sums.add(use.matrix.name, real_tokens(use, self.padding[index]))

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
            self.hidden[index] = call.replay(block, self.hidden[index].clone())
        del self.calls[block.name]


@dataclass(eq=False)
class _Sums:
    """Gram matrices in the making, by name."""

    by_name: dict[str, GramAccumulator] = field(default_factory=dict)

    def add(self, name: str, X: Tensor) -> None:
        if name not in self.by_name:
            self.by_name[name] = GramAccumulator(X.shape[1], X.device)
        self.by_name[name].add(X)

    def add_up(self, groups: Sequence[InputGroup]) -> None:
        """Take in what every other process has added, of whom some may have seen no token of an expert."""
        if parallel.size() == 1:
            return
        for group in groups:
            if group.leader.name not in self.by_name:
                self.by_name[group.leader.name] = GramAccumulator(group.columns, group.leader.stored.device)
            parallel.add_up(self.by_name[group.leader.name].upper)
        counts = parallel.gather({group.leader.name: self.tokens(group.leader.name) for group in groups})
        for group in groups:
            self.by_name[group.leader.name].tokens = sum(count[group.leader.name] for count in counts)

    def tokens(self, name: str) -> int:
        return self.by_name[name].tokens if name in self.by_name else 0


def _shrunk(routed: Gram | None, everything: Gram, share: float) -> Gram:
    """The mean of an expert's own Gram matrix and that of all tokens, weighted by `share` of the latter."""
    if routed is None:
        return Gram(everything.xx, tokens=0, borrowed=1.0)
    return Gram(torch.lerp(routed.xx, everything.xx, share), routed.tokens, borrowed=share)


def finished_grams(groups: Sequence[InputGroup], sums: dict[str, GramAccumulator]) -> dict[str, Gram]:
    """The Gram matrix of each group; the sums are used up.

    Raises:
        ValueError: a group that saw no token, or inputs that are not finite.
    """
    names = [group.leader.name for group in groups]
    if silent := [name for name in names if name not in sums or sums[name].tokens == 0]:
        raise ValueError(
            f"{silent[0]} saw tokens in the whole dense pass, but none here (a router sends pruned hidden states "
            f"elsewhere): use more calibration text, or leave it dense with --exclude '{silent[0]}'"
        )
    grams = {name: sums.pop(name).finish() for name in names}
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
