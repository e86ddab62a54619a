"""Texts to token windows.

Documents are encoded one by one, joined, and cut into disjoint windows; each window opens with what the tokenizer puts
in front of a text (BOS for Gemma and Llama, nothing for SmolLM2). Plain text that merely spells a special token, such
as `<|endoftext|>` on a web page, stays ordinary text; in conversations the chat template's tokens are special.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.records import Conversation, Document
from secateur.errors import SecateurError
from secateur.runtime.messages import first_line

PIECE = 1 << 21  # characters that are encoded at once: a tokenizer takes more than 100 bytes for each
LEAST_CHARACTERS = 1 << 22  # of a text, which are always looked at
CHARACTERS_A_TOKEN = 32  # that are looked at for each token that is wanted: eight times what a token has
PARTS = 64  # that a document is cut into where it alone is longer than that
COUNT_FROM_PADDING = (  # model types whose first token has the position behind the padding token's id, where absolute
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def sample_documents(documents: Iterable[Document], tokens: int, seed: int) -> Iterator[Document]:
    """Documents in order: all, or random ones of a text that is much longer than `tokens` tokens.

    Reading a text is fast, and encoding it is not.

    Args:
        documents: of the text; all are read.
        tokens: how many are wanted.
        seed: of the draw.
    """
    most = max(LEAST_CHARACTERS, CHARACTERS_A_TOKEN * tokens)
    draw, held = random.Random(seed), 0
    kept: list[tuple[float, int, Document]] = []  # a heap: what is dropped next comes first
    parts = (part for document in documents for part in _parts(document, most, most // PARTS))
    for number, part in enumerate(parts):
        heappush(kept, (draw.random(), number, part))
        held += _characters(part)
        while held - _characters(kept[0][2]) >= most:
            held -= _characters(heappop(kept)[2])
    for _, _, part in sorted(kept, key=lambda each: each[1]):
        yield part


def _parts(document: Document, most: int, size: int) -> Iterator[Document]:
    """A document, or pieces of `size` characters of a text longer than `most`."""
    if isinstance(document, Conversation) or len(document) <= most:
        yield document
    else:
        yield from text_parts(document, size)


def text_parts(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, which end with a line where one ends."""
    start = 0
    while start < len(text):
        end = min(len(text), start + size)
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _characters(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message.get("content"))) for message in document.messages)


def encode(documents: Iterable[Document], tokenizer: Any, limit: int | None = None) -> Tensor:
    """Token ids of all documents in a row, cut at about `limit`."""
    ids, prefix = array("q"), opening(tokenizer)
    for part in (part for document in documents for part in _parts(document, PIECE, PIECE)):
        if isinstance(part, str):
            encoded = encode_text(part, tokenizer)
        else:
            encoded = without_opening(encode_chat(part, tokenizer), prefix)  # each window gets it anyway
        ids.extend(encoded)
        if limit is not None and len(ids) >= limit:
            break
    return torch.frombuffer(ids, dtype=torch.long).clone() if ids else torch.tensor([], dtype=torch.long)


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        SecateurError: the tokenizer has no token for it.
    """
    return _ids(tokenizer, text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    with _of_tokenizers():
        return tokenizer(text, **options).input_ids


@contextmanager
def _of_tokenizers() -> Iterator[None]:
    """Explain what the tokenizers library raises, which is a plain `Exception`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise SecateurError(f"the model's tokenizer can't encode the text ({error}): it is damaged") from error


def encode_chat(chat: Conversation, tokenizer: Any, answer: bool = False) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template; `answer` adds what opens the next answer.

    Raises:
        SecateurError: there is no template, or it fails on the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SecateurError(
            "the texts are chats, but the tokenizer has no chat template: use a `text` field, or the tokenizer of a "
            "chat model"
        )
    from jinja2 import TemplateError

    try:
        with _of_tokenizers():
            return tokenizer.apply_chat_template(
                chat.messages, tools=chat.tools, tokenize=True, return_dict=False, add_generation_prompt=answer
            )
    except (TemplateError, TypeError, ValueError) as error:  # a template is code, and some choose among several
        roles = ", ".join(message["role"] for message in chat.messages[:6])
        raise SecateurError(
            f"the model's chat template refuses a conversation ({first_line(error)}; roles: {roles}): change it, or "
            f"use `text`"
        ) from error


def opening(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts in front of a text."""
    plain, whole = _ids(tokenizer, "a", add_special_tokens=False), _ids(tokenizer, "a")
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def without_opening(ids: list[int], prefix: list[int]) -> list[int]:
    """Token ids without what opens a text, as chat templates write it too."""
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids


def cut_windows(ids: Tensor, length: int, tokenizer: Any, what: str) -> Tensor:
    """Disjoint windows (N, length) in order, each with the opening in front; what is left over is dropped.

    Raises:
        SecateurError: an empty text, or one shorter than a window.
    """
    if len(ids) == 0:
        raise SecateurError(f"{what} is empty: there is no text to use")
    prefix = opening(tokenizer)
    body = length - len(prefix)
    if body < 1:
        raise SecateurError(
            f"a sequence length of {length} leaves no room after the tokenizer's {len(prefix)} opening tokens"
        )
    number = len(ids) // body
    if number == 0:
        raise SecateurError(
            f"{what} has {len(ids)} tokens, less than one sequence of {length}: lower ‹seq_len› or give more text"
        )
    return torch.cat(
        [torch.tensor(prefix, dtype=torch.long).repeat(number, 1), ids[: number * body].view(number, body)], 1
    )


def max_positions(config: Any) -> int | None:
    """Positions of a model; None where it has no limit."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    if not positions or positions < 0:  # XLNet's -1 means no limit
        return None
    kind = getattr(text_config, "model_type", None)
    is_absolute = getattr(text_config, "position_embedding_type", "absolute") == "absolute"
    counts_from_padding = kind in COUNT_FROM_PADDING and is_absolute
    return positions - text_config.pad_token_id - 1 if counts_from_padding else positions


def window_length(seq_len: int | None, default: int, config: Any) -> int:
    """Tokens of a window: what was asked for, or the default, capped by the model's positions.

    Raises:
        SecateurError: fewer than 2 tokens, or more than the model has positions.
    """
    positions = max_positions(config)
    if seq_len is None:
        return min(default, positions or default)
    if not isinstance(seq_len, int) or seq_len < 2:
        raise SecateurError(f"‹seq_len› is {seq_len!r}: it must be a whole number of 2 or more")
    if positions is not None and seq_len > positions:
        raise SecateurError(f"‹seq_len› is {seq_len}, but the model has {positions} positions: lower ‹seq_len›")
    return seq_len
