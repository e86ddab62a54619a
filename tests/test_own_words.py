"""Calibration on what the dense model writes: the draw is the model's, windows are whole, and a run keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import Killed, kill_at, quiet
from models import character_tokenizer, save_checkpoint, tiny_model
from safetensors.torch import load_file

import secateur
from secateur.calibration import own_words
from secateur.calibration.batches import calibration_batches
from secateur.calibration.own_words import OwnWords, Prompts, why_silent, write_windows
from secateur.calibration.records import Conversation
from secateur.errors import SecateurError
from secateur.models.placement import InMemory, OffloadedWeights
from secateur.recipe.patterns import parse_pattern
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
    entropy = -(odds * odds.log()).sum()  # which a temperature, top-k or top-p changes
    spread = ((odds * odds.log() ** 2).sum() - entropy**2).sqrt()
    assert (-odds.log()[windows[:, 1]].mean() - entropy).abs() < 2.5 * spread / 4000**0.5
    assert torch.equal(written(model, tokenizer, start), written(model, tokenizer, start))
    assert not torch.equal(written(model, tokenizer, start), written(model, tokenizer, start, seed=1))


def test_a_model_that_ends_every_text_at_once_is_refused():
    tokenizer = character_tokenizer(bos=True)
    start, end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    model = always(tiny_model("llama", hidden_size=64), {start: end})
    model.generation_config.eos_token_id = end
    with pytest.raises(SecateurError, match="ends every text at once"):
        written(model, tokenizer, Prompts.none(tokenizer, 12), number=40)


def test_a_prompt_after_which_the_model_is_silent_ends_nothing():
    """Also where it is the last that is needed, again and again."""
    tokenizer = character_tokenizer()
    a, end = tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("<|end|>")
    model = always(tiny_model("llama", hidden_size=64), {a: end, a + 1: a + 1})
    model.generation_config.eos_token_id = end
    for seed in range(10):
        assert written(model, tokenizer, Prompts([[a], [a + 1, a + 1]], 24), seed=seed).shape == (4, 24)


def test_chats_end_with_the_question_and_open_the_answer():
    tokenizer = character_tokenizer(chat=True)
    question = {"role": "user", "content": "Why?"}
    chat = Conversation([question, {"role": "assistant", "content": "So."}])
    whole = tokenizer.apply_chat_template([question], tokenize=True, add_generation_prompt=True, return_dict=False)
    prompts = Prompts.of([chat], tokenizer, 2048, "chats")
    assert prompts.ids == [whole]
    assert prompts.kinds() == [([whole], 2048)]


def test_windows_longer_than_a_text_hold_several():
    """Plain text goes on for 512 tokens at most, in the windows' number of tokens and hardly more."""
    tokenizer = character_tokenizer()
    model = tiny_model("llama", max_position_embeddings=2048).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    drawn, generate = [], model.generate

    def watched(ids, **options):
        drawn.append((ids.shape, options["generation_config"].max_new_tokens))
        return generate(ids, **options)

    model.generate = watched
    prompts = Prompts.of(["the cat sat on the mat. " * 400], tokenizer, 2048, "text")
    assert written(model, tokenizer, prompts, number=2).shape == (2, 2048)
    assert drawn == [((9, 64), 448)]  # eight would do, were no end to come early


def test_a_huge_text_is_encoded_in_parts(monkeypatch):
    """A tokenizer takes more than 100 bytes for each character that it is given at once."""
    given = []
    monkeypatch.setattr(own_words, "PIECE", 100)
    monkeypatch.setattr(own_words, "encode_text", lambda text, _tokenizer: given.append(text) or [1] * len(text))
    Prompts.of([text := "the cat sat on the mat.\n" * 40], character_tokenizer(), 64, "text")
    assert "".join(given) == text
    assert max(map(len, given)) <= 100


