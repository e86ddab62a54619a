"""Damping and shrinkage of the Hessian, its inverse factor, and its low-rank model.

Shape legend: C input columns, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.errors import SecateurError

DAMPING_GROWTH = 10.0
MAX_DAMPING_RETRIES = 3
PRIOR_TOKENS_AN_INPUT = 2  # of what is best on held-out tokens, from 576 to 8960 inputs (docs/decisions.md)
MAX_PRECONDITIONER_RANK = 64
SUBSPACE_ITERATIONS = 2


class NotPositiveDefiniteError(SecateurError):
    """The Hessian stayed indefinite after every permitted increase of the damping."""


@dataclass(frozen=True)
class Damping:
    """How much Hessians are damped and shrunk.

    Args:
        relative: what is added to the diagonal, relative to its mean.
        shrinkage: share that entries off the diagonal lose, below 1; auto = by `shrinkage_for`.
    """

    relative: float = 0.01
    shrinkage: float | Literal["auto"] = 0.0

    def shrinkage_of(self, columns: int, tokens: int) -> float:
        """The shrinkage of a Hessian of `columns` inputs and `tokens`."""
        return shrinkage_for(columns, tokens) if self.shrinkage == "auto" else self.shrinkage


DEFAULT_DAMPING = Damping()


def shrinkage_for(columns: int, tokens: int) -> float:
    """Share of the diagonal in a Hessian of few tokens: `C / (C + T / 2)`.

    As if 2 C more tokens had been seen, whose inputs are uncorrelated. Correlations
    between many inputs are mostly chance when tokens are few, and what a solver makes of them is wrong on other text.
    Shrinkage of a covariance to its diagonal: Schafer and Strimmer 2005.
    """
    prior = PRIOR_TOKENS_AN_INPUT * columns
    return prior / (prior + tokens)


@dataclass(eq=False)
class DampedHessian:
    """`Hd = (1 - shrinkage) H + shrinkage diag(H) + damping mean(diag H) I`, and its factors, each computed once.

    The mean runs over live inputs. A dead input (`H_jj = 0`) gets the mean as its diagonal. It is decoupled from the
    others, since H is positive semi-definite and so its row is zero; it changes neither their damping nor their
    conditioning.

    Args:
        H: undamped Hessian (C, C), fp32 or fp64.
        damping: relative damping.
        shrinkage: share of the diagonal, from 0 to below 1.
    """

    H: Float[Tensor, "C C"]
    damping: float
    shrinkage: float = 0.0

    @cached_property
    def dead(self) -> Bool[Tensor, " C"]:
        """Inputs that are zero on every token."""
        return self.H.diagonal() == 0

    @cached_property
    def _factored(self) -> tuple[Tensor, Tensor, list[float]]:
        """(Hd, U, dampings tried). A failed Cholesky is retried with ten times the damping, up to three times."""
        tried = [self.damping * DAMPING_GROWTH**k for k in range(MAX_DAMPING_RETRIES + 1)]
        for attempt, damping in enumerate(tried):
            Hd = self._damped(damping)
            factor = inverse_factor(Hd)
            if factor is not None:
                return Hd, factor, tried[: attempt + 1]
        raise NotPositiveDefiniteError(
            f"the Hessian ({len(self.H)} inputs) is not positive definite even with damping {tried[-1]:g}: use more "
            f"calibration tokens, or a larger `damping`"
        )

    def _damped(self, damping: float) -> Float[Tensor, "C C"]:
        diagonal, live = self.H.diagonal(), ~self.dead
        mean = diagonal[live].mean() if live.any() else torch.ones((), dtype=self.H.dtype, device=self.H.device)
        Hd = self.H * (1 - self.shrinkage)
        Hd.diagonal().add_(self.shrinkage * diagonal + damping * mean)
        Hd.diagonal()[self.dead] = mean
        return Hd

    @cached_property
    def unfactored(self) -> Float[Tensor, "C C"]:
        """Hd by the first damping, for what needs no factor: that takes C^3."""
        return self._damped(self.damping)

    @cached_property
    def unfactored_low_rank(self) -> tuple[Tensor, Tensor]:
        """Low-rank-plus-diagonal model of `unfactored`."""
        return low_rank_model(self.unfactored)

    @property
    def matrix(self) -> Float[Tensor, "C C"]:
        """Hd."""
        return self._factored[0]

    @property
    def U(self) -> Float[Tensor, "C C"]:
        """Upper triangular with `inv(Hd) = U^T U`; `inv(Hd[i:, i:]) = U[i:, i:]^T U[i:, i:]` for every i."""
        return self._factored[1]

    @cached_property
    def inverse_diagonal(self) -> Float[Tensor, " C"]:
        """Diagonal of `inv(Hd)`. Pruning `w_ij` alone, with the optimal update of its row, costs `w_ij^2` over it."""
        return self.U.square().sum(0)

    @property
    def figures(self) -> dict[str, Any]:
        """For the report: every damping that was tried, in order (the last one is used), and the shrinkage."""
        return {"damping": self._factored[2], "shrinkage": self.shrinkage}

    @cached_property
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Low-rank-plus-diagonal model of Hd."""
        return low_rank_model(self.matrix)


def inverse_factor(H: Float[Tensor, "C C"]) -> Float[Tensor, "C C"] | None:
    """Upper triangular U with `H^-1 = U^T U`; None where H is not numerically positive definite.

    With J the reversal of rows and columns and `J H J = L L^T`, `U = J L^-1 J`: one Cholesky and one triangular
    inverse (2/3 C^3 multiply-adds in all), against Cholesky, inverse and a second Cholesky in SparseGPT's code.
    """
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed) or not bool(L.diagonal().isfinite().all()):
        return None
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1).contiguous()


def low_rank_model(Hd: Float[Tensor, "C C"]) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"]]:
    """Low-rank-plus-diagonal model of Hd; at rank sqrt(C) its row systems cost half a product with Hd."""
    return low_rank_plus_diagonal(Hd, min(MAX_PRECONDITIONER_RANK, round(len(Hd) ** 0.5)))


def inverse_diagonal_of_model(F: Float[Tensor, "C K"], d: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Diagonal of `inv(F F^T + diag(d))`, by Woodbury. Cost: C K^2 multiply-adds."""
    scaled = F / d[:, None]
    core = F.T @ scaled
    core.diagonal().add_(1.0)
    L = torch.linalg.cholesky(core)
    return 1 / d - torch.linalg.solve_triangular(L, scaled.T, upper=False).square().sum(0)


def low_rank_plus_diagonal(H: Float[Tensor, "C C"], rank: int) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"]]:
    """Nystrom approximation `H ~ F F^T + diag(d)` with d > 0, exact on the diagonal.

    The range is found by subspace iteration from a seeded start (Halko et al. 2011, arXiv 0909.4061); as
    `H - F F^T` is positive semi-definite, d is its diagonal. Cost: 2 * iterations * C^2 * K flops.
    """
    columns = len(H)
    rank = min(rank, columns)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, rank, generator=generator, dtype=H.dtype).to(H.device)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(H @ basis).Q
    image = H @ basis
    core = basis.T @ image
    L, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if int(failed):  # the rank of H is lower, up to rounding: what is added to the core here is left to d
        core.diagonal().add_(rank * torch.finfo(H.dtype).eps * core.diagonal().max())
        L = torch.linalg.cholesky((core + core.T) / 2)
    F = torch.linalg.solve_triangular(L, image.T, upper=False).T.contiguous()
    diagonal = H.diagonal()
    return F, torch.maximum(diagonal - F.square().sum(1), 1e-3 * diagonal)
