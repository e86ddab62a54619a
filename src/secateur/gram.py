"""Second moments of a layer's inputs: the Gram matrix `H = X X^T / T`, accumulated batch by batch in fp32.

Shape legend: T tokens, C input columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.linalg import Damped


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


class GramAccumulator:
    """Sums `x x^T` over tokens; `finish` divides by their number."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, X: Float[Tensor, "T C"]) -> None:
        """Add a batch of inputs, one token a row, in any floating dtype. Cost: T C^2 multiply-adds."""
        X = X.float()
        self.sum.addmm_(X.T, X)
        self.tokens += len(X)

    def finish(self) -> Gram:
        """The Gram matrix of all tokens added."""
        if self.tokens == 0:
            raise ValueError("no token was observed: there is no Gram matrix to form")
        return Gram(self.sum / self.tokens, self.tokens)
