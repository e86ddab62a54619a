"""Texts to windows: draws, openings, special strings, formats, and what is refused."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from models import character_tokenizer, tiny_model

import secateur
from secateur import SecateurError
from secateur.calibration.batches import calibration_batches
from secateur.calibration.documents import read_documents, shipped_text
from secateur.calibration.records import Conversation
from secateur.calibration.stream import num_sequences
from secateur.calibration.texts import encode, max_positions, opening, sample_documents
from secateur.recipe.recipe import CalibrationText

TEXT = "".join(f"line {number} of a text\n" for number in range(200))


def calibrate(source, tokenizer, config, samples=128, seq_len=None, seed=0):
    """Batches with the options of a text as keywords."""
    return calibration_batches(source, tokenizer, config, CalibrationText(samples=samples, seq_len=seq_len), seed)


def config(positions=None):
    inner = SimpleNamespace(max_position_embeddings=positions, vocab_size=128)
    return SimpleNamespace(get_text_config=lambda: inner)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def windows(calibration):
    return torch.cat([batch["input_ids"] for batch in calibration.batches])


def test_windows_are_disjoint_pieces_of_the_text(text_file):
    found = calibrate(text_file, character_tokenizer(), config(), samples=10, seq_len=64, seed=3)
    pieces = [character_tokenizer().decode(window) for window in windows(found)]
    starts = [TEXT.index(piece) for piece in pieces]
    assert len(set(starts)) == 10
    assert all(start % 64 == 0 for start in starts)
    assert found.origin["samples"] == 10
    assert not found.notices


def test_seed_fixes_the_draw(text_file):
    def draw(seed):
        return calibrate(text_file, character_tokenizer(), config(), samples=10, seq_len=32, seed=seed)

    assert draw(1).origin["sha256"] == draw(1).origin["sha256"] != draw(2).origin["sha256"]


def test_short_text_caps_the_samples_with_a_notice(text_file):
    found = calibrate(text_file, character_tokenizer(), config(), samples=128, seq_len=1000)
    assert len(windows(found)) == len(TEXT) // 1000
    assert found.notices == [f"{text_file} holds {len(TEXT) // 1000} windows of 1000 tokens, not 128"]


def test_bos_opens_every_window(text_file):
    tokenizer = character_tokenizer(bos=True)
    assert opening(tokenizer) == [0]
    assert opening(character_tokenizer()) == []
    found = windows(calibrate(text_file, tokenizer, config(), samples=4, seq_len=16))
    assert found.shape == (4, 16)
    assert bool((found[:, 0] == 0).all())
    assert not bool((found[:, 1:] == 0).any())


def test_text_that_spells_a_special_token_stays_text():
    tokenizer = character_tokenizer()
    assert 2 in tokenizer("a<|end|>b").input_ids
    ids = encode(["a<|end|>b"], tokenizer)
    assert 2 not in ids
    assert tokenizer.decode(ids) == "a<|end|>b"


def test_default_length_is_capped_by_the_models_positions(text_file):
    assert calibrate(text_file, character_tokenizer(), config(48), samples=2).origin["seq_len"] == 48


@pytest.mark.parametrize("family", ["Roberta", "XLMRobertaXL", "MPNet", "Luke", "Esm", "Bert"])
def test_a_window_of_all_positions_is_what_the_model_takes(family):
    """RoBERTa's relatives count positions from behind the padding token's id."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    made = getattr(transformers, f"{family}Config")(vocab_size=9, max_position_embeddings=12, pad_token_id=1, **sizes)
    model, most = transformers.AutoModel.from_config(made).eval(), max_positions(made)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_jsonl_text_and_messages(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps({"text": "abc"}) + "\n\n" + json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    )
    ids = encode(read_documents(path), character_tokenizer(chat=True))
    assert character_tokenizer().decode(ids, skip_special_tokens=False) == "abchi<|end|>"
    assert int(ids[-1]) == 2, "the chat template's special tokens are special"
    with pytest.raises(ValueError, match="no chat template"):
        encode(read_documents(path), character_tokenizer())


