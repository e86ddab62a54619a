"""Dimensions of a model whose entries can be put in another order without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

SEED = 0  # of random orders


@dataclass(frozen=True)
class Place:
    """Where channels lie in a parameter.

    Args:
        parameter: its path.
        dim: the dimension that they run along.
        starts: position of the first channel; several where they come more than once (both halves of a fused matrix,
            query heads that share a value head).
    """

    parameter: str
    dim: int
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Channels:
    """Channels that move together wherever they lie.

    Args:
        size: how many.
        places: all places.
    """

    size: int
    places: tuple[Place, ...]


@dataclass(eq=False)
class ChannelOrder:
    """The order of a model's channels: new entry i of a dimension is old entry `indices[i]`.

    Args:
        indices: by parameter and dimension.
        residual: of the residual stream, in which hidden states follow; None = as it was.
    """

    indices: dict[str, dict[int, Int[Tensor, " C"]]] = field(default_factory=dict)
    residual: Int[Tensor, " C"] | None = None

    def add(self, channels: Channels, order: Int[Tensor, " C"], shapes: Mapping[str, torch.Size]) -> None:
        """Reorder channels. No channel may be added twice."""
        for place in channels.places:
            by_dim = self.indices.setdefault(place.parameter, {})
            index = by_dim.setdefault(place.dim, torch.arange(shapes[place.parameter][place.dim]))
            for start in place.starts:
                index[start : start + channels.size] = start + order

    def applied(self, parameter: str, tensor: Tensor) -> Tensor:
        """A parameter's tensor in this order; the same tensor where nothing moves in it."""
        for dim, index in self.indices.get(parameter, {}).items():
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states of the model in this order."""
        return hidden if self.residual is None else hidden[..., self.residual.to(hidden.device)]

    @contextmanager
    def tried(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within this context these parameters are in this order."""
        before = {name: parameter.data for name, parameter in parameters.items() if name in self.indices}
        try:
            for name, data in before.items():
                parameters[name].data = self.applied(name, data)
            yield
        finally:
            for name, data in before.items():
                parameters[name].data = data


def random_order(channels: list[Channels], shapes: Mapping[str, torch.Size]) -> ChannelOrder:
    """A random order of channels, the same at every call, to try whether a model computes the same."""
    generator, order = torch.Generator().manual_seed(SEED), ChannelOrder()
    for each in channels:
        order.add(each, torch.randperm(each.size, generator=generator), shapes)
    return order
