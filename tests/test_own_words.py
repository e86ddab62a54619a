"""Calibration on what the dense model writes: the draw is the model's, windows are whole, and a run keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import quiet
from models import character_tokenizer, save_checkpoint, tiny_model
from safetensors.torch import load_file

import secateur
from secateur.calibration.batches import calibration_batches
from secateur.calibration.documents import Conversation
from secateur.calibration.own_words import OwnWords, Prompts, write_windows
from secateur.errors import SecateurError
from secateur.models.placement import InMemory
from secateur.recipe.recipe import CalibrationText
from secateur.resume.kept import OWN_WORDS_FILE

SETTINGS = {"pattern": "50%", "solver": "mrp", "samples": 6, "seq_len": 24}


def written(model, tokenizer, prompts, number=4, seed=0):
    return write_windows(model, tokenizer, prompts, number, seed, InMemory(), quiet)


def always(model, chain):
    """Let the model predict one token after another: `chain` says which follows which."""
    with torch.no_grad():
        width = model.config.hidden_size
        codes = torch.nn.functional.normalize(torch.randn(model.config.vocab_size, width), dim=1)
        model.model.embed_tokens.weight.copy_(codes)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, follower in chain.items():
            model.lm_head.weight[follower] += 100 * codes[token]
    return model


def test_an_answer_is_what_the_model_says_and_ends_where_it_ends():
    """A model that counts from each token to the next, and ends after `e`."""
    tokenizer = character_tokenizer(bos=True, chat=True)
    a, end = tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("<|end|>")
    model = always(
        tiny_model("llama", hidden_size=64), {a: a + 1, a + 1: a + 2, a + 2: a + 3, a + 3: a + 4, a + 4: end}
    )
    model.generation_config.eos_token_id = end
    prompts = Prompts.of(["ab"], tokenizer, 8, "text")
    windows = written(model, tokenizer, Prompts([[tokenizer.bos_token_id, a]], 12), number=3)
    assert prompts.ids == [[tokenizer.bos_token_id, a], [tokenizer.bos_token_id, a + 1]]
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    story = [a, a + 1, a + 2, a + 3, a + 4, end]
    assert windows[:, 1:].flatten().tolist() == (story * 6)[:33]


def test_tokens_are_drawn_from_the_predictions_and_the_seed_fixes_them():
    """The frequency of the first token against its probability; other seeds give other texts."""
    tokenizer, model = character_tokenizer(bos=True), tiny_model("llama").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 5  # not asked for
    model.generation_config.repetition_penalty, model.generation_config.min_p = 3.0, 0.2
    tokenizer.eos_token = None
    start = Prompts.none(tokenizer, 2)
    windows = written(model, tokenizer, start, number=4000)
    odds = model(torch.tensor(start.ids)).logits[0, -1].softmax(-1)
    found = torch.bincount(windows[:, 1], minlength=128) / 4000
    assert (found - odds).abs().max() < 5 * (odds.max() / 4000).sqrt()
    assert torch.equal(written(model, tokenizer, start), written(model, tokenizer, start))
    assert not torch.equal(written(model, tokenizer, start), written(model, tokenizer, start, seed=1))


def test_a_model_that_ends_every_text_at_once_is_refused():
    tokenizer = character_tokenizer(bos=True)
    start, end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    model = always(tiny_model("llama", hidden_size=64), {start: end})
    model.generation_config.eos_token_id = end
    with pytest.raises(SecateurError, match="ends every text at once"):
        written(model, tokenizer, Prompts.none(tokenizer, 12))


def test_chats_end_with_the_question_and_open_the_answer():
    tokenizer = character_tokenizer(chat=True)
    question = {"role": "user", "content": "Why?"}
    chat = Conversation([question, {"role": "assistant", "content": "So."}])
    whole = tokenizer.apply_chat_template([question], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert Prompts.of([chat], tokenizer, 60, "chats").ids == [whole]


def test_a_long_prompt_does_not_cut_the_texts_of_short_ones():
    tokenizer = character_tokenizer()
    model = tiny_model("llama", max_position_embeddings=64).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    lengths, generate = [], model.generate

    def watched(ids, **options):
        lengths.append(options["generation_config"].max_new_tokens)
        return generate(ids, **options)

    model.generate = watched
    written(model, tokenizer, Prompts([[5] * 50] * 16 + [[6]] * 48, 60), number=60)
    assert {*lengths} == {10, 59}


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_share_that_writes_nothing_is_plain_text(tmp_path, share):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    text = CalibrationText(samples=4, seq_len=24, own_words=share)
    config = tiny_model("llama").config
    data = calibration_batches(f"self:{tmp_path}/text.txt", character_tokenizer(), config, text, batch_tokens=24)
    assert data.to_write is None
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(1, 24)] * 4


def test_prompts_of_any_length_are_padded_on_the_left():
    """What is written after a short prompt does not depend on the longer one in the batch."""
    tokenizer = character_tokenizer()
    a = tokenizer.convert_tokens_to_ids("a")
    model = always(tiny_model("llama", hidden_size=64), {a: a + 1, a + 1: a})
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    windows = written(model, tokenizer, Prompts([[a], [a] * 7], 10), number=8)
    assert {*windows.flatten().tolist()} == {a, a + 1}


@pytest.mark.parametrize(
    ("source", "own_words", "message"),
    [
        ("self", 1.0, "no token that opens a text"),
        ("self:{tmp}/empty.txt", 1.0, "holds no prompt"),
        ("self:{tmp}/none.txt", 1.0, "not a file, folder or data set"),
        ("self:{tmp}/long.jsonl", 1.0, "a prompt in .*long.jsonl has .* tokens, and a sequence has 24"),
        ("self:{tmp}/answer.jsonl", 1.0, "no message of a user"),
        ("self:{tmp}/few.txt", 0.5, "less than one sequence"),
    ],
)
def test_prompts_that_can_not_work_are_refused(tmp_path, source, own_words, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "few.txt").write_text("few")
    for name, role in (("long", "user"), ("answer", "assistant")):
        chat = {"messages": [{"role": role, "content": "word " * 9}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(chat) + "\n")
    text = CalibrationText(samples=4, seq_len=24, own_words=own_words)
    tokenizer = character_tokenizer(chat=True)
    tokenizer.bos_token = None
    with pytest.raises(SecateurError, match=message):
        calibration_batches(source.format(tmp=tmp_path), tokenizer, tiny_model("llama").config, text)


def test_a_model_that_writes_nothing_is_refused():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(SecateurError, match="can't write text"):
        secateur.prune(model, tokenizer=character_tokenizer(bos=True), calibration="self", **SETTINGS)


def test_weights_that_are_not_finite_are_named_before_anything_is_written():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match="1 weights that are NaN"):
        secateur.prune(model, tokenizer=character_tokenizer(bos=True), calibration="self", **SETTINGS)


def test_a_padding_token_without_an_embedding_pads_nothing():
    """As tokenizers have one to which [PAD] was added, and the model was not resized."""
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[ANOTHER]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    windows = write_windows(model, tokenizer, Prompts([[3], [3, 4, 5]], 16), 2, 0, InMemory(), quiet)
    assert windows.shape == (2, 16)


def test_the_sketch_writes_as_many_tokens_as_it_counts(monkeypatch):
    """Prompts of the median length alone, as a batch stops at its longest."""
    found = []

    def written(_model, _tokenizer, prompts, *_):
        found.append(prompts)
        return torch.zeros(1, prompts.length, dtype=torch.long)

    monkeypatch.setattr("secateur.calibration.own_words.write_windows", written)
    ids = [[3] * 4] * 40 + [[3] * 20] * 41
    OwnWords(Prompts(ids, 64), 8, 0, 512).sketch(tiny_model("llama"), character_tokenizer(), InMemory(), quiet)
    assert {len(each) for each in found[0].ids} == {20}


def test_a_part_of_nothing_is_refused():
    text = CalibrationText(samples=8, seq_len=24, own_words=0.25)
    with pytest.raises(SecateurError, match="has none: name a text"):
        calibration_batches("self", character_tokenizer(bos=True), tiny_model("llama").config, text)
    with pytest.raises(SecateurError, match="holds tensors: name a text"):
        calibration_batches([torch.ones(1, 24, dtype=torch.long)], None, tiny_model("llama").config, text)


@pytest.mark.parametrize("source", [None, "text.txt"])
def test_a_text_is_gone_on_from_where_a_share_is_asked_for(tmp_path, monkeypatch, source):
    """The shipped one too. `self:TEXT` is all of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.calibration.documents.shipped_text", lambda _name: "the cat sat on the mat. " * 40)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    tokenizer, config = character_tokenizer(), tiny_model("llama").config

    def of(source, own_words):
        return calibration_batches(
            source, tokenizer, config, CalibrationText(samples=8, seq_len=24, own_words=own_words)
        )

    quarter = of(source, 0.25).to_write
    assert quarter is not None
    assert quarter.number == 2
    assert of(source, None).to_write is None
    assert of(source, 0.0).to_write is None
    assert of(source, 1.0).to_write == of("self:text.txt", None).to_write


