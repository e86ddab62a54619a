"""Calibration batches: token windows of a text, or the caller's tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.calibration.documents import (
    check_is_name,
    is_own_words,
    is_self_alone,
    is_stream,
    name_of,
    read_documents,
    text_of,
)
from secateur.calibration.own_words import OwnWords, Prompts
from secateur.calibration.stream import Batch, num_sequences
from secateur.calibration.texts import cut_windows, encode, max_positions, sample_documents, window_length
from secateur.errors import SecateurError
from secateur.recipe.patterns import Pattern, Unstructured, is_severe
from secateur.recipe.recipe import MOST_OWN_TOKENS, OWN_BATCHES, CalibrationText

DEFAULT_SEQ_LEN = 2048
BATCH_TOKENS = 2048  # of a forward pass; wider ones are not faster, and scans over positions (Mamba) get more steps
MIN_BATCHES = 8  # where there are as many windows
AUTO = "auto"  # the model's own words are as many as suit the text and the pattern
OWN_WORDS_A_SAMPLE = 2  # sequences, where `is_severe`

HALF = Unstructured(0.5)

CalibrationSource = str | Path | Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None


@dataclass(frozen=True)
class CalibrationBatches:
    """Batches of a run.

    Args:
        batches: keyword inputs of the model. While it has text to write, all drawn windows are one batch (or there is
            none), which is not to be run: `with_written` cuts it.
        origin: where they came from: `source`, `samples`, `seq_len`, `seed`, `sha256` (of the prompts too, where the
            model writes its text).
        notices: what the user should know about them.
        to_write: the sequences that the model has still to write.
    """

    batches: list[Batch]
    origin: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    to_write: OwnWords | None = None

    @property
    def num_tokens(self) -> int:
        """Token ids in the batches, padding and what the model has still to write included; 0 of other inputs."""
        written = 0 if self.to_write is None else self.to_write.number * self.to_write.prompts.length
        return written + sum(batch["input_ids"].numel() for batch in self.batches if "input_ids" in batch)

    def with_written(self, windows: Int[Tensor, "N T"]) -> CalibrationBatches:
        """All batches, once the model has written its sequences."""
        assert self.to_write is not None
        everything = torch.cat([windows, *(batch["input_ids"] for batch in self.batches)])
        generator = torch.Generator().manual_seed(self.to_write.seed)
        batches = _batched(everything[torch.randperm(len(everything), generator=generator)], self.to_write.batch_tokens)
        origin = self.origin | {"written": len(windows), "written_sha256": _digest([{"input_ids": windows}])}
        return CalibrationBatches(batches, origin, self.notices)


def calibration_batches(
    source: CalibrationSource,
    tokenizer: Any,
    config: Any,
    options: CalibrationText,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    can_write: bool = False,
    pattern: Pattern = HALF,
) -> CalibrationBatches:
    """Calibration batches from a text, or from the caller's token tensors or batches.

    Args:
        source: text file, folder of texts, JSONL, data set name, tensors of token ids, batches, or None for the shipped
            text; `self` or `self:PROMPTS` for text that the model writes.
        tokenizer: of the model; not needed for tensors.
        config: of the model.
        options: how many windows, and of how many tokens; its `source` is not looked at. Where the text holds fewer
            windows, all are taken, with a notice.
        seed: fixes which windows are drawn, and in which order.
        batch_tokens: tokens a batch, in whole windows, at least one.
        can_write: whether the model writes text, for `own_words: auto`.
        pattern: of the run, for the same.

    Raises:
        SecateurError: nothing to read, a text shorter than a window, a window longer than the model's positions, or
            prompts that leave no room for an answer.
    """
    if source is not None and not isinstance(source, str | Path):
        _check_no_text_options(options)
        return _from_tensors(source, config)
    check_is_name(source)
    if source == OWN_BATCHES and not Path(OWN_BATCHES).exists():
        raise SecateurError(
            "the recipe was made for batches of tensors, which no file holds: pass them as ‹calibration›, or name a "
            "text"
        )
    if tokenizer is None:
        raise SecateurError(
            "the model has no tokenizer, which a text needs: pass ‹tokenizer›, or token tensors as ‹calibration›"
        )
    length = window_length(options.seq_len, DEFAULT_SEQ_LEN, config)
    if source is not None and is_own_words(source):
        return _all_own_words(source, tokenizer, config, options, length, seed, batch_tokens)
    drawn, notices = _draw(source, tokenizer, config, options, length, seed)
    origin = {"source": name_of(source), "samples": len(drawn), "seq_len": length, "seed": seed}
    number = _own_words_on_top(options, length, can_write, pattern)
    if not number:
        batches = _batched(drawn, batch_tokens)
        return CalibrationBatches(batches, origin | {"sha256": _digest(batches)}, notices)
    prompts = _prompts(source, tokenizer, config, options, length, seed)
    to_write = OwnWords(prompts, number, seed, batch_tokens)
    batches = [{"input_ids": drawn}]
    origin |= {"samples": len(drawn) + number, "sha256": _digest([*batches, *_asked(to_write)])}
    return CalibrationBatches(batches, origin, notices, to_write)


def _check_no_text_options(options: CalibrationText) -> None:
    """Check that no option asks for what is done with a text only.

    Raises:
        SecateurError: one does.
    """
    if options.own_words and options.own_words != AUTO:
        raise SecateurError(
            f"calibration.own_words={options.own_words} lets the model go on from a text, and ‹calibration› holds "
            f"tensors: name a text"
        )
    for name in ("samples", "seq_len", "text_field"):
        if (value := getattr(options, name)) != getattr(CalibrationText(), name):
            raise SecateurError(
                f"‹{name}={value}› is for a text, and ‹calibration› holds tensors, of which all are taken: leave it "
                f"out of the request, and of the recipe"
            )


def _own_words_on_top(options: CalibrationText, length: int, can_write: bool, pattern: Pattern) -> int:
    """Sequences that the model writes on top of those of a text."""
    if options.own_words == AUTO:
        wanted = options.samples * (OWN_WORDS_A_SAMPLE if is_severe(pattern) else 1)
        return min(wanted, max(1, MOST_OWN_TOKENS // length)) if can_write else 0
    return options.own_words or 0


def _all_own_words(
    source: str | Path, tokenizer: Any, config: Any, options: CalibrationText, length: int, seed: int, batch_tokens: int
) -> CalibrationBatches:
    """What the model is to write, all of it.

    Raises:
        SecateurError: a number of sequences on top, of `self`.
    """
    if options.own_words not in (None, AUTO):
        raise SecateurError(
            f"calibration.own_words={options.own_words} adds to a text, and ‹calibration=self› lets the model write "
            f"every sequence: leave one of them out"
        )
    if is_self_alone(source):
        prompts = Prompts.none(tokenizer, length)
    else:
        prompts = _prompts(source, tokenizer, config, options, length, seed)
    to_write = OwnWords(prompts, options.samples, seed, batch_tokens)
    origin = {"source": name_of(source), "samples": options.samples, "seq_len": length, "seed": seed}
    return CalibrationBatches([], origin | {"sha256": _digest(_asked(to_write))}, [], to_write)


def _prompts(
    source: str | Path | None, tokenizer: Any, config: Any, options: CalibrationText, length: int, seed: int
) -> Prompts:
    """What the model goes on from, of a text."""
    place = text_of(source)
    documents = read_documents(place, seed, text_field=options.text_field)
    if is_stream(place):
        documents = islice(documents, options.samples)
    else:
        documents = sample_documents(documents, options.samples * length, seed)
    is_asked_for = is_own_words(source) or options.own_words != AUTO
    prompts = Prompts.of(documents, tokenizer, length, name_of(place), strict=is_asked_for)
    check_ids(torch.tensor([token for each in prompts.ids for token in each]), config, is_row=False)
    return prompts


def _asked(to_write: OwnWords) -> list[Batch]:
    """What decides what the model writes, as tensors."""
    prompts = to_write.prompts
    asked = {"asked": torch.tensor([to_write.number, prompts.length, prompts.chats, to_write.seed])}
    return [asked, *({"input_ids": torch.tensor(each)} for each in prompts.ids)]


def _draw(
    source: str | Path | None, tokenizer: Any, config: Any, options: CalibrationText, length: int, seed: int
) -> tuple[Int[Tensor, "N T"], list[str]]:
    """Windows drawn from a text, and what the user should know."""
    number = options.samples
    wanted, documents = number * length, read_documents(source, seed, text_field=options.text_field)
    if is_stream(source):
        ids = encode(documents, tokenizer, wanted)
    else:
        ids = encode(sample_documents(documents, wanted, seed), tokenizer)
    windows = cut_windows(ids, length, tokenizer, what=name_of(source))
    check_ids(windows, config)
    drawn = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:number]]
    if len(drawn) == number:
        return drawn, []
    return drawn, [f"{name_of(source)} holds {len(drawn)} windows of {length} tokens, not {number}"]


def _batched(windows: Int[Tensor, "N T"], batch_tokens: int) -> list[Batch]:
    size = max(1, min(batch_tokens // windows.shape[1], len(windows) // MIN_BATCHES))
    return [{"input_ids": part} for part in windows.split(size)]


def _from_tensors(source: Any, config: Any) -> CalibrationBatches:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise SecateurError(
            f"‹calibration› is a {type(source).__name__}: give a text's name, token tensors, or a list of batches, "
            f"such as [tokenizer(TEXT, return_tensors='pt')]"
        )
    batches: list[Batch] = []
    for number, item in enumerate(source, 1):
        batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
        if wrong := [each for each in batch.values() if not isinstance(each, Tensor)] or [None] * (not batch):
            raise SecateurError(
                f"item {number} of the calibration data is or holds a {type(wrong[0]).__name__}: items are tensors of "
                f"token ids, or keyword batches of tensors, as tokenizer(TEXT, return_tensors='pt') gives them; a text "
                f"file is given by its name"
            )
        if (mask := batch.get("attention_mask")) is not None and not mask.any():
            raise SecateurError(f"item {number} of the calibration data is all padding: leave it out")
        for_decoder = any(name.startswith("decoder_") for name in batch)
        if "labels" in batch and getattr(config, "is_encoder_decoder", False) and not for_decoder:
            raise SecateurError(
                "a calibration batch has labels and nothing for the decoder to read: add decoder_input_ids, as "
                "model.prepare_decoder_input_ids_from_labels(labels) gives them"
            )
        if "input_ids" in batch:
            check_ids(batch["input_ids"], config)
            if batch["input_ids"].ndim == 1:  # one sequence, as rows of a data set are
                batch = {name: value[None] if value.ndim == 1 else value for name, value in batch.items()}
        if alone := [name for name, value in batch.items() if value.ndim == 0]:
            raise SecateurError(
                f"{alone[0]} in a calibration batch is a single number: each tensor has a batch dimension"
            )
        batches.append(batch)
    if not batches:
        raise SecateurError("the list of calibration tensors is empty")
    origin = {"source": "token tensors", "samples": sum(map(num_sequences, batches))}
    return CalibrationBatches(batches, origin | {"sha256": _digest(batches)})


def check_ids(ids: Tensor, config: Any, is_row: bool = True) -> None:
    """Check that token ids are of the model: dtype, shape, vocabulary, and length where they are a model's input.

    Raises:
        SecateurError: they are not.
    """
    if ids.dtype not in (torch.int32, torch.int64) or ids.numel() == 0 or ids.ndim not in (1, 2):
        raise SecateurError(
            f"tokens must be non-empty int64 or int32 tensors (T) or (B, T), not {tuple(ids.shape)} of {ids.dtype}; "
            f"other inputs go in dicts, such as {{'pixel_values': tensor}}"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if int(ids.min()) < 0 or (vocabulary and int(ids.max()) >= vocabulary):
        raise SecateurError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has {vocabulary}: is "
            f"the tokenizer its own?"
        )
    positions = max_positions(config)
    if is_row and positions and ids.shape[-1] > positions:
        raise SecateurError(
            f"the tensors hold {ids.shape[-1]} tokens, but the model has {positions} positions: cut them"
        )


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
