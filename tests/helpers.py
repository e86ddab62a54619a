"""Problems, oracles and tiny models that the tests share."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.calibration.dense_pass import DensePass, run_dense_pass
from secateur.models.blocks import Block
from secateur.models.discovery import find_block_chains
from secateur.recipe.patterns import NM, Pattern, Unstructured
from secateur.recipe.recipe import Recipe
from secateur.recipe.resolve import resolve_recipe

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "sparsegpt": {"solver": "sparsegpt"},
    "mrp": {"solver": "mrp"},
    "admm": {"solver": "admm"},
    "mrp-SS": {"solver": "mrp", "mask": "S", "compensation": "S"},
    "mrp-SM-32": {"solver": "mrp", "mask": "S", "compensation": "M", "block": 32},
    "mrp-SM-all": {"solver": "mrp", "mask": "S", "compensation": "M", "block": "all"},
    "mrp-MS": {"solver": "mrp", "mask": "M", "compensation": "S"},
    "mrp-MM-32": {"solver": "mrp", "mask": "M", "compensation": "M", "block": 32},
    "mrp-MM-all": {"solver": "mrp", "mask": "M", "compensation": "M"},
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
    """Weights and the Hessian of correlated inputs with a few strong channels, as in language models."""
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


def solve_by(W: Tensor, H: Tensor, pattern: Any, solver: str = "mrp", **options: Any) -> secateur.Solved:
    """`secateur.solve` with the solver's options as keywords."""
    others = {name: options.pop(name) for name in ("damping", "shrinkage", "refine") if name in options}
    return secateur.solve(W, H, pattern, {"name": solver, **options}, **others)


def find_blocks(model: Any, recipe: Recipe | None = None, **globs: Any) -> list[Block]:
    """The blocks that run on a few tokens."""
    return find_chain(model, recipe, **globs).blocks


def find_chain(model: Any, recipe: Recipe | None = None, **globs: Any) -> Any:
    """The first chain that runs on a few tokens."""
    chosen = recipe or resolve_recipe("fast", **globs)
    return find_block_chains(model, {"input_ids": torch.arange(3, 11)[None]}, chosen).chains[0]


def dense_pass(model: Any, batches: list[Tensor], **options: Any) -> DensePass:
    """The dense pass of a model's first chain."""
    model.eval()
    found = run_dense_pass(model, find_chain(model), [{"input_ids": batch} for batch in batches], quiet, **options)
    found.check_none_missed()
    return found


def quiet(*_: object) -> None:
    """Show no progress."""


class Killed(BaseException):
    """Stands for a process that was killed."""


def kill_at(stage: str, number: int) -> Any:
    """A progress callback that stops the run after a step of a stage."""

    def progress(now: str, done: int, _total: int) -> None:
        if (now, done) == (stage, number):
            raise Killed

    return progress
