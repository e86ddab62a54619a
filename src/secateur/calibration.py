"""Texts to token windows: calibration batches and evaluation windows.

Documents are encoded one by one, joined, and cut into disjoint windows; each window opens with what the tokenizer
puts in front of a text (BOS for Gemma and Llama, nothing for SmolLM2). Plain text that merely spells a special token,
such as `<|endoftext|>` on a web page, stays ordinary text; in conversations the chat template's are special.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.capture import Batch

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
BATCH_TOKENS = 2048  # of a forward pass; wider ones are no faster, but scans over positions (Mamba) get fewer
MIN_BATCHES = 8  # where there are as many windows

Document = str | list[dict[str, str]]  # a text, or a conversation for the chat template

# Short names of the data sets that the field uses: (path, configuration, split to evaluate on, text field).
DATASETS: dict[str, tuple[str, str | None, str, str]] = {
    "c4": ("allenai/c4", "en", "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}


@dataclass
class Calibration:
    """Batches of token windows, where they came from, and what the user should know about them."""

    batches: list[Batch]
    origin: dict[str, Any]
    notices: list[str] = field(default_factory=list)


def calibrate(
    source: str | Path | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None,
    tokenizer: Any,
    config: Any,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Calibration:
    """Calibration batches from a text source, or from the caller's own token tensors or batches.

    Args:
        source: text file, folder of texts, JSONL, data set name, tensors of token ids, or None for the shipped text.
        samples: windows wanted; fewer are taken, with a notice, where the text holds fewer.
        seq_len: tokens a window; by default 2048 or the model's positions, whichever is less.
        seed: fixes which windows are drawn, and in which order.
        batch_tokens: tokens a batch, in whole windows, at least one.

    Raises:
        ValueError: nothing to read, a text shorter than one window, or a window longer than the model's positions.
    """
    if source is not None and not isinstance(source, str | Path):
        return _from_tensors(source, config)
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 calibration window is needed")
    check_is_name(source)
    if tokenizer is None:
        raise ValueError("text was given for calibration but no tokenizer: pass tokenizer=, or token tensors")
    length = window_length(seq_len, DEFAULT_SEQ_LEN, config)
    limit = samples * length if _is_dataset(source) else None
    windows = cut_windows(encode(read_documents(source, seed), tokenizer, limit), length, tokenizer, what=_name(source))
    check_ids(windows, config)
    drawn = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]]
    notices = []
    if len(drawn) < samples:
        notices.append(f"{_name(source)} holds {len(drawn)} windows of {length} tokens; {samples} were asked for")
    size = max(1, min(batch_tokens // length, len(drawn) // MIN_BATCHES))
    batches: list[Batch] = [{"input_ids": part} for part in drawn.split(size)]
    origin = {"source": _name(source), "samples": len(drawn), "seq_len": length, "seed": seed}
    return Calibration(batches, origin | {"sha256": _digest(batches)}, notices)


def shipped_text(name: str) -> str:
    """A text that the package carries: `calibration` or `evaluation`."""
    return (files("secateur") / "data" / f"{name}.txt").read_text(encoding="utf-8")


def read_documents(source: str | Path | None, seed: int = 0, held_out: bool = False) -> Iterator[Document]:
    """Documents of a text file, a folder (its .txt and .jsonl files, by name), a JSONL file or a data set.

    Args:
        seed: of the order in which a data set's training split is streamed.
        held_out: the shipped evaluation text or a data set's test split, in order, instead of what to calibrate on.
    """
    if source is None:
        yield shipped_text("evaluation" if held_out else "calibration")
        return
    path = Path(source)
    if path.is_dir():
        members = sorted(member for member in path.iterdir() if member.suffix in (".txt", ".jsonl"))
        if not members:
            raise ValueError(f"{path} holds no .txt or .jsonl file")
        for member in members:
            yield from read_documents(member)
    elif path.is_file():
        yield from _read_jsonl(path) if path.suffix in (".jsonl", ".ndjson") else [_read_text(path)]
    elif _is_dataset(source):
        yield from _stream_dataset(str(source), seed, held_out)
    else:
        raise ValueError(f"{source} is no file, folder or data set name (short names: {', '.join(DATASETS)})")


def encode(documents: Iterable[Document], tokenizer: Any, limit: int | None = None) -> Tensor:
    """Token ids of all documents in a row, at most about `limit` of them."""
    ids: list[int] = []
    for document in documents:
        if isinstance(document, str):
            encoded = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    "the JSONL holds `messages`, but the tokenizer has no chat template: use a `text` field"
                )
            encoded = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
            prefix = opening(tokenizer)  # each window gets it anyway
            encoded = encoded[len(prefix) :] if encoded[: len(prefix)] == prefix else encoded
        ids += encoded
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids, dtype=torch.long)


def opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts in front of a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def cut_windows(ids: Tensor, length: int, tokenizer: Any, what: str) -> Tensor:
    """Disjoint windows (N, length) in order, each with the opening in front; the remainder is dropped."""
    if len(ids) == 0:
        raise ValueError(f"{what} is empty: there is no text to use")
    prefix = opening(tokenizer)
    body = length - len(prefix)
    if body < 1:
        raise ValueError(
            f"a sequence length of {length} leaves no room after the tokenizer's {len(prefix)} opening tokens"
        )
    number = len(ids) // body
    if number == 0:
        raise ValueError(
            f"{what} has {len(ids)} tokens, less than one sequence of {length}: lower --seq-len or give more text"
        )
    return torch.cat(
        [torch.tensor(prefix, dtype=torch.long).repeat(number, 1), ids[: number * body].view(number, body)], 1
    )


def window_length(seq_len: int | None, default: int, config: Any) -> int:
    """The window length asked for, checked against the model's positions, or the default capped by them."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    positions = positions if positions and positions > 0 else None  # XLNet's -1 means no limit
    if seq_len is None:
        return min(default, positions or default)
    if seq_len < 2:
        raise ValueError(f"sequence length is {seq_len}; at least 2 tokens are needed")
    if positions is not None and seq_len > positions:
        raise ValueError(f"sequence length is {seq_len}, but the model has {positions} positions: lower --seq-len")
    return seq_len