def test_chats_among_plain_texts_alone_fill_a_window(monkeypatch):
    """They are written apart, so that pieces of plain text end after 512 tokens."""
    tokenizer = character_tokenizer(chat=True)
    model = tiny_model("llama", max_position_embeddings=1024).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    chat = Conversation([{"role": "user", "content": "Why? " * 150}])
    prompts = Prompts.of(["the cat sat on the mat. " * 40, chat], tokenizer, 1024, "texts")
    drawn, generate = [], model.generate

    def watched(ids, **options):
        drawn.append((ids.shape[1], options["generation_config"].max_new_tokens))
        return generate(ids, **options)

    model.generate = watched
    written(model, tokenizer, prompts, number=40)
    long = len(prompts.ids[0])
    assert long > 512
    assert {*drawn} == {(long, 1024 - long), (64, 448)}


def test_a_long_prompt_does_not_cut_the_texts_of_short_ones(monkeypatch):
    tokenizer = character_tokenizer()
    model = tiny_model("llama", max_position_embeddings=64).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    lengths, generate = [], model.generate

    def watched(ids, **options):
        lengths.append(options["generation_config"].max_new_tokens)
        return generate(ids, **options)

    model.generate = watched
    prompts = Prompts([[5] * 50] * 16 + [[6]] * 48, 60)
    monkeypatch.setattr("secateur.calibration.own_words.TOGETHER_TOKENS", 0)
    written(model, tokenizer, prompts, number=60)
    assert {*lengths} == {10, 59}


