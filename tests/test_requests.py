"""What users bring that can't be pruned, or not like this: named before anything changes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from models import character_tokenizer, tiny_model, tokens

import secateur

MASK_M = {"name": "mrp", "mask": "M"}
WANDA = {"pattern": "50%", "solver": "wanda"}
ENCODER_DECODER = {
    "vocab_size": 128, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip


def compiled_forward(model):
    model.model.forward = torch.compile(model.model.forward)


def flex_attention(model):
    model.config._attn_implementation = "flex_attention"


def adapters(model):
    model.peft_config = {"default": object()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled_forward, "model is compiled"),
        (flex_attention, "attn_implementation='sdpa'"),
        (adapters, "carries adapters.*merge"),
        (lambda model: setattr(model, "config", None), "no transformers `config`"),
    ],
)
def test_models_that_cannot_be_watched(change, message):
    model = tiny_model("llama")
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        secateur.prune(model, calibration=tokens(), **WANDA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(ValueError, match="made inside torch.inference_mode"):
        secateur.prune(model, calibration=tokens())


def test_predictions_that_are_not_finite_end_an_allocation():
    model = tiny_model("llama", dtype=torch.float16)
    model.lm_head.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="predictions are not finite: try another dtype"):
        secateur.prune(model, pattern="50%", calibration=tokens())


def test_computed_weights_outside_of_layers_are_no_concern():
    model = tiny_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    report = secateur.prune(model, calibration=tokens(), **WANDA)
    assert len(report.matrices) == 14


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 8).long(), "labels": torch.ones(2, 4).long()}, "labels and nothing for the dec"),
        ({"input_ids": torch.ones(2, 8).long(), "scale": torch.tensor(1.0)}, "scale .* is a single number"),
    ],
)
def test_batches_that_would_be_misread(batch, message):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**ENCODER_DECODER))
    with pytest.raises(ValueError, match=message):
        secateur.prune(model, calibration=[batch], **WANDA)


def test_rows_of_a_data_set_are_batches_of_one():
    """Each tensor of a row is 1-D, its mask too."""
    rows = [{"input_ids": ids.reshape(-1), "attention_mask": torch.ones(ids.numel()).long()} for ids in tokens(8)]
    by_row, by_batch = tiny_model("llama"), tiny_model("llama")
    secateur.prune(by_row, pattern="50%", calibration=rows)
    secateur.prune(by_batch, pattern="50%", calibration=[{name: row[name][None] for name in row} for row in rows])
    assert all(torch.equal(tensor, by_batch.state_dict()[name]) for name, tensor in by_row.state_dict().items())


def test_a_tokenizer_of_another_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 50)
    model, tokenizer = tiny_model("llama", vocab_size=64), character_tokenizer()
    for call in (
        lambda: secateur.prune(model, calibration=str(text), tokenizer=tokenizer, seq_len=16, samples=4, **WANDA),
        lambda: secateur.evaluate(model, str(text), tokenizer=tokenizer, seq_len=16),
    ):
        with pytest.raises(ValueError, match="vocabulary has 64: is the tokenizer its own"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
        ({"seed": -1}, "seed is -1: it must be greater than or equal to 0"),
        ({"samples": "8"}, "calibration.samples is '8': it must be a whole number"),
        ({"seq_len": 32.0}, "calibration.seq_len is 32.0: it must be a whole number"),
        ({"pattern": (2, 4)}, "pattern is (2, 4); give a share"),
    ],
)
def test_values_of_another_kind(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        secateur.prune(tiny_model("llama"), calibration=tokens(), **(WANDA | options))


def test_what_is_no_model(tmp_path):
    for thing in (None, 3, {"model": 1}):
        with pytest.raises(ValueError, match=f"the model is a {type(thing).__name__}"):
            secateur.prune(thing, tmp_path / "out")


def test_a_single_glob_is_taken_for_coverage_too():
    coverage = secateur.coverage_of(tiny_model("llama"), calibration=tokens(), include="*q_proj")
    assert sum(matrix.state == "pruned" for matrix in coverage.matrices) == 2


def test_evaluation_restores_each_module_and_refuses_other_heads(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 50)
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    secateur.evaluate(model, str(text), tokenizer=character_tokenizer(), seq_len=16)
    assert [module.training for module in model.modules()] == before
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertConfig(vocab_size=128, **sizes)
    encoder_decoder = transformers.BartConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    for other in (
        transformers.BertForMaskedLM(bert),
        transformers.BertLMHeadModel(bert),  # not told to be a decoder, so each token sees all others
        transformers.BartForConditionalGeneration(encoder_decoder),
    ):
        with pytest.raises(ValueError, match=f"{type(other).__name__} predicts no next token"):
            secateur.evaluate(other, str(text), tokenizer=character_tokenizer(), seq_len=16)


def test_what_decides_how_a_model_is_loaded_is_refused_for_a_model_object():
    model, given = tiny_model("llama"), {"device": "cpu", "trust_remote_code": True, "allow_pickle": True}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"{name} can't be used with a model object"):
            secateur.evaluate(model, tokenizer=character_tokenizer(), **{name: value})
        with pytest.raises(ValueError, match=f"{name} can't be used with a model object"):
            secateur.coverage_of(model, calibration=tokens(), **{name: value})


def test_tensors_next_to_a_recipe_that_names_a_text():
    model = tiny_model("llama")
    for settings in ({"calibration.source": "c4"}, {"calibration.source": "self"}):
        with pytest.raises(ValueError, match="says calibration.source: .*, and calibration holds tensors"):
            secateur.prune(model, settings=settings, calibration=tokens())
    report = secateur.prune(model, recipe="fast", calibration=tokens())
    secateur.prune(model, recipe=report.recipe, calibration=tokens())


def test_autocast_around_a_run_changes_nothing():
    plain, cast = tiny_model("llama"), tiny_model("llama")
    secateur.prune(plain, pattern="2:4", solver="mrp", calibration=tokens())
    with torch.autocast("cpu", torch.bfloat16):
        secateur.prune(cast, pattern="2:4", solver="mrp", calibration=tokens())
    assert all(torch.equal(tensor, cast.state_dict()[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_the_scale_of_the_inputs_changes_no_mask(pattern):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(8, 32, generator=generator), torch.randn(96, 32, generator=generator)
    H = X.T @ X / 96
    plain = secateur.solve(W, H, pattern, MASK_M)
    for scale in (1e-20, 1e20):
        assert torch.equal(secateur.solve(W, H * scale, pattern, MASK_M).keep, plain.keep)


def test_few_tokens_for_a_refit_are_told():
    few = "calibration tokens are few: a block refit should get 16,000 or more"
    for recipe, told in (("fast", False), ("balanced", True)):
        report = secateur.prune(tiny_model("llama"), calibration=tokens(), recipe=recipe)
        assert any(few in notice for notice in report.notices) is told
