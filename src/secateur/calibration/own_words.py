"""Calibration text that the dense model writes itself, sampled from its own predictions.

A pruned model is to predict what the dense one predicts, so text of the dense model's making is of the right domain
where no other text is: the model's own chats, or its own chains of thought (LLM-QAT, arXiv 2305.17888; RAC, ICLR 2026).

Three kinds of prompts: none (the model begins with its BOS token), chats (it answers), and plain text (it
goes on).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.calibration.records import Conversation, Document
from secateur.calibration.texts import (
    PIECE,
    cut_windows,
    encode_chat,
    encode_text,
    opening,
    text_parts,
    without_opening,
)
from secateur.errors import SecateurError
from secateur.models.blocks import ForwardError, device_of, forward_errors
from secateur.models.checks import PROBE_TOKENS, check_runnable, generates, looks_ahead
from secateur.models.determinism import deterministic_forward
from secateur.models.placement import WeightPlacement
from secateur.runtime.progress import Progress

TEXT_TOKENS = 512  # of a text at most, chats aside: a token after many others costs more
SPARE = 1 / 16  # more texts than fill the windows, as some end early
PROMPT_SHARE = 8  # a plain text is cut into prompts of this part of a text
TOGETHER, TOGETHER_TOKENS = 16, 20 << 10  # texts that are written together, and more if they are short
SILENT_TEXTS = 48  # in a row, after which a model that ends every text at once is given up
SKETCH_TOKENS = 32  # that a sequence gets in a sketch of what the model would write
STAGE = "own words"
NAMED_CHARACTERS = 40  # of a chat, in messages


@dataclass(frozen=True)
class Prompts:
    """What the model goes on from.

    Args:
        ids: token ids of each prompt, with the tokens that open a text; chats come first.
        length: tokens of a window.
        chats: how many are chats.
    """

    ids: list[list[int]]
    length: int
    chats: int = 0

    def kinds(self) -> list[tuple[list[list[int]], int]]:
        """Chats and other prompts, each with the token limit of a text: a window, or `TEXT_TOKENS` for the others."""
        both = (self.ids[: self.chats], self.length), (self.ids[self.chats :], min(self.length, TEXT_TOKENS))
        return [(ids, most) for ids, most in both if ids]

    @classmethod
    def none(cls, tokenizer: Any, length: int) -> Prompts:
        """The BOS token, alone.

        Raises:
            SecateurError: the tokenizer has none, or a window has no room behind it.
        """
        start = opening(tokenizer) or [each for each in (tokenizer.bos_token_id,) if each is not None]
        if not start:
            raise SecateurError(
                "the tokenizer has no BOS token to start from: give prompts, as ‹calibration=self:PROMPTS›"
            )
        if len(start) >= length:
            raise SecateurError(
                f"texts of this tokenizer open with {len(start)} tokens, and a sequence has {length}: raise ‹seq_len›"
            )
        return cls([start], length)

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: Any, length: int, what: str, strict: bool = True) -> Prompts:
        """Chats up to the last message of a user, and the text of others in pieces.

        Args:
            documents: what to go on from.
            tokenizer: of the model.
            length: tokens of a window.
            what: name of the text in messages.
            strict: False cuts what can't be a prompt as it is into pieces: chats that are too long, or without a
                user's message.

        Raises:
            SecateurError: no text, and where strict a chat without a user's message, or a prompt as long as a window.
        """
        chats: list[list[int]] = []
        pieces: list[list[int]] = []
        size, prefix = max(1, min(length, TEXT_TOKENS) // PROMPT_SHARE), opening(tokenizer)
        for document in documents:
            if not isinstance(document, Conversation):
                for part in text_parts(document, PIECE):
                    pieces += _pieces(encode_text(part, tokenizer), prefix, size)
                continue
            question = _question(document, tokenizer)
            if strict and question is None:
                raise SecateurError(f"{what}, {_name(document)}: no message of a user, which the model could answer")
            if question is None or (not strict and len(question) >= length):
                pieces += _pieces(without_opening(encode_chat(document, tokenizer), prefix), prefix, size)
            elif len(question) >= length:
                raise SecateurError(
                    f"{what}, {_name(document)}: its prompt has {len(question)} tokens, and a sequence has {length}: "
                    f"raise ‹seq_len›, or leave the chat out"
                )
            else:
                chats.append(question)
        if not (found := [*chats, *pieces]):
            raise SecateurError(f"{what} holds no prompt: it is empty")
        if longest := [len(each) for each in found if len(each) >= length]:
            raise SecateurError(
                f"a prompt in {what} has {longest[0]} tokens, and a sequence has {length}: raise ‹seq_len›, or leave "
                f"it out"
            )
        return cls(found, length, len(chats))


@dataclass(frozen=True)
class OwnWords:
    """Sequences that the model has still to write.

    Args:
        prompts: what it goes on from.
        number: how many sequences.
        seed: of the draw.
        batch_tokens: tokens of a calibration batch.
    """

    prompts: Prompts
    number: int
    seed: int
    batch_tokens: int

    def write(self, model: Any, tokenizer: Any, placement: WeightPlacement, progress: Progress) -> Int[Tensor, "N T"]:
        """Let the dense model write them (`write_windows`)."""
        check_can_write(model)
        check_runnable(model)
        return write_windows(model, tokenizer, self.prompts, self.number, self.seed, placement, progress)

    def sketch(
        self, model: Any, tokenizer: Any, placement: WeightPlacement, progress: Progress
    ) -> tuple[Int[Tensor, "N T"], float]:
        """Windows that stand for what the model would write, and about how many seconds that takes.

        A few tokens are written, and repeated.
        """
        prompts, wanted = self.prompts, self.number * self.prompts.length
        every = sorted((len(each), most, each) for ids, most in prompts.kinds() for each in ids)
        usual, most, _ = every[len(every) // 2]  # the median
        alike = [each for length, its_most, each in every if (length, its_most) == (usual, most)]
        new = min(SKETCH_TOKENS, most - usual)
        together = min(_texts(wanted, most), _most_together(most))
        few = replace(self, prompts=Prompts(alike, usual + new, len(alike)), number=max(1, int(together / (1 + SPARE))))
        started = time.perf_counter()
        written = few.write(model, tokenizer, placement, progress).flatten()
        seconds = time.perf_counter() - started
        whole = written.repeat(-(-wanted // len(written)))[:wanted].view(self.number, prompts.length)
        return whole, seconds * (most - usual) / new * -(-_texts(wanted, most) // together)


def _name(chat: Conversation) -> str:
    """A chat as messages call it. Its number would not do: of a long text only some chats are looked at."""
    first = next((str(each.get("content")) for each in chat.messages if each.get("content")), "")
    return f"the chat that begins {' '.join(first.split())[:NAMED_CHARACTERS]!r}"


def _question(chat: Conversation, tokenizer: Any) -> list[int] | None:
    """A chat up to the last message of a user, and what opens the answer; None without such a message."""
    last = max((number for number, each in enumerate(chat.messages) if each["role"] == "user"), default=-1)
    if last < 0:
        return None
    return encode_chat(Conversation(chat.messages[: last + 1], chat.tools), tokenizer, answer=True)


def _pieces(ids: list[int], prefix: list[int], size: int) -> list[list[int]]:
    """Pieces of a text of equal size, each with what opens a text; a text shorter than that is one piece."""
    starts = range(0, max(1, len(ids) - size + 1), size) if ids else ()
    return [[*prefix, *ids[start : start + size]] for start in starts]


@torch.no_grad()
def why_silent(model: Any, placement: WeightPlacement) -> str | None:
    """Why a model writes no text; None where it does: it generates, and no prediction depends on a later token.

    Cost: a few forward passes over a few tokens.
    """
    if not generates(model):
        return f"{type(model).__name__} generates none"
    check_runnable(model)
    with deterministic_forward(model), placement.onload_model(model), _plain_generation(model):
        few = torch.ones(2, PROBE_TOKENS, dtype=torch.long, device=device_of(model))
        try:
            _sampled(model, few, torch.ones_like(few), 2)
            return "its predictions depend on later tokens" if looks_ahead(model) else None
        except ForwardError as error:
            return f"its generate() fails: {error.raw}"


def check_can_write(model: Any) -> None:
    """Check that a model generates text.

    Raises:
        SecateurError: it does not.
    """
    if not generates(model):
        raise SecateurError(
            f"{type(model).__name__} can't write text: ‹calibration=self› is for causal language models"
        )


@torch.no_grad()
def write_windows(
    model: Any, tokenizer: Any, prompts: Prompts, number: int, seed: int, placement: WeightPlacement, progress: Progress
) -> Int[Tensor, "N T"]:
    """Windows of text that a model writes, prompts included.

    Tokens are drawn from the model's predictions as they are (temperature 1). A text ends where the model ends it, or
    where the longest one of its batch has as many tokens as a text may have. Texts are joined, and cut into windows.
    Prompts are taken in a shuffled order, and again where more text is needed.

    Args:
        model: the dense model.
        tokenizer: of the model.
        prompts: what to go on from.
        number: N.
        seed: of the order and the draw.
        placement: where the weights are.
        progress: called with the stage, the tokens written, and their total.

    Raises:
        SecateurError: a model that ends every text at once.

    Cost: a forward pass of the model for each new token of the texts that are written together, with a cache of keys
    and values.
    """
    prefix, written, texts = opening(tokenizer), list[int](), 0
    wanted = number * (prompts.length - len(prefix))
    ends, silent, chance = _ends(model, tokenizer), 0, random.Random(seed)
    with deterministic_forward(model), placement.onload_model(model), _plain_generation(model):
        torch.manual_seed(seed)
        for batch, most in _endless_batches(prompts, wanted, len(prefix), seed):
            usual = len(written) / texts if texts else most - len(prefix)
            chosen = chance.sample(batch, min(len(batch), _texts(wanted - len(written), usual)))
            for prompt, text in zip(chosen, _go_on(model, tokenizer, chosen, most, ends), strict=True):
                silent = silent + 1 if text[len(prompt)] in ends else 0
                written += without_opening(text, prefix)
            texts += len(chosen)
            if silent >= SILENT_TEXTS:
                raise SecateurError("the model ends every text at once: give other prompts, or a text")
            progress(STAGE, min(len(written), wanted), wanted)
            if len(written) >= wanted:
                break
    return cut_windows(torch.tensor(written[:wanted]), prompts.length, tokenizer, "what the model wrote")


def _texts(tokens: int, usual: int | float) -> int:
    """Texts of a usual length that hold a number of tokens, with some to spare."""
    return math.ceil((1 + SPARE) * tokens / max(1, usual))


def _most_together(most: int) -> int:
    """Texts that are written together, where a text has a number of tokens at most."""
    return max(TOGETHER, TOGETHER_TOKENS // most)


def _endless_batches(
    prompts: Prompts, wanted: int, opening_tokens: int, seed: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Endless shuffled batches of prompts of one kind and similar length, each with the token limit of a text.

    A long prompt shortens the texts of its batch.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        batches: list[tuple[list[list[int]], int]] = []
        for ids, most in prompts.kinds():
            together = min(_most_together(most), _texts(wanted, most - opening_tokens))
            order = torch.randperm(len(ids), generator=generator).tolist()
            chosen = sorted((ids[index] for index in order * -(-together // len(order))), key=len)
            starts = range(0, len(chosen) - together + 1, together)
            batches += [(chosen[start : start + together], most) for start in starts]
            if len(chosen) % together:
                batches.append((chosen[-together:], most))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Within this context the model's own settings of generation, such as a penalty of repetitions, are off."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _go_on(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], length: int, ends: Sequence[int]
) -> list[list[int]]:
    """Each prompt with what the model writes after it, until it ends or the longest has `length` tokens."""
    # Any token does, as it is masked. One that was added to the tokenizer alone has no embedding.
    known = range(len(model.get_input_embeddings().weight))
    pad = next((each for each in (tokenizer.pad_token_id, *ends) if each in known), 0)
    longest = max(map(len, prompts))
    device = device_of(model)
    ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=device)
    rows = _sampled(model, ids, mask, length - longest, ends, pad)[:, longest:].tolist()
    return [[*prompt, *_until_end(row, ends)] for prompt, row in zip(prompts, rows, strict=True)]


def _sampled(
    model: Any, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], new: int, ends: Sequence[int] = (), pad: int = 0
) -> Int[Tensor, "B N"]:
    """Token ids with those that the model draws after them, from its predictions as they are."""
    from transformers import GenerationConfig

    options = GenerationConfig(
        do_sample=True,
        use_cache=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
    )
    with forward_errors(model):
        return model.generate(ids, attention_mask=mask, generation_config=options)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's, or else the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else list(named) if isinstance(named, list | tuple) else [named]


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """A row up to its end, that token included."""
    places = [place for place, token in enumerate(row) if token in ends]
    return row[: places[0] + 1] if places else row
