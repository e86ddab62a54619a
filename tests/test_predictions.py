"""The refit of the last blocks by the predictions: loss and gradient against plain autograd, and where it is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import find_chain, quiet
from models import save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import secateur
from secateur.calibration.dense_pass import run_dense_pass
from secateur.models.head import body_gives, kl_divergence, takes_positions
from secateur.models.placement import InMemory
from secateur.pruning.predictions import POSITION_STRIDE, ModelEnd, PredictionDivergence
from secateur.reporting.figures import OUTPUT_ERROR, PREDICTIONS

REFIT = {"refit.epochs": 2, "refit.prediction_blocks": 1}


def damaged_block(family, number, padded=False):
    """A float64 model, its batches and dense log-probabilities; then block `number` loses weights.

    Also the block and its objective's arguments.
    """
    model = tiny_model(family).double().eval().requires_grad_(False)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(6)]
    if padded:
        batches[1]["attention_mask"][0, 20:] = 0
    chain = find_chain(model)
    stream, block = run_dense_pass(model, chain, batches, quiet).stream, chain.blocks[number]
    with torch.no_grad():
        dense = model(**batches[1]).logits.log_softmax(-1)
        for earlier in chain.blocks[:number]:
            stream.advance(earlier)
        outputs = stream.outputs(block)
        for matrix in block.matrices:
            matrix.stored.mul_(torch.rand(matrix.stored.shape) > 0.3)
    end = ModelEnd.of(model, [chain], batches, InMemory())
    assert end is not None
    return model, batches[1], dense, (block, stream, outputs, end)


def plain_divergence(model, batch, dense):
    log_q = model(**batch).logits.log_softmax(-1)
    return (dense.exp() * (dense - log_q)).sum(-1)[batch["attention_mask"].bool()].mean()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "phi3"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("logits", [1, 1 << 30])
def test_loss_and_gradient_are_those_of_the_whole_model(family, number, logits, monkeypatch):
    """Against autograd through all of the model, position by position and all at once, over steps that share them."""
    monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", logits)
    model, batch, dense, (block, stream, outputs, end) = damaged_block(family, number)
    weights = [matrix.parameter.requires_grad_(True) for matrix in block.matrices]
    with end.behind(block):
        objective = PredictionDivergence(block, stream, outputs, end)
        steps = [objective(1) for _ in range(POSITION_STRIDE)]
        found = torch.autograd.grad(sum(steps) / POSITION_STRIDE, weights)
        with torch.no_grad():
            whole = objective(1)
    expected = plain_divergence(model, batch, dense)
    assert expected.item() > 1e-3
    assert whole.item() == pytest.approx(expected.item(), rel=1e-4)  # logits are compared in fp32
    assert sum(step.item() for step in steps) / POSITION_STRIDE == pytest.approx(whole.item(), rel=1e-5)
    if takes_positions(model):
        assert len({step.item() for step in steps}) == POSITION_STRIDE
    for ours, theirs in zip(found, torch.autograd.grad(expected, weights), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_padding_is_left_out():
    model, batch, dense, (block, stream, outputs, end) = damaged_block("llama", 1, padded=True)
    with end.behind(block), torch.no_grad():
        loss = PredictionDivergence(block, stream, outputs, end)(1)
    assert loss.item() == pytest.approx(plain_divergence(model, batch, dense).item(), rel=1e-4)


def test_only_the_last_blocks_aim_at_the_predictions_and_a_tied_head_stays():
    model = tiny_model("gemma3", tie_word_embeddings=True)
    head, norm = model.lm_head.weight.clone(), model.model.norm.weight.clone()
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=tokens(96), settings=REFIT)
    assert [block.objective for block in report.blocks] == [OUTPUT_ERROR, OUTPUT_ERROR, PREDICTIONS]
    assert report.blocks[-1].val_loss_after < report.blocks[-1].val_loss_before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.norm.weight, norm)


def test_labels_and_gradients_of_the_caller_stay_out_of_it(monkeypatch):
    """A loss would need all logits at once; later blocks, norm and head gather nothing."""
    monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", 1)
    model = tiny_model("llama")
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens(16)]
    settings = {"refit.epochs": 1, "refit.prediction_blocks": 2}
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=batches, settings=settings)
    assert [block.objective for block in report.blocks] == [PREDICTIONS] * 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_from_files_ends_with_the_same_bits(tmp_path):
    """Its weights are onloaded part by part."""
    model = save_checkpoint(tmp_path / "dense", dtype=torch.float32)
    settings = {"pattern": "50%", "solver": "mrp", "calibration": tokens(96), "settings": REFIT}
    secateur.prune(model, **settings)
    report = secateur.prune(tmp_path / "dense", tmp_path / "out", **settings)
    assert report.blocks[-1].objective == PREDICTIONS
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (lambda: BertForMaskedLM(BertConfig(**BERT)), PREDICTIONS),
        (lambda: BertModel(BertConfig(**BERT)), OUTPUT_ERROR),
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), OUTPUT_ERROR),
        (lambda: LlamaForSequenceClassification(tiny_model("llama").config), OUTPUT_ERROR),  # refuses several sequences
    ],
)
def test_models_that_predict_no_tokens_aim_at_outputs(make, objective):
    torch.manual_seed(0)
    model = make()
    batches = [{"input_ids": ids} for ids in tokens(16)]
    if model.config.is_encoder_decoder:
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :8]} for batch in batches]
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=batches, settings=REFIT)
    assert report.blocks[-1].objective == objective
    assert not model.base_model._forward_hooks


def test_a_dry_run_counts_the_last_blocks(tmp_path, monkeypatch):
    """Its gradients go through the head, here for an hour."""
    save_checkpoint(tmp_path / "dense", dtype=torch.float32)
    slow = PredictionDivergence.__call__
    clock = [0.0]
    monkeypatch.setattr("secateur.pruning.dry_run.time.perf_counter", lambda: clock[0])

    def an_hour(self, index):
        clock[0] += 3600
        return slow(self, index)

    monkeypatch.setattr(PredictionDivergence, "__call__", an_hour)
    run = {"pattern": "2:4", "solver": "mrp", "calibration": tokens(96)}
    assert secateur.dry_run(tmp_path / "dense", **run, settings=REFIT | {"refit.prediction_blocks": 0}).seconds == 0
    found = secateur.dry_run(tmp_path / "dense", **run, settings=REFIT)
    assert found.seconds == pytest.approx(3600 * REFIT["refit.epochs"] * found.num_batches)


def test_a_token_that_the_head_rules_out_adds_nothing():
    """Its logit is -inf in both models."""
    model, _, _, (block, stream, outputs, end) = damaged_block("llama", 1)
    with end.behind(block):
        whole = PredictionDivergence(block, stream, outputs, end)(0)
    rule_out = model.lm_head.register_forward_hook(
        lambda _module, _args, logits: torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)
    )
    with end.behind(block):
        found = PredictionDivergence(block, stream, outputs, end)(0)
    rule_out.remove()
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    p, q = torch.tensor([0.25, 0.75, 0.0]), torch.tensor([0.5, 0.5, 0.0])
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_a_patched_body_is_back_after_its_outputs_were_given():
    model = tiny_model("llama")
    model.model.forward = patch = model.model.forward
    with body_gives(model, None):
        assert model.model() is None
    assert vars(model.model)["forward"] is patch


def test_the_last_block_takes_a_sixteenth_of_the_rate(monkeypatch):
    monkeypatch.setattr("secateur.pruning.block_refit.ATTEMPTS", 1)
    settings = {"refit": {"epochs": 1, "rate": 0.032, "prediction_blocks": 1}}
    report = secateur.prune(tiny_model("llama"), pattern="2:4", calibration=tokens(32), settings=settings)
    assert [block.rate for block in report.blocks] == pytest.approx([0.032, 0.002])
