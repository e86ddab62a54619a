"""The search for an order of channels in which n:m groups lose little.

Under an n:m pattern each row keeps the n best weights of every m neighbours. Which columns are neighbours can be
chosen where a model allows it. The search starts with columns dealt into groups by their total score. Then, again and
again, it takes one column out of every group and puts them back in the best way: an assignment problem (RIA, Zhang et
al., ICLR 2024; before it Pool and Yu, NeurIPS 2021).

Shape legend: R rows, C columns, G = C / m groups.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.recipe.patterns import NM

TERMS = 1 << 27  # R G^2 of a round: of more rows, each round takes another sample
PATIENCE = 12  # rounds without gain after which the search stops


def kept_score(scores: Float[Tensor, "R C"], pattern: NM) -> float:
    """Sum of the scores that an n:m pattern keeps."""
    groups = scores.unflatten(1, (-1, pattern.m))
    return float(groups.topk(pattern.n, dim=-1).values.sum(dtype=torch.float64))


def find_order(scores: Float[Tensor, "R C"], pattern: NM, rounds: int, seed: int = 0) -> Int[Tensor, " C"]:
    """An order of columns in which an n:m pattern keeps more of the scores, never less than in their own.

    Args:
        scores: what pruning each weight costs; not negative.
        pattern: the pattern; m divides C.
        rounds: at most this many assignments.
        seed: of the columns that are taken out, and of the rows that are looked at.

    Returns:
        the order: new column i is old column `order[i]`.

    Cost: `min(R G^2, 2^27)` and an assignment of G columns a round.
    """
    generator = torch.Generator().manual_seed(seed)
    own, dealt = torch.arange(scores.shape[1]).view(-1, pattern.m), _dealt(scores, pattern.m)
    kept, dealt_kept = (kept_score(scores[:, each.flatten()], pattern) for each in (own, dealt))
    groups, kept = (dealt, dealt_kept) if dealt_kept > kept else (own, kept)
    best, stale = groups.flatten(), 0
    for _ in range(rounds):
        groups = _exchanged(scores, groups, pattern, generator)
        found = kept_score(scores[:, groups.flatten()], pattern)
        stale = 0 if found > kept * (1 + 1e-6) else stale + 1
        if found > kept:
            best, kept = groups.flatten(), found
        if stale == PATIENCE:
            break
    return best


def _dealt(scores: Float[Tensor, "R C"], m: int) -> Int[Tensor, "G m"]:
    """Columns dealt to the groups back and forth in the order of their total score, so none gets several large ones."""
    hands = scores.sum(0).argsort(descending=True, stable=True).cpu().view(m, -1)
    return torch.stack([hand.flip(0) if number % 2 else hand for number, hand in enumerate(hands)], 1)


def _exchanged(
    scores: Float[Tensor, "R C"], groups: Int[Tensor, "G m"], pattern: NM, generator: torch.Generator
) -> Int[Tensor, "G m"]:
    """One column taken out of every group, and all put back in the best way, as a sample of the rows sees it."""
    from scipy.optimize import linear_sum_assignment

    number, m = groups.shape
    rows = max(64, TERMS // number**2)
    if rows < len(scores):
        scores = scores[torch.randperm(len(scores), generator=generator)[:rows].to(scores.device)]
    taken = torch.randint(m, (number,), generator=generator)
    out = groups.gather(1, taken[:, None])[:, 0]
    staying = groups[torch.arange(m) != taken[:, None]].view(number, m - 1)
    # A column that joins a group adds what it has above the weakest that would be kept without it.
    others = scores[:, staying.flatten()].unflatten(1, (number, m - 1))
    weakest = others.topk(pattern.n, dim=-1).values[..., -1]
    candidates = scores[:, out]
    gains = torch.stack([(candidates - weakest[:, group : group + 1]).relu().sum(0) for group in range(number)])
    _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.cat([staying, out[torch.as_tensor(chosen)][:, None]], 1)