@pytest.mark.parametrize("number", [0, None, "auto"])
def test_plain_text_is_plain_text(tmp_path, number):
    """Also where the model is to write as much as it can, and can't."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    text = CalibrationText(samples=4, seq_len=24, own_words=number)
    config = tiny_model("llama").config
    data = calibration_batches(tmp_path / "text.txt", character_tokenizer(), config, text, batch_tokens=24)
    assert data.to_write is None
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(1, 24)] * 4


@pytest.mark.parametrize(
    ("seq_len", "pattern", "number"),
    [(24, "50%", 16), (24, "60%", 32), (24, "2:4", 32), (4096, "50%", 8), (4096, "70%", 8), (16384, "2:4", 2),
     (40000, "50%", 1)],
)  # fmt: skip
def test_by_itself_a_model_writes_as_many_sequences_and_more_for_harder_patterns(tmp_path, seq_len, pattern, number):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 6000)
    text = CalibrationText(samples=16 if seq_len == 24 else 12, seq_len=seq_len, own_words="auto")
    config = tiny_model("llama", max_position_embeddings=40000).config
    data = calibration_batches(
        tmp_path / "text.txt", character_tokenizer(), config, text, can_write=True, pattern=parse_pattern(pattern)
    )
    assert data.to_write is not None
    assert data.to_write.number == number


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
        ("self", None, "no BOS token"),
        ("self:{tmp}/empty.txt", None, "holds no prompt"),
        ("self:{tmp}/none.txt", None, "not a file, folder or data set"),
        ("self:{tmp}/long.jsonl", None, "long.jsonl, the chat that begins 'word .* tokens, and a sequence has 24"),
        ("self:{tmp}/answer.jsonl", None, "no message of a user"),
        ("self:{tmp}/answer.jsonl", "auto", "no message of a user"),
        ("self:{tmp}/long.jsonl", 4, "adds to a text, and .*self.* lets the model write every sequence"),
        ("{tmp}/few.txt", 4, "less than one sequence"),
        ("{tmp}/long.jsonl", 4, "long.jsonl, the chat that begins 'word .* tokens, and a sequence has 24"),
        ("{tmp}/answer.jsonl", 4, "no message of a user"),
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


def test_a_window_that_the_opening_fills_is_refused():
    tokenizer = character_tokenizer(bos=True)
    with pytest.raises(SecateurError, match="open with 1 tokens, and a sequence has 1: raise seq_len"):
        Prompts.none(tokenizer, 1)


def test_a_model_that_writes_nothing_is_refused():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(SecateurError, match="can't write text"):
        secateur.prune(model, tokenizer=character_tokenizer(bos=True), calibration="self", **SETTINGS)


def test_weights_that_are_not_finite_are_named_before_anything_is_written(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match="1 weights that are NaN"):
        secateur.prune(model, tokenizer=character_tokenizer(bos=True), calibration="self", **SETTINGS)
    model.save_pretrained(tmp_path)
    character_tokenizer(bos=True).save_pretrained(tmp_path)
    with pytest.raises(SecateurError, match="1 weights that are NaN"):
        secateur.dry_run(tmp_path, calibration="self", **SETTINGS)


def test_a_padding_token_without_an_embedding_pads_nothing():
    """As tokenizers have one to which [PAD] was added, and the model was not resized."""
    tokenizer = character_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[ANOTHER]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    windows = write_windows(model, tokenizer, Prompts([[3], [3, 4, 5]], 16), 2, 0, InMemory(), quiet)
    assert windows.shape == (2, 16)


def test_the_sketch_writes_as_many_tokens_as_it_counts(monkeypatch):
    """Prompts of the median length alone, as a batch stops at its longest; in one batch."""
    model, drawn = tiny_model("llama", max_position_embeddings=2048).eval(), []
    model.generation_config.eos_token_id = None
    generate = model.generate

    def watched(ids, **options):
        drawn.append((*ids.shape, options["generation_config"].max_new_tokens))
        return generate(ids, **options)

    model.generate = watched
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    for prompts, number, found in (
        (Prompts([[3] * 4] * 40 + [[3] * 20] * 41, 64), 8, (9, 20, 32)),
        (Prompts([[3] * 600] * 5, 2048, 5), 64, (16, 600, 32)),
    ):
        drawn.clear()
        windows, seconds = OwnWords(prompts, number, 0, 512).sketch(model, tokenizer, InMemory(), quiet)
        assert drawn == [found]
        assert windows.shape == (number, prompts.length)
        assert seconds > 0


def test_tensors_are_no_text_to_go_on_from():
    tokens, config = [torch.ones(1, 24, dtype=torch.long)], tiny_model("llama").config
    with pytest.raises(SecateurError, match="holds tensors: name a text"):
        calibration_batches(tokens, None, config, CalibrationText(own_words=2))
    assert calibration_batches(tokens, None, config, CalibrationText(own_words="auto"), can_write=True).to_write is None


@pytest.mark.parametrize("source", [None, "text.txt"])
def test_a_text_is_gone_on_from_where_that_is_asked_for(tmp_path, monkeypatch, source):
    """The shipped one too, from the prompts of `self:TEXT`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.calibration.documents.shipped_text", lambda _name: "the cat sat on the mat. " * 40)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    tokenizer, config = character_tokenizer(), tiny_model("llama").config

    def of(source, samples, own_words):
        text = CalibrationText(samples=samples, seq_len=24, own_words=own_words)
        return calibration_batches(source, tokenizer, config, text, can_write=True)

    on_top = of(source, 8, 2)
    assert on_top.to_write is not None
    assert on_top.to_write.number == 2
    assert on_top.to_write == of("self:text.txt", 2, None).to_write == of("self:text.txt", 2, "auto").to_write
    assert torch.equal(on_top.batches[0]["input_ids"], torch.cat([e["input_ids"] for e in of(source, 8, 0).batches]))


