"""Problems, oracles and tiny models that the tests share."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from secateur.model import Block
from secateur.pattern import NM, Pattern, Unstructured
from secateur.stacks import find_stacks

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "mrp": {"method": "mrp"},
    "admm": {"method": "admm"},
    "mrp-SS": {"method": "mrp", "mask": "S", "compensation": "S"},
    "mrp-SM-32": {"method": "mrp", "mask": "S", "compensation": "M", "block": 32},
    "mrp-SM-all": {"method": "mrp", "mask": "S", "compensation": "M", "block": "all"},
    "mrp-MS": {"method": "mrp", "mask": "M", "compensation": "S"},
    "mrp-MM-32": {"method": "mrp", "mask": "M", "compensation": "M", "block": 32},
    "mrp-MM-all": {"method": "mrp", "mask": "M", "compensation": "M"},
}
PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.37), NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 8), NM(5, 12)]
CASES = [
    (name, pattern)
    for name, pattern in product(METHODS, PATTERNS)
    if not (METHODS[name].get("mask") == "M" and isinstance(pattern, Unstructured))
]


def case_id(value: Any) -> str:
    return str(value)


def problem(
    rows: int = 20, columns: int = 48, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Weights and the Gram matrix of correlated inputs with a few strong channels, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    X = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    X += 0.3 * torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    X *= torch.exp(0.7 * torch.randn(columns, generator=generator, dtype=torch.float64))
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return W.to(dtype), (X.T @ X / len(X)).to(dtype)


def damp(H: Tensor, damping: float = 0.01) -> Tensor:
    live = H.diagonal() > 0
    Hd = H.clone()
    Hd.diagonal().add_(damping * H.diagonal()[live].mean())
    return Hd


def refit_oracle(W: Tensor, H: Tensor, keep: Tensor, damping: float = 0.01) -> Tensor:
    """Least squares on the kept columns of each row: `w'_K = (W Hd)_K [Hd_KK]^-1`, in float64."""
    W, Hd = W.double(), damp(H.double(), damping)
    target = W @ Hd
    out = torch.zeros_like(W)
    for row in range(len(W)):
        kept = keep[row].nonzero()[:, 0]
        out[row, kept] = torch.linalg.solve(Hd[kept][:, kept], target[row, kept])
    return out


def loss(new: Tensor, W: Tensor, H: Tensor, damping: float = 0.0) -> float:
    """`tr(D Hd D^T)`, in float64."""
    D = new.double() - W.double()
    Hd = damp(H.double(), damping) if damping else H.double()
    return float(((D @ Hd) * D).sum())


def find_blocks(model: Any, **globs: Any) -> list[Block]:
    """The blocks that run on a few tokens."""
    return find_stacks(model, {"input_ids": torch.arange(3, 11)[None]}, **globs).blocks