def test_json_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_documents(path)) == ["one\u2028two"]


def test_a_bos_of_the_chat_template_is_not_doubled():
    tokenizer = character_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = encode([Conversation([{"role": "user", "content": "hi"}])], tokenizer)
    assert 0 not in ids


def test_a_conversation_that_the_chat_template_refuses_is_named():
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SecateurError, match=r"refuses a conversation \(roles must alternate; roles: user, user\)"):
        encode([Conversation([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])], tokenizer)


def test_a_text_without_a_name_is_refused():
    with pytest.raises(SecateurError, match="name is empty"):
        list(read_documents(""))


@pytest.fixture
def rows_of_data_sets(monkeypatch):
    """A stand-in for the library of data sets that gives these rows of any split, shuffled in reverse."""
    rows = [
        {"text": " = A =\n", "sentence": "one"},
        {"text": "", "sentence": "two"},
        {"text": "x" * 99, "sentence": "3"},
    ]

    class Rows(list):
        def shuffle(self, **_):
            return Rows(reversed(self))

    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **options: Rows({**row, "split": options["split"]} for row in rows)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("rows_of_data_sets")
@pytest.mark.parametrize("evaluation", [True, False])
def test_lines_of_wikitext_and_ptb_are_one_text_joined_as_gptq_and_sparsegpt_do(evaluation):
    assert list(read_documents("wikitext2", evaluation=evaluation)) == [" = A =\n\n\n\n\n" + "x" * 99]
    assert list(read_documents("ptb", evaluation=evaluation)) == ["one two 3"]


@pytest.mark.usefixtures("rows_of_data_sets")
def test_documents_of_c4_are_drawn_one_by_one_and_joined_to_evaluate():
    assert list(read_documents("c4")) == ["x" * 99, "", " = A =\n"]
    assert list(read_documents("c4", evaluation=True)) == [" = A =\n  " + "x" * 99]


def test_data_set_streams_stop_at_the_limit(monkeypatch):
    read = []

    class Stream:
        def shuffle(self, **_):
            return self

        def __iter__(self):
            for number in range(10_000):
                read.append(number)
                yield {"text": "abcdefgh" * 4}

    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **options: read.append(options["split"]) or Stream()
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = calibrate("c4", character_tokenizer(), config(), samples=4, seq_len=16)
    assert read[0] == "train"
    assert len(read) < 10
    assert found.origin["samples"] == 4
    read.clear()
    assert len(next(iter(read_documents("c4", evaluation=True)))) == 1100 * 33 - 1
    assert (read[0], len(read)) == ("validation", 1101)


def test_folder_is_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "a.jsonl").write_text('{"text": "A"}')
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert list(read_documents(tmp_path)) == ["A", "B"]


def test_shipped_texts_are_large_enough_and_apart():
    calibration, evaluation = shipped_text("calibration"), shipped_text("evaluation")
    assert len(calibration.encode()) >= 1_200_000
    assert len(evaluation) >= 200_000
    paragraphs = {text for text in calibration.split("\n\n") if len(text) > 80}
    assert not paragraphs & set(evaluation.split("\n\n"))


def test_patches_of_several_pictures_are_one_sequence():
    """A sequence is what can be cut off a batch: the allocation counts by it, and takes gradients of one at a time."""
    ids, patches = torch.zeros(2, 9), torch.zeros(50, 4)
    assert num_sequences({"input_ids": ids, "attention_mask": ids}) == 2
    assert num_sequences({"pixel_values": patches, "input_ids": ids}) == 1
    of_patches = calibrate([{"pixel_values": patches, "grid": torch.ones(2, 3)}] * 3, None, config())
    assert of_patches.origin["samples"] == 3