def test_chats_that_can_not_be_answered_are_gone_on_from_where_the_model_writes_by_itself(tmp_path):
    """A chat that is too long for a window, one without a user's message, and one that can be answered."""
    chats = [
        [{"role": "user", "content": "word " * 20}, {"role": "assistant", "content": "so " * 20}],
        [{"role": "assistant", "content": "word " * 9}],
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer, config = character_tokenizer(chat=True), tiny_model("llama").config
    text = CalibrationText(samples=2, seq_len=48, own_words="auto")
    data = calibration_batches(tmp_path / "chats.jsonl", tokenizer, config, text, can_write=True)
    assert data.to_write is not None
    lengths = [len(each) for each in data.to_write.prompts.ids]
    answered = tokenizer.apply_chat_template(chats[2][:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert data.to_write.prompts.ids[0] == answered
    assert data.to_write.prompts.chats == 1
    assert {*lengths[1:]} == {48 // 8}


def test_the_text_comes_with_what_the_model_writes(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    tokenizer, model = character_tokenizer(), tiny_model("llama")
    text = CalibrationText(samples=6, seq_len=24, own_words=2)
    data = calibration_batches(tmp_path / "text.txt", tokenizer, model.config, text)
    assert data.to_write is not None
    whole = data.with_written(data.to_write.write(model, tokenizer, InMemory(), quiet))
    rows = torch.cat([batch["input_ids"] for batch in whole.batches])
    spoken = [tokenizer.decode(row) for row in rows]
    assert sum("cat sat" in each or "the mat" in each for each in spoken) >= 6
    assert len(rows) == whole.origin["samples"] == 8
    texts = {tuple(row) for row in data.batches[0]["input_ids"].tolist()}
    assert [tuple(row) in texts for row in rows.tolist()] not in ([True] * 6 + [False] * 2, [False] * 2 + [True] * 6)
    assert whole.origin["written"] == 2


def test_another_number_of_sequences_is_another_run(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    found = set()
    for samples, number, seed in ((8, 4, 0), (8, 5, 0), (9, 4, 0), (8, 4, 1), (8, 0, 0)):
        text = CalibrationText(samples=samples, seq_len=24, own_words=number)
        config = tiny_model("llama").config
        found.add(
            calibration_batches(tmp_path / "text.txt", character_tokenizer(), config, text, seed).origin["sha256"]
        )
    assert len(found) == 5


def test_who_writes_text():
    """Not an encoder, whose predictions look at later tokens, nor a model without a head."""
    from transformers import BertConfig, BertLMHeadModel, BertModel

    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    decoder = BertConfig(**config.to_dict() | {"is_decoder": True})
    assert why_silent(tiny_model("llama"), InMemory()) is None
    assert why_silent(BertLMHeadModel(decoder), InMemory()) is None
    assert why_silent(BertLMHeadModel(config), InMemory()) == "its predictions depend on later tokens"
    assert why_silent(BertModel(config), InMemory()) == "BertModel generates none"


@pytest.mark.parametrize("where", ["object", "folder"])
def test_a_rule_that_matches_nothing_is_found_before_the_model_writes(tmp_path, monkeypatch, where):
    monkeypatch.setattr("secateur.calibration.own_words.write_windows", None)
    save_checkpoint(tmp_path / "dense")
    asked = SETTINGS | {"calibration": "self", "exclude": ["*.typo"]}
    if where == "folder":
        model, asked = tmp_path / "dense", asked | {"out": tmp_path / "out"}
    else:
        model, asked = tiny_model("llama"), asked | {"tokenizer": character_tokenizer()}
    with pytest.raises(SecateurError, match=r"\*\.typo"):
        secateur.prune(model, **asked)


def test_a_width_that_no_pattern_fits_is_found_before_the_model_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.calibration.own_words.write_windows", None)
    save_checkpoint(tmp_path / "dense", intermediate_size=62)
    with pytest.raises(SecateurError, match=r"down_proj: pattern 2:4 needs"):
        secateur.prune(tmp_path / "dense", tmp_path / "out", **SETTINGS | {"calibration": "self", "pattern": "2:4"})


def test_a_model_whose_generate_fails_is_calibrated_without_its_text_and_says_so(monkeypatch):
    model = tiny_model("llama")

    def fail(*_args, **_options):
        raise AttributeError("an old cache")

    monkeypatch.setattr(model, "generate", fail)
    asked = SETTINGS | {"settings": {"calibration.own_words": "auto"}}
    report = secateur.prune(model, tokenizer=character_tokenizer(), **asked)
    assert "written" not in report.calibration
    (notice,) = (each for each in report.notices if "writes no text" in each)
    assert "an old cache" in notice


def test_best_lets_the_model_write_where_it_can(tmp_path):
    """And a finished run is found again, without the model."""
    save_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    asked = {"recipe": "best", "calibration": tmp_path / "text.txt", "samples": 4, "seq_len": 24}
    report = secateur.prune(tmp_path / "dense", tmp_path / "out", **asked)
    assert report.calibration["samples"] == 8
    assert report.calibration["written"] == 4
    again = secateur.prune(tmp_path / "dense", tmp_path / "out", resume=True, **asked)
    assert again.identity == report.identity


def test_a_model_that_memory_hardly_holds_writes_nothing_by_itself(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    asked = SETTINGS | {"calibration": tmp_path / "text.txt", "settings": {"calibration.own_words": "auto"}}
    assert secateur.prune(tmp_path / "dense", tmp_path / "whole", **asked).calibration["written"] == 6
    monkeypatch.setattr("secateur.run.total_memory", lambda _device: 1000)
    report = secateur.prune(tmp_path / "dense", tmp_path / "streamed", **asked)
    assert "written" not in report.calibration
    assert any("more than half of memory" in notice for notice in report.notices)
    assert secateur.dry_run(tmp_path / "dense", **asked).num_tokens == 6 * 24


@pytest.mark.parametrize(("at", "number"), [("dense pass", 1), ("prune", 1)])
def test_a_resumed_run_takes_the_text_that_it_kept(tmp_path, monkeypatch, at, number):
    """Killed before or after the first block; the second process may not write anything."""
    save_checkpoint(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "whole", calibration="self", **SETTINGS)

    with pytest.raises(Killed):
        secateur.prune(
            tmp_path / "dense", tmp_path / "out", calibration="self", progress=kill_at(at, number), **SETTINGS
        )
    assert (tmp_path / ".out.secateur" / OWN_WORDS_FILE).exists()
    monkeypatch.setattr("secateur.calibration.own_words.write_windows", None)
    report = secateur.prune(tmp_path / "dense", tmp_path / "out", calibration="self", resume=True, **SETTINGS)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert report.calibration["written"] == 6
    assert not (tmp_path / ".out.secateur").exists()
    assert "6 x 24 tokens of text that the dense model wrote" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_lets_the_model_write_as_the_first_process_did(tmp_path, monkeypatch):
    """Though this machine has too little memory to begin so."""
    save_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    asked = SETTINGS | {"calibration": tmp_path / "text.txt", "settings": {"calibration.own_words": "auto"}}

    def stop(stage, _done, _total):
        if stage == "dense pass":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.prune(tmp_path / "dense", tmp_path / "out", progress=stop, **asked)
    monkeypatch.setattr("secateur.run.total_memory", lambda _device: 1000)
    assert secateur.prune(tmp_path / "dense", tmp_path / "out", resume=True, **asked).calibration["written"] == 6


def test_weights_are_not_converted_for_each_token(tmp_path, monkeypatch):
    """A model of half precision computes in fp32 on a CPU."""
    save_checkpoint(tmp_path / "dense", dtype=torch.float16)
    copied: list[int] = []
    copy = OffloadedWeights._copy
    monkeypatch.setattr(OffloadedWeights, "_copy", lambda self, data: copied.append(data.numel()) or copy(self, data))
    stages: dict[str, int] = {}
    run = SETTINGS | {"solver": "magnitude", "progress": lambda stage, *_: stages.update({stage: sum(copied)})}
    secateur.prune(tmp_path / "dense", tmp_path / "out", calibration="self", **run)
    assert stages["own words"] < 3 * tiny_model("llama").num_parameters()


def test_the_card_says_how_much_the_model_wrote(tmp_path):
    save_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    settings = SETTINGS | {"solver": "magnitude", "settings": {"calibration.own_words": 3}}
    secateur.prune(tmp_path / "dense", tmp_path / "out", calibration=tmp_path / "text.txt", **settings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "9 x 24 tokens of text.txt, 3 of the sequences written by the dense model, which went on from it" in card


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


def test_a_chat_that_is_cut_into_pieces_opens_each_once():
    tokenizer = character_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    chat = Conversation([{"role": "assistant", "content": "the cat sat on the mat. " * 8}])
    prompts = Prompts.of([chat], tokenizer, 64, "chats", strict=False)
    assert len(prompts.ids) > 4
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in prompts.ids)
