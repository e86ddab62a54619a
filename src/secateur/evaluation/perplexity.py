"""Perplexity of a causal language model on a text, and its divergence from a dense one, in disjoint windows.

Each window of T tokens gives T - 1 targets; nothing is carried from one window to the next. Losses are fp32, and
logits are formed in chunks, so that a vocabulary of 262k costs megabytes and not gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.calibration.batches import BATCH_TOKENS, check_ids
from secateur.calibration.documents import read_documents
from secateur.calibration.texts import cut_windows, encode, window_length
from secateur.errors import SecateurError
from secateur.models.blocks import body_of, run_without_cache
from secateur.models.head import body_gives, kl_divergence, logits_of, position_chunks, takes_positions
from secateur.runtime.progress import Progress

DEFAULT_WINDOW = 1024
MAX_LOSS = 700.0  # nats; exp of a little more overflows a float


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on.

    Args:
        source: file or data set name; None is the shipped evaluation text.
        seq_len: tokens a window; None = 1024, or the model's positions.
        max_tokens: cap on the tokens that are read, in whole windows, at least one.
        text_field: field or column that holds the text; None = found by the form of the records.
    """

    source: str | Path | None = None
    seq_len: int | None = None
    max_tokens: int | None = None
    text_field: str | None = None


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: EvaluationText,
    progress: Progress,
) -> dict[str, Any]:
    """`exp` of the mean loss of a target over the text's windows.

    Returns:
        `perplexity`, `loss` (nats a token), `windows`, `seq_len`, `targets`, `text`.

    Raises:
        SecateurError: empty text, a text shorter than one window, or a window longer than the model's positions.
    """
    windows, name = evaluation_windows(model, tokenizer, text)
    device = next(model.parameters()).device
    total = 0.0
    for part in torch.arange(len(windows)).split(max(1, BATCH_TOKENS // windows.shape[1])):
        losses = token_losses(model, windows[part].to(device))
        if not bool(torch.isfinite(losses).all()):
            raise SecateurError(
                f"the loss of windows {int(part[0])} to {int(part[-1])} of {name} is not finite: the model is damaged"
            )
        total += _sum(losses)
        progress("evaluate", int(part[-1]) + 1, len(windows))
    return _figures(total, windows, name)


@torch.no_grad()
def perplexity_against(
    model: Any,
    dense: Any,
    tokenizer: Any,
    text: EvaluationText,
    progress: Progress,
) -> dict[str, Any]:
    """What `perplexity` gives, and how far the model's predictions are from the dense model's.

    Returns:
        The same, and `against`: `perplexity` of the dense model, `kl` (mean `KL(dense || model)` a position, nats) and
        `top1_agreement` (share of positions where both find the same token most likely). The last two are far more
        sensitive than task accuracy.

    Raises:
        SecateurError: one model twice, models with different vocabularies or on two devices, and what `perplexity`
            raises.

    Cost: one forward pass of each model.
    """
    if model is dense:
        raise SecateurError("a model can't be compared with itself: give the dense model it was pruned from")
    sizes = [each.config.get_text_config().vocab_size for each in (model, dense)]
    if sizes[0] != sizes[1]:
        raise SecateurError(
            f"the model has a vocabulary of {sizes[0]} and the dense one of {sizes[1]}: they can't be compared"
        )
    ours_on, dense_on = (next(each.parameters()).device for each in (model, dense))
    if ours_on != dense_on:
        raise SecateurError(f"the model is on {ours_on} and the dense one on {dense_on}: put both on one device")
    windows, name = evaluation_windows(model, tokenizer, text)
    kl, agreeing, loss, dense_loss = 0.0, 0, 0.0, 0.0
    for index, window in enumerate(windows):
        ids = window[None].to(next(model.parameters()).device)
        for chunk, ours, theirs in _both_logits(model, dense, ids):
            log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
            kls = kl_divergence(log_p, log_q)
            if not bool(torch.isfinite(kls).all()):
                raise SecateurError(f"the predictions in window {index} of {name} are not finite: a model is damaged")
            targets = ids[0, chunk + 1][:, None]
            kl += _sum(kls)
            loss -= _sum(log_q.gather(1, targets))
            dense_loss -= _sum(log_p.gather(1, targets))
            agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        progress("evaluate", index + 1, len(windows))
    figures = _figures(loss, windows, name)
    positions = figures["targets"]
    against = {
        "perplexity": math.exp(min(dense_loss / positions, MAX_LOSS)),
        "kl": kl / positions,
        "top1_agreement": agreeing / positions,
    }
    return figures | {"against": against}


def _figures(total: float, windows: Int[Tensor, "N T"], name: str) -> dict[str, Any]:
    """What `perplexity` returns, from the sum of the losses in nats.

    Raises:
        SecateurError: their mean is above `MAX_LOSS`.
    """
    number, length = windows.shape
    targets = number * (length - 1)
    loss = total / targets
    if loss > MAX_LOSS:
        raise SecateurError(f"the loss on {name} is {loss:.0f} nats a token: the model is damaged")
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "windows": number,
        "seq_len": length,
        "targets": targets,
        "text": name,
    }


def _sum(values: Tensor) -> float:
    return float(values.cpu().double().sum())


def evaluation_windows(model: Any, tokenizer: Any, text: EvaluationText) -> tuple[Int[Tensor, "N T"], str]:
    """Disjoint windows of a text in order, and its name.

    Raises:
        SecateurError: empty text, a text shorter than one window, or a window longer than the model's positions.
    """
    length, most = window_length(text.seq_len, DEFAULT_WINDOW, model.config), text.max_tokens
    if most is not None and most < 1:
        raise SecateurError(f"‹max_tokens› is {most}; it must be at least 1")
    name = "the shipped evaluation text" if text.source is None else str(text.source)
    documents = read_documents(text.source, evaluation=True, text_field=text.text_field)
    windows = cut_windows(
        encode(documents, tokenizer, None if most is None else max(most, length)), length, tokenizer, name
    )
    check_ids(windows, model.config)
    return windows if most is None else windows[: max(1, most // length)], name


def _both_logits(model: Any, dense: Any, ids: Int[Tensor, "1 T"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of positions with the fp32 logits of both models."""
    chunks = position_chunks(model, ids.shape[1] - 1, 2, ids.device)
    chunked = len(chunks) > 1
    with _body_runs_once(model, ids, chunked) as ours, _body_runs_once(dense, ids, chunked) as theirs:
        for chunk in chunks:
            yield chunk, ours(chunk)[0].float(), theirs(chunk)[0].float()


def token_losses(model: Any, ids: Int[Tensor, "B T"]) -> Float[Tensor, " N"]:
    """Cross-entropy of each next token, B (T - 1) of them, in nats."""
    targets = ids[:, 1:]
    chunks = position_chunks(model, ids.shape[1] - 1, len(ids), ids.device)
    losses = []
    with _body_runs_once(model, ids, chunked=len(chunks) > 1) as logits_at:
        for chunk in chunks:
            logits = logits_at(chunk).float()
            losses.append(
                nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, chunk].flatten(), reduction="none")
            )
    return torch.cat(losses)


@contextmanager
def _body_runs_once(model: Any, ids: Tensor, chunked: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from positions to logits, all at once or chunk by chunk.

    Raises:
        SecateurError: the model has no logits.
    """
    if not chunked or not takes_positions(model):
        output = run_without_cache(model, model, input_ids=ids)
        if not hasattr(output, "logits"):
            raise SecateurError(f"{type(model).__name__} gives no logits: perplexity is of causal language models")
        logits = output.logits
        yield lambda positions: logits[:, positions]
        return
    with body_gives(model, run_without_cache(model, body_of(model), input_ids=ids)):
        yield lambda positions: logits_of(model, {"input_ids": ids}, positions)
