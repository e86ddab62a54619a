"""Finding the blocks: several chains, encoders, vision, and inputs other than tokens."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import transformers
from helpers import find_blocks
from models import character_tokenizer, mixtral, randomised, save_checkpoint, t5, tiny_model, tokens
from torch import nn

import secateur
from secateur.checkpoints.load import load
from secateur.cli import app as cli
from secateur.errors import UnsupportedModelError
from secateur.models.discovery import find_block_chains
from secateur.recipe.recipe import Recipe

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def whisper() -> tuple[Any, list[dict[str, torch.Tensor]], int]:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_mel_bins": 8, "vocab_size": 128}
    config = transformers.WhisperConfig(
        **sizes, **widths, max_source_positions=12, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    sound = torch.randn(8, 8, 24, generator=torch.Generator().manual_seed(0))
    batches = [{"input_features": sound[i : i + 2], "decoder_input_ids": tokens()[0][:, :10]} for i in (0, 2, 4, 6)]
    return transformers.WhisperForConditionalGeneration(config), batches, 2 * 6 + 2 * 10


def vit() -> tuple[Any, list[dict[str, torch.Tensor]], int]:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return transformers.ViTForImageClassification(config), [{"pixel_values": part} for part in images.split(4)], 2 * 6


def bert() -> tuple[Any, list[dict[str, torch.Tensor]], int]:
    model = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=128))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(16)]
    for batch in batches:
        batch["attention_mask"][1, 15:] = 0
    return model, batches, 2 * 6


@pytest.mark.parametrize("make", [t5, whisper, vit, bert])
@pytest.mark.parametrize("asked", [{"solver": "mrp"}, {"recipe": "balanced", "settings": {"allocation": None}}])
def test_models_beyond_causal_language_models_are_pruned_exactly(make, asked):
    model, batches, number = make()
    model = randomised(model)
    report = secateur.prune(model, pattern="2:4", calibration=batches, **asked)
    assert len(report.matrices) == number
    assert not [notice for notice in report.notices if "tokens are few" not in notice]
    for matrix in report.matrices:
        weight = model.get_submodule(matrix.name).weight
        assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all()), matrix.name
    with torch.no_grad():
        assert bool(torch.isfinite(model(**batches[0])[0]).all())


def test_a_decoder_is_pruned_on_what_the_pruned_encoder_gives():
    model, batches, _ = t5()
    model = randomised(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=batches)
    name = "decoder.block.0.layer.1.EncDecAttention.k"
    with torch.no_grad():
        states = torch.cat([model.encoder(input_ids=batch["input_ids"])[0].flatten(0, 1) for batch in batches]).double()
    H, W = states.T @ states / len(states), before[f"{name}.weight"].double()
    D = model.get_submodule(name).weight.detach().double() - W
    expected = float(((D @ H) * D).sum() / ((W @ H) * W).sum())
    found = next(matrix for matrix in report.matrices if matrix.name == name)
    assert found.tokens == len(states)
    assert found.relative_error == pytest.approx(expected, rel=1e-4)


def test_chains_come_in_the_order_they_run():
    model, batches, _ = t5()
    structure = find_block_chains(model, batches[0], Recipe())
    assert [chain.blocks[0].name for chain in structure.chains] == ["encoder.block.0", "decoder.block.0"]


def test_layers_that_never_run_are_listed():
    model = tiny_model("llama")
    model.tower = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    report = secateur.prune(model, pattern="2:4", solver="wanda", calibration=tokens())
    assert report.dense["tower.1.0"] == "its layer never runs on the calibration inputs"
    assert report.to_dict()["summary"]["share_of_layers"] == pytest.approx(
        report.pruned_parameters / (report.pruned_parameters + 2 * 64)
    )


def test_padding_that_is_not_the_decoders_is_refused():
    model, batches, _ = t5()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 20:] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"attention_mask .* next to decoder inputs.*without padding"):
        secateur.prune(model.eval(), pattern="2:4", solver="wanda", calibration=batches)
    for batch in batches:
        batch["decoder_attention_mask"] = batch.pop("attention_mask")[:, : batch["decoder_input_ids"].shape[1]]
        batch["decoder_attention_mask"][0, 12:] = 0
    with pytest.raises(UnsupportedModelError, match=r"decoder_attention_mask leaves tokens out"):
        secateur.prune(model.eval(), pattern="2:4", solver="wanda", calibration=batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_curve_allocation_needs_predictions():
    model, batches, _ = bert()
    with pytest.raises(ValueError, match=r"allocation curve.*logits.*'allocation': None"):
        secateur.prune(randomised(model), pattern="50%", calibration=batches)


def test_what_is_no_model_of_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"no prunable block: .* ModuleList .* parts are 0 \(Linear\)"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(UnsupportedModelError, match="none of the layers in layers runs on the calibration inputs"):
        find_blocks(Idle())


def test_an_encoder_given_to_the_commands_is_named(tmp_path):
    model, _, _ = bert()
    model.save_pretrained(tmp_path / "bert")
    character_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match=r"holds a BertModel, which is not a causal .*secateur.prune\(model, calibration"
    ):
        secateur.prune(tmp_path / "bert", tmp_path / "out", pattern="2:4")
    assert not (tmp_path / "out").exists()


def test_the_text_model_of_a_vision_language_model_is_taken_and_told_of(tmp_path):
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    told = load(str(tmp_path)).notices
    assert told == ["of the Qwen3_5ForConditionalGeneration this is the text model alone, a Qwen3_5ForCausalLM"]


def test_coverage_names_every_matrix_of_the_layers(tmp_path, capsys, monkeypatch):
    model = save_checkpoint(tmp_path)
    found = secateur.coverage_of(tmp_path, exclude=["*.1.mlp.up_proj"])
    states = {matrix.name: (matrix.state, matrix.reason) for matrix in found.matrices}
    assert len(states) == 14
    assert states["model.layers.1.mlp.up_proj"] == ("dense", "a rule leaves '*.1.mlp.up_proj' dense")
    assert states["model.layers.0.mlp.up_proj"] == ("pruned", None)
    assert found.share("pruned") + found.share("dense") == pytest.approx(1.0)
    assert found.share("missed") == 0.0
    assert found.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(sys, "argv", ["secateur", "inspect", str(tmp_path), "--coverage"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "model.layers.*.mlp.up_proj" in capsys.readouterr().out.replace("\n", "")


def test_a_missed_matrix_is_listed_and_fails_the_run():
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.strange = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.plain(hidden) + torch.einsum("bti,oi->bto", hidden, self.strange.weight)

    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(Strange() for _ in range(2))
    model.model.embed_tokens = nn.Embedding(128, 8)
    model.forward = lambda input_ids: run_layers(model, input_ids)
    model.model.forward = model.forward
    found = secateur.coverage_of(model, calibration=tokens())
    missed = [matrix for matrix in found.matrices if matrix.state == "missed"]
    assert [matrix.name for matrix in missed] == ["model.layers.0.strange", "model.layers.1.strange"]
    assert "einsum in an unknown form" in str(missed[0].reason)
    assert "with exclude='model.layers.0.strange'" in str(missed[0].reason)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.strange enters torch.functional.einsum"):
        secateur.prune(model, pattern="2:4", solver="wanda", calibration=tokens())


def run_layers(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    hidden = model.model.embed_tokens(input_ids)
    for layer in model.model.layers:
        hidden = layer(hidden)
    return hidden


@pytest.mark.parametrize("excluded", ["model.layers.1.*", "model.layers.0.*"])
def test_a_matrix_that_is_dense_under_another_name_is_not_pruned(excluded):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(secateur.SecateurError, match="is the same tensor: exclude or include both"):
        secateur.prune(model, solver="magnitude", calibration=tokens(), exclude=excluded)
    assert (model.model.layers[0].mlp.up_proj.weight != 0).all()
    both = [excluded, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = secateur.prune(model, solver="magnitude", calibration=tokens(), exclude=both)
    assert found.sparsity > 0.2
    assert (model.model.layers[0].mlp.up_proj.weight != 0).all()


def test_layers_that_the_model_holds_twice_are_pruned_by_their_first_name():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.blocks, self.config = model, model.model.layers, model.config

        def forward(self, input_ids=None, **others):
            return self.model(input_ids=input_ids, **others)

    wrapped = Wrapper(tiny_model("llama"))
    found = secateur.prune(wrapped, solver="magnitude", calibration=tokens(), include="model.model.layers.*.mlp.*")
    assert all(".mlp." in each.name for each in found.matrices)


def test_nothing_left_to_prune_says_why():
    with pytest.raises(UnsupportedModelError, match=r"no matrix is left to prune .*router.*dense: false"):
        secateur.prune(mixtral(), solver="magnitude", calibration=tokens(), include="*.gate")


def test_matrices_that_the_dense_pass_finds_idle_leave_nothing_to_prune(tmp_path):
    """GPT-2 has cross-attention by its config, and no encoder calls it."""
    save_checkpoint(tmp_path / "model", "gpt2", add_cross_attention=True)
    asked = {"calibration": tokens(), "solver": "magnitude", "include": "*crossattention*"}
    with pytest.raises(UnsupportedModelError, match="no matrix is left to prune: .*its module is never called"):
        secateur.prune(tmp_path / "model", tmp_path / "out", **asked)
    with pytest.raises(UnsupportedModelError, match="no matrix is left to prune: .*its module is never called"):
        secateur.dry_run(tmp_path / "model", **asked)
    assert not (tmp_path / "out").exists()


def test_coverage_reads_the_field_that_the_recipe_names(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"body": "the quick brown fox. " * 40}))
    recipe = {"calibration": {"source": str(tmp_path / "texts.jsonl"), "text_field": "body"}}
    assert secateur.coverage_of(tmp_path / "model", recipe=recipe).share("pruned") == 1
