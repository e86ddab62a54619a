"""The end of a model: from its body's output to logits.

The model's own forward forms the logits (it may scale or cap them): the body's output is kept and handed to it again,
so only the head runs. Logits are formed for chunks of positions, so that a vocabulary of 262k costs megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.models.blocks import body_of, config_of, replaced_forward, run_without_cache

ALL = slice(None)
LOGIT_ELEMENTS = 3 << 21  # fp32 logits at a time: 24 MB, which stay on the heap and nearly in cache


def has_head(model: nn.Module) -> bool:
    """Whether the model keeps a head apart from its body."""
    return body_of(model) is not model


def takes_positions(model: nn.Module) -> bool:
    """Whether the model forms the logits of chosen positions alone."""
    return has_head(model) and "logits_to_keep" in signature(model.forward).parameters


@contextmanager
def body_gives(model: nn.Module, output: Any) -> Iterator[None]:
    """Within this context the model's body does not run, and gives this output."""
    with replaced_forward(body_of(model), lambda *_args, **_kwargs: output):
        yield


def body_output_with(body_output: Any, hidden: Tensor) -> Any:
    """The body's output with other hidden states."""
    return type(body_output)(**{**body_output, "last_hidden_state": hidden})


def kl_divergence(log_p: Float[Tensor, "*N V"], log_q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """`KL(p || q)` from log-probabilities. A token that p rules out (-inf) adds nothing."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def logits_of(
    model: nn.Module, inputs: Mapping[str, Tensor], positions: Int[Tensor, " P"] | None = None
) -> Float[Tensor, "B P V"]:
    """The model's logits, at these positions or at all; `takes_positions` says whether positions can be chosen."""
    chosen = {} if positions is None else {"logits_to_keep": positions}
    return run_without_cache(model, model, **inputs, **chosen).logits


def position_chunks(
    model: nn.Module, length: int, rows: int, device: torch.device, share: slice = ALL
) -> Sequence[Int[Tensor, " P"]]:
    """Positions below `length`, in chunks whose fp32 logits take `LOGIT_ELEMENTS`; one chunk where all come at once.

    Args:
        model: the model.
        length: T.
        rows: sequences, or models, whose logits are held together.
        device: of the positions.
        share: which positions; all where the model gives all at once.
    """
    positions = torch.arange(length, device=device)
    if not takes_positions(model):
        return [positions]
    positions = positions[share]
    vocabulary: int = config_of(model).get_text_config().vocab_size
    return positions.split(max(1, LOGIT_ELEMENTS // (vocabulary * rows)))