def test_a_share_of_the_sequences_is_text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    tokenizer, model = character_tokenizer(), tiny_model("llama")
    text = CalibrationText(samples=8, seq_len=24, own_words=0.25)
    data = calibration_batches(f"self:{tmp_path}/text.txt", tokenizer, model.config, text)
    assert data.to_write is not None
    assert data.to_write.number == 2
    whole = data.with_written(data.to_write.write(model, tokenizer, InMemory(), quiet))
    rows = torch.cat([batch["input_ids"] for batch in whole.batches])
    spoken = [tokenizer.decode(row) for row in rows]
    assert sum("cat sat" in each or "the mat" in each for each in spoken) >= 6
    assert len(rows) == 8
    assert whole.origin["written"] == 2


def test_another_number_of_sequences_is_another_run(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    found = set()
    for samples, share, seed in (
        (8, 0.5, 0),
        (16, 0.75, 0),
        (8, 1.0, 0),
        (8, 1.0, 1),
    ):
        text = CalibrationText(samples=samples, seq_len=24, own_words=share)
        config = tiny_model("llama").config
        data = calibration_batches(f"self:{tmp_path}/text.txt", character_tokenizer(), config, text, seed)
        found.add(data.origin["sha256"])
    assert len(found) == 4


@pytest.mark.parametrize(("at", "number"), [("dense pass", 1), ("prune", 1)])
def test_a_resumed_run_takes_the_text_that_it_kept(tmp_path, monkeypatch, at, number):
    """Killed before or after the first block; the second process may not write anything."""
    save_checkpoint(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "whole", calibration="self", **SETTINGS)

    class Killed(BaseException):
        pass

    def kill(stage, done, _total):
        if (stage, done) == (at, number):
            raise Killed

    with pytest.raises(Killed):
        secateur.prune(tmp_path / "dense", tmp_path / "out", calibration="self", progress=kill, **SETTINGS)
    assert (tmp_path / ".out.secateur" / OWN_WORDS_FILE).exists()
    monkeypatch.setattr("secateur.calibration.own_words.write_windows", None)
    report = secateur.prune(tmp_path / "dense", tmp_path / "out", calibration="self", resume=True, **SETTINGS)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert report.calibration["written"] == 6
    assert not (tmp_path / ".out.secateur").exists()
    assert "6 x 24 tokens of text that the dense model wrote" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_how_much_the_model_wrote(tmp_path):
    save_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    settings = SETTINGS | {"solver": "magnitude", "settings": {"calibration.own_words": 0.5}}
    secateur.prune(tmp_path / "dense", tmp_path / "out", calibration=tmp_path / "text.txt", **settings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 x 24 tokens of text.txt, 3 of the sequences written by the dense model, which went on from it" in card


def test_a_dry_run_counts_the_writing(tmp_path, monkeypatch):
    """Each new token is a forward pass of 16 sequences; a sketch of two tokens a sequence stands for all."""
    save_checkpoint(tmp_path / "dense")
    monkeypatch.setattr("secateur.calibration.own_words.SKETCH_TOKENS", 2)
    found = secateur.dry_run(tmp_path / "dense", calibration="self", **SETTINGS)
    assert found.num_tokens == 6 * 24

    class Clock:
        perf_counter = iter(range(0, 10**9, 10**4)).__next__  # the sketch takes 10,000 seconds

    monkeypatch.setattr("secateur.calibration.own_words.time", Clock)
    longer = secateur.dry_run(tmp_path / "dense", calibration="self", **SETTINGS)
    assert longer.seconds == pytest.approx(10**4 * 23 / 2, rel=0.01)
