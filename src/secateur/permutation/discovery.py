"""Which channels of a model can be reordered: found by trying, not by the model's name.

Inside a block that is what one matrix hands to another without mixing: the intermediate channels of an MLP, and the
channels of each value head. A guess by shapes is tried with a random order: where the block's products stay the same,
the guess is right. The residual stream is tried in the same way, block by block and then at the model's ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.calibration.input_groups import InputGroup
from secateur.models.blocks import Block, BlockCall, ForwardError, forward_errors
from secateur.models.matrices import Matrix, matrices_of, owner_of
from secateur.permutation.channels import SEED, ChannelOrder, Channels, Place, random_order

# Relative difference up to which two results may differ by rounding: in the model's dtype, to sort out most guesses,
# and in fp32. Right guesses differed by 2e-6 at most (SmolLM2), and wrong ones can differ by less than a thousandth,
# where all tokens get much the same attention.
ALIKE, SAME = 0.05, 2e-5


@dataclass(eq=False)
class BlockLayout:
    """The parameters and matrices of a block, and how it is run.

    Args:
        block: the block, onloaded.
        groups: its matrices by input.
        call: how it is called on `hidden`.
        hidden: hidden states to try on.
    """

    block: Block
    groups: Sequence[InputGroup]
    call: BlockCall
    hidden: Tensor

    def __post_init__(self) -> None:
        """Look up names and matrices."""
        module = self.block.module
        self.parameters = {f"{self.block.name}.{name}": each for name, each in module.named_parameters()}
        self.shapes = {name: each.shape for name, each in self.parameters.items()}
        self._names = {id(each): name for name, each in self.parameters.items()}
        self._input_dims = {matrix.name: dim for group in self.groups for matrix, dim in group.members}
        self.matrices = [each for each in matrices_of(self.block.name, module) if each.index is None]
        # What no product with one input was seen of (experts in one tensor) can't be reordered along its rows.
        self.is_plain = len(self.matrices) == len(matrices_of(self.block.name, module))

    def columns_of(self, matrix: Matrix, starts: tuple[int, ...] = (0,)) -> Place:
        """The place of a matrix's inputs."""
        return Place(self._names[id(matrix.parameter)], self.input_dim(matrix), starts)

    def rows_of(self, matrix: Matrix, starts: tuple[int, ...] = (0,)) -> list[Place]:
        """The places of a matrix's outputs: in the matrix, and in its bias."""
        bias = getattr(owner_of(self.block.module, matrix), "bias", None)
        places = [Place(self._names[id(matrix.parameter)], 1 - self.input_dim(matrix), starts)]
        if isinstance(bias, nn.Parameter):
            places.append(Place(self._names[id(bias)], 0, starts))
        return places

    def input_dim(self, matrix: Matrix) -> int:
        """The stored dimension of a matrix that its inputs run along."""
        return self._input_dims.get(matrix.name, 1)

    def num_rows(self, matrix: Matrix) -> int:
        """Outputs of a matrix."""
        return matrix.stored.shape[1 - self.input_dim(matrix)]

    def num_columns(self, matrix: Matrix) -> int:
        """Inputs of a matrix."""
        return matrix.stored.shape[self.input_dim(matrix)]

    def consumers(self) -> Iterator[Matrix]:
        """Matrices that share their input with no other: what comes in may be another one's output."""
        yield from (group.leader for group in self.groups if len(group.members) == 1 and group.leader.index is None)

    def computes_the_same(
        self, order: ChannelOrder, matrices: Sequence[Matrix], hidden: Int[Tensor, " C"] | None = None
    ) -> bool:
        """Whether the modules of some matrices give the same in another order of the block's channels.

        An order of what did not run (an expert that got none of the tokens) was not tried, so it is refused.

        Args:
            order: of the channels.
            matrices: whose modules are watched.
            hidden: the order of the hidden states, which all results have then to follow; None = as they are.

        Cost: two runs of the block, and two more in fp32 where those agree.
        """
        module = self.block.module
        try:
            if not self._agree(order, matrices, hidden, ALIKE, self.hidden.dtype):
                return False
            with in_fp32([*module.parameters(), *module.buffers()]):
                return self._agree(order, matrices, hidden, SAME, torch.float32)
        except ForwardError:  # a block that runs in one dtype only stays as it is
            return False

    @torch.no_grad()
    def _agree(
        self,
        order: ChannelOrder,
        matrices: Sequence[Matrix],
        hidden: Int[Tensor, " C"] | None,
        tolerance: float,
        dtype: torch.dtype,
    ) -> bool:
        moved = {id(self.parameters[name]) for name in order.indices}
        owners = owners_of(self.block.module, moved)
        with calls_of(owners) as ran:
            expected = self._results(matrices, self.hidden, dtype)
        if len(ran) < len(owners):
            return False
        with order.tried(self.parameters):
            found = self._results(matrices, self.hidden if hidden is None else self.hidden[..., hidden], dtype)
        wanted = [each if hidden is None else each[..., hidden] for each in expected]
        return len(found) == len(wanted) and all(map(partial(is_same, tolerance=tolerance), found, wanted))

    def _results(self, matrices: Sequence[Matrix], hidden: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What the modules of these matrices give on hidden states in a dtype, and what the block gives."""
        owners = {id(owner): owner for owner in (owner_of(self.block.module, each) for each in matrices)}
        call = replace(self.call, args=as_dtype(self.call.args, dtype), kwargs=as_dtype(self.call.kwargs, dtype))
        with _captured(list(owners.values())) as captured, forward_errors(self.block.module):
            output = call.replay(self.block, hidden.to(dtype, copy=True))
        return [*captured, output]

    @property
    def tells_positions_apart(self) -> bool:
        """Whether the hidden states differ from position to position; else wrong guesses change nothing."""
        flat = self.hidden.float().flatten(0, -2)
        return bool((flat - flat.mean(0)).norm() > 0.01 * flat.norm())


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Nested arguments with every floating tensor in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(as_dtype(each, dtype) for each in value)
    return {key: as_dtype(each, dtype) for key, each in value.items()} if type(value) is dict else value


@contextmanager
def in_fp32(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within this context parameters and buffers are fp32."""
    before = [(each, each.data) for each in tensors if each.is_floating_point()]
    try:
        for each, data in before:
            each.data = data.float()
        yield
    finally:
        for each, data in before:
            each.data = data


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules, in the order of their calls."""
    captured: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:

            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                captured.append(output if isinstance(output, Tensor) else output[0])

            stack.callback(module.register_forward_hook(keep).remove)
        yield captured


def owners_of(module: nn.Module, parameters: Set[int]) -> list[nn.Module]:
    """The modules that hold one of these parameters (ids)."""
    return [each for each in module.modules() if parameters & {*map(id, each.parameters(recurse=False))}]


@contextmanager
def calls_of(modules: Sequence[nn.Module]) -> Iterator[set[int]]:
    """Which of these modules run within this context."""
    ran: set[int] = set()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda each, *_: ran.add(id(each))).remove)
        yield ran


def is_same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two results agree up to a relative difference."""
    if found.shape != expected.shape:
        return False
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def find_inner_channels(layout: BlockLayout, head_sizes: Sequence[tuple[int, int]]) -> dict[str, list[Channels]]:
    """Channels inside a block, by the name of the matrix that takes them in.

    Args:
        layout: of the block.
        head_sizes: sizes of a value head that the model may have, each with the number of value heads.

    Cost: two to four runs of the block on `hidden` for each guess, a few a block.
    """
    found: dict[str, list[Channels]] = {}
    for consumer in layout.consumers():
        for guess in _guesses(layout, consumer, head_sizes):
            if layout.computes_the_same(random_order(guess, layout.shapes), [consumer]):
                found[consumer.name] = guess
                break
    return found


def _guesses(layout: BlockLayout, consumer: Matrix, head_sizes: Sequence[tuple[int, int]]) -> Iterator[list[Channels]]:
    """Where a matrix's inputs may come from: its neighbours in the same module first."""
    others = [each for each in layout.matrices if each.name != consumer.name]
    siblings = [each for each in others if each.name.rpartition(".")[0] == consumer.name.rpartition(".")[0]]
    for pool in (siblings, others):
        if guess := _intermediate(layout, consumer, pool):
            yield [guess]
        for producer, (size, heads) in product(pool, head_sizes):
            yield from _value_heads(layout, consumer, producer, size, heads)


def _intermediate(layout: BlockLayout, consumer: Matrix, pool: Sequence[Matrix]) -> Channels | None:
    """Every matrix with as many outputs as the consumer has inputs, or two such in one."""
    size = layout.num_columns(consumer)
    places = [layout.columns_of(consumer)]
    for producer in pool:
        if layout.num_rows(producer) in (size, 2 * size):
            starts = tuple(range(0, layout.num_rows(producer), size))
            places += layout.rows_of(producer, starts)
    return Channels(size, tuple(places)) if len(places) > 1 else None


def _value_heads(
    layout: BlockLayout, consumer: Matrix, producer: Matrix, size: int, heads: int
) -> Iterator[list[Channels]]:
    """The channels of each value head, at the end of what the producer gives; several query heads may share one."""
    columns, rows = layout.num_columns(consumer), layout.num_rows(producer)
    if columns % (size * heads) or rows < size * heads:
        return
    repeats, offset = columns // (size * heads), rows - size * heads
    yield [
        Channels(
            size,
            (
                layout.columns_of(consumer, tuple((head * repeats + query) * size for query in range(repeats))),
                *layout.rows_of(producer, (offset + head * size,)),
            ),
        )
        for head in range(heads)
    ]


def head_sizes_of(config: Any) -> list[tuple[int, int]]:
    """Sizes of a value head that a configuration allows, each with the number of value heads."""
    text = config.get_text_config()
    queries, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    if queries is None or width is None:
        return []
    heads = [_number(text, "num_key_value_heads"), queries]
    sizes = [_number(text, "v_head_dim"), _number(text, "head_dim"), width // queries]
    return list(dict.fromkeys(product(filter(None, sizes), filter(None, heads))))


def _number(config: Any, name: str) -> int | None:
    """A number in a configuration; None where it has none, or one for each layer (Gemma 4, which raises)."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:
        return None
    return found if isinstance(found, int) else None


def residual_places(layout: BlockLayout, writers: set[str]) -> tuple[Place, ...] | None:
    """Where the residual stream's channels lie in a block; None where the block does not follow their order.

    Args:
        layout: of the block.
        writers: matrices whose inputs are channels inside the block. Where their outputs are as wide as the residual
            stream, they go to it.
    """
    width = layout.hidden.shape[-1]
    if not writers or not layout.is_plain:
        return None
    writing = [each for each in layout.matrices if each.name in writers and layout.num_rows(each) == width]
    places: list[Place] = []
    in_matrices: set[str] = set()
    for matrix in layout.matrices:
        rows = layout.rows_of(matrix)
        in_matrices |= {place.parameter for place in rows}
        if matrix in writing:
            places += rows
        elif layout.num_columns(matrix) == width:
            places.append(layout.columns_of(matrix))
    norms = [name for name, shape in layout.shapes.items() if name not in in_matrices and shape == (width,)]
    found = (*places, *(Place(name, 0) for name in norms))
    index, order = torch.randperm(width, generator=torch.Generator().manual_seed(SEED)), ChannelOrder()
    order.add(Channels(width, found), index, layout.shapes)
    return found if layout.computes_the_same(order, writing, index.to(layout.hidden.device)) else None


def outer_channels(parameters: Mapping[str, nn.Parameter], width: int) -> Channels:
    """The residual stream's channels outside of the blocks: in embeddings, norms and heads."""
    last = {name: each.ndim - 1 for name, each in parameters.items() if each.ndim in (1, 2) and each.shape[-1] == width}
    return Channels(width, tuple(Place(name, dim) for name, dim in last.items()))
