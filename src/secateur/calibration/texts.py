"""Texts to token windows.

Documents are encoded one by one, joined, and cut into disjoint windows; each window opens with what the tokenizer puts
in front of a text (BOS for Gemma and Llama, nothing for SmolLM2). Plain text that merely spells a special token, such
as `<|endoftext|>` on a web page, stays ordinary text; in conversations the chat template's tokens are special.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.storage.json_files import parse_json
from secateur.storage.paths import user_path

Document = str | list[dict[str, Any]]  # a text, or a conversation for the chat template
MAX_NAME = 255  # of a file, in all common file systems
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".md")

# Short names of the data sets that the field uses: (path, configuration, split to evaluate on, text field).
DATASETS: dict[str, tuple[str, str | None, str, str]] = {
    "c4": ("allenai/c4", "en", "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}


def shipped_text(name: str) -> str:
    """A text that the package carries: `calibration` or `evaluation`."""
    return (files("secateur") / "data" / f"{name}.txt").read_text(encoding="utf-8")


def read_documents(source: str | Path | None, seed: int = 0, evaluation: bool = False) -> Iterator[Document]:
    """Documents of a text file, a folder (its .txt and .jsonl files, by name), a JSONL file or a data set.

    Args:
        source: file, folder or data set name; None is the shipped text.
        seed: of the order in which a data set's training split is streamed.
        evaluation: the shipped evaluation text or a data set's test split, in order, instead of what to calibrate on.
    """
    if source is not None and not str(source).strip():
        raise SecateurError("the text's name is empty: give a file, a folder or a data set")
    if source is None:
        yield shipped_text("evaluation" if evaluation else "calibration")
        return
    path = user_path(source)
    if path.is_dir():
        members = sorted(member for member in path.iterdir() if member.suffix in (".txt", ".jsonl"))
        if not members:
            raise SecateurError(f"{path} holds no .txt or .jsonl file")
        for member in members:
            yield from read_documents(member)
    elif path.is_file():
        yield from _read_jsonl(path) if path.suffix in (".jsonl", ".ndjson") else [_read_text(path)]
    elif is_dataset(source):
        yield from _stream_dataset(str(source), seed, evaluation)
    else:
        raise SecateurError(f"{source} is not a file, folder or data set name (short names: {', '.join(DATASETS)})")


def encode(documents: Iterable[Document], tokenizer: Any, limit: int | None = None) -> Tensor:
    """Token ids of all documents in a row, cut at about `limit`."""
    ids: list[int] = []
    for document in documents:
        if isinstance(document, str):
            encoded = encode_text(document, tokenizer)
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise SecateurError(
                    "the JSONL holds `messages`, but the tokenizer has no chat template: use a `text` field"
                )
            encoded = _encode_chat(document, tokenizer)
            prefix = opening(tokenizer)  # each window gets it anyway
            encoded = encoded[len(prefix) :] if encoded[: len(prefix)] == prefix else encoded
        ids += encoded
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids, dtype=torch.long)


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        SecateurError: the tokenizer has no token for it.
    """
    try:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    except Exception as error:
        if type(error) is not Exception:  # which is all that the tokenizers library raises
            raise
        raise SecateurError(f"the model's tokenizer can't encode the text ({error}): it is damaged") from error


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template.

    Raises:
        SecateurError: the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise SecateurError(
            f"the model's chat template refuses a conversation ({error}; roles: {roles}): change it, or use `text`"
        ) from error


def opening(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts in front of a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


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
    return positions if positions and positions > 0 else None  # XLNet's -1 means no limit


def window_length(seq_len: int | None, default: int, config: Any) -> int:
    """Tokens of a window: what was asked for, or the default, capped by the model's positions.

    Raises:
        SecateurError: fewer than 2 tokens, or more than the model has positions.
    """
    positions = max_positions(config)
    if seq_len is None:
        return min(default, positions or default)
    if seq_len < 2:
        raise SecateurError(f"‹seq_len› is {seq_len}; at least 2 tokens are needed")
    if positions is not None and seq_len > positions:
        raise SecateurError(f"‹seq_len› is {seq_len}, but the model has {positions} positions: lower ‹seq_len›")
    return seq_len


def check_is_name(source: Any) -> None:
    """Check that a source is a name, and not a text itself.

    Raises:
        SecateurError: it is a text.
    """
    if isinstance(source, str) and ("\n" in source or max(map(len, source.split("/"))) > MAX_NAME):
        raise SecateurError(
            f"a text itself was given ({source[:20]!r} ...): write it to a file, and give that file's name"
        )


def name_of(source: str | Path | None) -> str:
    """What messages call a source."""
    return "the shipped text" if source is None else str(source)


def is_dataset(source: str | Path | None) -> bool:
    """Whether a source names a data set: not a file, a short name or `owner/name` without a text file's suffix."""
    if source is None or user_path(source).exists():
        return False
    name = str(source)
    looks_like_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return name in DATASETS or (
        looks_like_one and Path(name).suffix not in TEXT_SUFFIXES and not Path(name).parent.is_dir()
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SecateurError(f"{path} can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise SecateurError(f"{path}, line {number}: not JSON ({error})") from error
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            yield [_message(message, f"{path}, line {number}") for message in record["messages"]]
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
        else:
            raise SecateurError(f"{path}, line {number}: neither a `text` nor a `messages` field")


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message of a conversation whose content is text; parts of content are joined, and what is empty is "".

    Raises:
        SecateurError: a message without a role, or content that is not text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise SecateurError(f"{place}: a message needs a `role` and a `content`")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise SecateurError(f"{place}: the content of a message must be text, or a list of parts with `text`")
    return message | {"content": "".join(found)}


def _stream_dataset(name: str, seed: int, evaluation: bool) -> Iterator[str]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise SecateurError(f"data set {name} needs the `data` extra: pip install 'secateur[data]'") from error
    path, configuration, test_split, field_name = DATASETS.get(name, (name, None, "test", "text"))
    try:
        stream = load_dataset(path, configuration, split=test_split if evaluation else "train", streaming=True)
        for record in stream if evaluation else stream.shuffle(seed=seed, buffer_size=1000):
            if field_name not in record:
                raise SecateurError(f"data set {name} has no field {field_name!r}, only {', '.join(record)}")
            yield record[field_name]
    except SecateurError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # network, not found; unknown configuration or split; a script
        raise SecateurError(
            f"data set {name} could not be read ({error}): check the name and the connection"
        ) from error