def test_token_tensors_and_batches_are_taken_as_they_are():
    found = calibrate([torch.arange(5), torch.ones(2, 7, dtype=torch.long)], None, config())
    assert [tuple(batch["input_ids"].shape) for batch in found.batches] == [(1, 5), (2, 7)]
    assert found.origin["samples"] == 3


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "text.txt is empty"),
        ("short", {}, "has 5 tokens, less than one sequence of 64: lower seq_len"),
        ("x" * 99, {"seq_len": 1}, "seq_len is 1: it must be greater than or equal to 2"),
        ("x" * 99, {"seq_len": 300}, "300, but the model has 256 positions"),
        ("x" * 99, {"samples": 0}, "samples is 0"),
    ],
)
def test_texts_that_cannot_serve_are_refused(tmp_path, content, options, message):
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        calibrate(path, character_tokenizer(), config(256), **({"seq_len": 64, "samples": 2} | options))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b'{"body": 1}', "line 1: neither of the fields `text`, `messages` .* only `body`: name the one"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path))


def test_missing_text_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is not a file, folder or data set name \(short names: c4, wikitext2, ptb\)"):
        list(read_documents(tmp_path / "no.txt"))
    with pytest.raises(ValueError, match="holds no text: no file ends in .txt, .jsonl"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 4),
        torch.ones(2, 4, dtype=torch.uint8),
        torch.zeros(1, 0, dtype=torch.long),
        torch.tensor([[-1, 2]]),
        torch.tensor(3),
    ],
)
def test_bad_token_tensors_are_refused(tensor):
    with pytest.raises(ValueError, match=r"tokens must be|token ids go from -1 to 2"):
        calibrate([tensor], None, config())


@pytest.mark.parametrize("text", ["The first line.\nThe second.", "word " * 2000])
def test_a_text_in_place_of_its_name_is_told(text):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="a text itself was given"):
        secateur.prune(model, pattern="50%", calibration=text, tokenizer=character_tokenizer())
    with pytest.raises(ValueError, match="a text itself was given"):
        secateur.evaluate(model, text, tokenizer=character_tokenizer())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}], "Hello there"),
        (["Hi"], "Hi"),
    ],
)
def test_messages_without_content_or_in_parts_are_read(tmp_path, content, text):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    assert list(read_documents(path)) == [Conversation([{"role": "user", "content": text}])]


@pytest.mark.parametrize(
    "message", ["hello", {"content": "no role"}, {"role": "user", "content": [{"image": "x.png"}]}]
)
def test_messages_that_are_no_text_are_named_with_their_line(tmp_path, message):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"messages": [message]}))
    with pytest.raises(secateur.SecateurError, match=r"chat.jsonl, line 2: .*(role|content)"):
        list(read_documents(path))


@pytest.mark.parametrize("form", ["one text", "records"])
def test_a_random_part_of_a_long_text_is_encoded(form, monkeypatch):
    monkeypatch.setattr("secateur.calibration.texts.LEAST_CHARACTERS", 1000)
    lines = [f"{number:09d}\n" for number in range(1000)]
    documents = ["".join(lines)] if form == "one text" else lines
    found = ["".join(sample_documents(documents, tokens=40, seed=seed)) for seed in (0, 0, 1)]  # 32 letters a token
    assert found[0] == found[1] != found[2]
    for each in found:
        kept = each.splitlines(keepends=True)
        assert kept == sorted({*kept} & {*lines}), "whole lines, in order"
        assert 128 <= len(kept) <= 130
    everything = {line for seed in range(64) for line in "".join(sample_documents(documents, 40, seed)).splitlines()}
    assert len(everything) == 1000, "every part has its chance"
    assert [*sample_documents(documents, tokens=400, seed=0)] == documents, "of a shorter one, all"


def test_a_long_text_is_encoded_in_pieces_to_the_same_tokens(monkeypatch):
    whole = encode([TEXT, ""], character_tokenizer())
    monkeypatch.setattr("secateur.calibration.texts.PIECE", 50)
    assert torch.equal(encode([TEXT, ""], character_tokenizer()), whole)
    assert torch.equal(encode([TEXT * 3], character_tokenizer(), limit=60)[:60], whole[:60])
    assert len(encode([TEXT * 3], character_tokenizer(), limit=60)) < 120
    assert len(encode([], character_tokenizer())) == 0