def check_is_name(source: Any) -> None:
    """Raise ValueError for a text itself in place of its file's name."""
    if isinstance(source, str) and ("\n" in source or max(map(len, source.split("/"))) > LONGEST_NAME):
        raise ValueError(
            f"a text itself was given ({source[:20]!r} ...): write it to a file, and give that file's name"
        )


def _name(source: str | Path | None) -> str:
    return "the shipped text" if source is None else str(source)


def _is_dataset(source: str | Path | None) -> bool:
    """Whether a source that is no file names a data set: a short name, or `owner/name` without a text file's suffix."""
    if source is None or Path(source).exists():
        return False
    name = str(source)
    looks_like_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return name in DATASETS or (
        looks_like_one and Path(name).suffix not in _SUFFIXES and not Path(name).parent.is_dir()
    )


LONGEST_NAME = 255  # of a file, in all common file systems
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".md")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            yield record["messages"]
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
        else:
            raise ValueError(f"{path}, line {number}: neither a `text` nor a `messages` field")


def _stream_dataset(name: str, seed: int, held_out: bool) -> Iterator[str]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ValueError(f"data set {name} needs the `data` extra: pip install 'secateur[data]'") from error
    path, configuration, test_split, field_name = DATASETS.get(name, (name, None, "test", "text"))
    try:
        stream = load_dataset(path, configuration, split=test_split if held_out else "train", streaming=True)
        for record in stream if held_out else stream.shuffle(seed=seed, buffer_size=1000):
            if field_name not in record:
                raise ValueError(f"data set {name} has no field {field_name!r}, only {', '.join(record)}")
            yield record[field_name]
    except OSError as error:  # the hub's network and not-found errors all derive from it
        raise ValueError(f"data set {name} could not be read ({error}): check the name and the connection") from error


def _from_tensors(source: Sequence[Any], config: Any) -> Calibration:
    batches: list[Batch] = []
    for item in source:
        batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
        if not batch or not all(isinstance(value, Tensor) for value in batch.values()):
            raise ValueError("calibration items must be tensors of token ids, or keyword batches of tensors")
        for_decoder = any(name.startswith("decoder_") for name in batch)
        if "labels" in batch and getattr(config, "is_encoder_decoder", False) and not for_decoder:
            raise ValueError(
                "a calibration batch has labels and nothing for the decoder to read: add decoder_input_ids, as "
                "model.prepare_decoder_input_ids_from_labels(labels) gives them"
            )
        if "input_ids" in batch:
            check_ids(batch["input_ids"], config)
            if batch["input_ids"].ndim == 1:  # one sequence, as rows of a data set are
                batch = {name: value[None] if value.ndim == 1 else value for name, value in batch.items()}
        if alone := [name for name, value in batch.items() if value.ndim == 0]:
            raise ValueError(f"{alone[0]} in a calibration batch is a single number: each tensor has a batch dimension")
        batches.append(batch)
    if not batches:
        raise ValueError("the list of calibration tensors is empty")
    origin = {"source": "token tensors", "samples": sum(len(next(iter(batch.values()))) for batch in batches)}
    return Calibration(batches, origin | {"sha256": _digest(batches)})


def check_ids(ids: Tensor, config: Any) -> None:
    """Raise ValueError for what are no tokens of the model: kind, shape, vocabulary or length."""
    if ids.dtype not in (torch.int32, torch.int64) or ids.numel() == 0 or ids.ndim not in (1, 2):
        raise ValueError(
            f"tokens must be non-empty int64 or int32 tensors (T) or (B, T), not {tuple(ids.shape)} of {ids.dtype}"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if int(ids.min()) < 0 or (vocabulary and int(ids.max()) >= vocabulary):
        raise ValueError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {vocabulary}: is "
            f"the tokenizer its own?"
        )
    window_length(max(2, ids.shape[-1]), DEFAULT_SEQ_LEN, config)


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
