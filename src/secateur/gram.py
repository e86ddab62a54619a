"""Second moments of a layer's inputs: the Gram matrix `H = X X^T / T`, products in fp32, summed over batches in fp64.

So the sum depends on the batches, and hardly ever on the order in which they came: fp32 holds none of what an order
changes in fp64. Processes that share the batches end with the bits of one.

Shape legend: T tokens, C input columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.linalg import Damped

BAND = {"cpu": 192}  # rows: 0.6 of a whole product's time from 576 to 4096 columns on a Zen 4
BAND_ON_DEVICE = 2048


@dataclass(eq=False)
class Gram:
    """An undamped Gram matrix (C, C), fp32 or fp64, and the number of tokens behind it.

    `borrowed` is the share of it that comes from tokens which the matrix doesn't see by itself (`experts`). What
    solvers derive from it is kept, so that matrices with the same input (q, k, v) share one factorisation.
    """

    xx: Float[Tensor, "C C"]
    tokens: int
    borrowed: float = 0.0
    _damped: dict[float, Damped] = field(default_factory=dict, repr=False)

    def damped(self, damping: float) -> Damped:
        """The damped matrix and its factors, computed once for each damping."""
        if damping not in self._damped:
            self._damped[damping] = Damped(self.xx, damping)
        return self._damped[damping]

    @property
    def energy(self) -> Float[Tensor, " C"]:
        """Mean square of each input."""
        return self.xx.diagonal()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over batches are kept in; Metal has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


class GramAccumulator:
    """Sums `x x^T` over tokens; `finish` divides by their number.

    Only the upper triangle is summed, in bands of rows, as torch has no product for a symmetric result; what lies below
    the diagonal of `upper` is not meant.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.upper = torch.zeros(columns, columns, dtype=sum_dtype(device), device=device)
        self.tokens = 0

    def add(self, X: Float[Tensor, "T C"]) -> None:
        """Add a batch of inputs, one token a row, in any floating dtype. Cost: about T C^2 / 2 multiply-adds."""
        X = X.float()
        columns = X.shape[1]
        band = BAND.get(X.device.type, BAND_ON_DEVICE)
        for start in range(0, columns, band):
            end = min(start + band, columns)
            self.upper[start:end, start:] += X[:, start:end].T @ X[:, start:]
        self.tokens += len(X)

    def finish(self) -> Gram:
        """The Gram matrix of all tokens added. It takes the sum's place: nothing can be added any more."""
        if self.tokens == 0:
            raise ValueError("no token was observed: there is no Gram matrix to form")
        upper = self.upper.div_(self.tokens).float().triu_()
        return Gram(upper.add_(upper.triu(1).T), self.tokens)
