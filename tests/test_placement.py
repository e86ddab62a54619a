"""Weights mapped from files give what weights in memory give, and no more of them is copied than what runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import FAMILIES, TEXT, character_tokenizer, save_checkpoint, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import tiny

import secateur
from secateur.checkpoints.load import load
from secateur.models.discovery import find_block_chains
from secateur.models.placement import InMemory, OffloadedWeights
from secateur.pruning.fisher import output_fisher_information
from secateur.recipe.recipe import Recipe

LAYERS = 6
BATCHES = tokens(8)


@pytest.fixture
def folder(tmp_path):
    """In fp16, which every CPU computes in fp32."""
    save_checkpoint(tmp_path / "model", dtype=torch.float16, num_hidden_layers=LAYERS)
    return tmp_path / "model"


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_a_run_on_mapped_weights_gives_the_bits_of_one_in_memory(tmp_path, family, recipe):
    save_checkpoint(tmp_path / "model", family)
    settings = {"pattern": "50%", "recipe": recipe, "calibration": BATCHES}
    checkpoint = load(str(tmp_path / "model"))
    secateur.prune(checkpoint, **settings)
    secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    assert check_same_bits(tmp_path / "out", checkpoint.model) >= FAMILIES[family][2] * 2


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def check_same_bits(folder, model):
    """Whether saved tensors are those of a model in memory, negative zeros included; returns how many."""
    saved, inside = load_file(folder / "model.safetensors"), model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(bits(tensor), bits(inside[name].to(tensor.dtype))), name
    return len(saved)


def test_a_model_that_is_one_block_runs_on_mapped_weights(tmp_path):
    """Zamba shares a layer between its blocks, and is pruned as a whole."""
    tiny("zamba").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"pattern": "50%", "solver": "sparsegpt", "calibration": BATCHES}
    checkpoint = load(str(tmp_path / "model"))
    report = secateur.prune(checkpoint, **settings)
    assert "can't be replayed block by block" in report.notices[0]
    secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    check_same_bits(tmp_path / "out", checkpoint.model)


def test_experts_on_mapped_weights(tmp_path):
    tiny("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"pattern": "50%", "recipe": "balanced", "calibration": BATCHES}
    checkpoint = load(str(tmp_path / "model"))
    secateur.prune(checkpoint, **settings)
    secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    again = load(str(tmp_path / "out")).model.state_dict()
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def files_of(model):
    """The file that each parameter is mapped from, by its address; empty for what is in memory."""
    parts = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in part[0].split("-")), part[5] if len(part) > 5 else "") for part in parts]
    return {
        name: next(path for first, last, path in ranges if first <= parameter.data_ptr() < last)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped from where")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "qwen3_moe", "jamba"])
def test_no_weights_are_held_in_memory_fused_experts_among_them(family, tmp_path):
    tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    mapped = load(str(tmp_path / "model"), converted=tmp_path / "converted").model
    in_memory = load(str(tmp_path / "model")).model.state_dict()
    assert {name for name, path in files_of(mapped).items() if not path.startswith(str(tmp_path))} == set()
    assert mapped.state_dict().keys() == in_memory.keys()
    assert all(torch.equal(tensor, in_memory[name].to(tensor.dtype)) for name, tensor in mapped.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in mapped.modules())


def test_an_expert_that_the_files_lack_is_told(tmp_path):
    tiny("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lost = [name for name in weights if "layers.1" in name and "experts" in name]
    for name in lost:
        del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 tensors \(model.layers.1.mlp.experts"):
        secateur.prune(tmp_path / "model", tmp_path / "out", calibration=BATCHES)
    assert not (tmp_path / "out").exists()


def test_weights_in_a_wider_dtype_than_most_are_not_rounded(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    exact = weights[name] = torch.randn(weights[name].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    secateur.prune(folder, tmp_path / "out", pattern="50%", solver="magnitude", calibration=BATCHES)
    saved = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert saved.dtype == torch.float32
    assert torch.equal(saved[saved != 0], exact[saved != 0])


def test_routers_in_a_wider_dtype_keep_their_bits_though_their_names_change_while_loading(tmp_path):
    tiny("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    routers = [name for name in weights if name.endswith("gate.weight")]
    assert routers
    assert all(name not in tiny("mixtral").state_dict() for name in routers)
    for name in routers:
        weights[name] = torch.randn(weights[name].shape)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    secateur.prune(tmp_path / "model", tmp_path / "out", pattern="50%", solver="magnitude", calibration=BATCHES)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) and saved[name].dtype == torch.float32 for name in routers)


def test_the_source_files_are_never_written_to(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    secateur.prune(folder, tmp_path / "out", pattern="2:4", calibration=BATCHES)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def copied(monkeypatch):
    """The most weights that were copied in at a time."""
    most, held = [0], [0]
    enter = OffloadedWeights._copied

    def counted(self, tensors):
        tensors = list(tensors)
        size = sum(tensor.numel() for tensor in tensors)
        context = enter(self, tensors)

        class Counted:
            def __enter__(self):
                context.__enter__()
                held[0] += size
                most[0] = max(most[0], held[0])

            def __exit__(self, *error):
                held[0] -= size
                return context.__exit__(*error)

        return Counted()

    monkeypatch.setattr(OffloadedWeights, "_copied", counted)
    return most


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_one_block_is_copied_in_at_a_time(folder, tmp_path, monkeypatch, recipe):
    most = copied(monkeypatch)
    secateur.prune(folder, tmp_path / "out", recipe=recipe, calibration=BATCHES)
    model = load(str(folder)).model
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    part = model if recipe == "balanced" else model.model  # whose allocation asks for predictions
    every = sum(tensor.numel() for tensor in (*part.parameters(), *part.buffers()))
    assert most[0] == every - (LAYERS - 1) * block


def test_layers_stay_between_forward_passes_where_there_is_room(folder):
    model = load(str(folder), converted=folder / "converted").model
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    one_a_layer = model.model.layers[0].mlp.down_proj.weight.shape
    outputs, copies = [], []
    for room in (0, 2 * 4 * layer, 10**9):
        placement = OffloadedWeights("cpu", torch.float32, room)
        shapes = []
        copy = placement._copy
        placement._copy = lambda data, copy=copy, shapes=shapes: shapes.append(data.shape) or copy(data)
        with placement.onload_model(model.model), torch.no_grad():
            outputs.append([model.model(ids).last_hidden_state for ids in BATCHES[:3]])
        copies.append(shapes.count(one_a_layer))
        assert not placement._copies
    assert copies == [3 * LAYERS, 2 + 3 * (LAYERS - 2), LAYERS]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_weights_that_can_run_as_they_lie_in_their_files_are_copied_only_to_be_written(tmp_path):
    save_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    model = load(str(tmp_path / "model"), converted=tmp_path / "converted").model
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    placement = OffloadedWeights("cpu", torch.bfloat16)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    found = {}
    for name, module in model.named_modules():
        for own, _ in module.named_parameters(name, recurse=False):
            part = own.rpartition(".")[2]
            module.register_forward_hook(
                lambda m, *_, own=own, part=part: found.update({own: getattr(m, part).data_ptr()})
            )
    with placement.onload_model(model), torch.no_grad():
        outputs = model(BATCHES[0]).logits
    with torch.no_grad():
        assert torch.equal(outputs, dense(BATCHES[0]).logits)
    assert found == places
    block = find_block_chains(dense, {"input_ids": BATCHES[0]}, Recipe()).blocks[0]
    block = replace(block, module=model.get_submodule(block.name))
    with placement.onload_block(block):
        assert all(
            model.get_parameter(f"{block.name}.{name}").data_ptr() != places[f"{block.name}.{name}"]
            for name, _ in block.module.named_parameters()
        )


@pytest.mark.parametrize("family", ["bart", "mamba"])
def test_what_a_mapped_model_leaves_dense_is_what_one_in_memory_does(family, tmp_path):
    """Copying weights in does not count as a use: cross-attention without an encoder stays dense, and so does A_log."""
    tiny(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"pattern": "50%", "solver": "magnitude", "calibration": BATCHES}
    in_memory = secateur.prune(load(str(tmp_path / "model")), **settings)
    mapped = secateur.prune(tmp_path / "model", tmp_path / "out", **settings)
    assert mapped.dense == in_memory.dense != {}


def test_sensitivity_of_mapped_weights_has_the_bits_of_those_in_memory(folder):
    checkpoint, mapped = load(str(folder)), load(str(folder), converted=folder / "converted")
    placement = OffloadedWeights("cpu", checkpoint.compute_dtype)
    batches = [{"input_ids": ids} for ids in BATCHES]
    found = []
    for model, where in ((checkpoint.model, InMemory()), (mapped.model, placement)):
        structure = find_block_chains(model, batches[0], Recipe(), where)
        found.append(output_fisher_information(model, structure.blocks, batches, 4, 0, where))
    assert not placement._copies
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) and found[0][name].any() for name in found[0])


def test_a_backward_pass_through_weights_that_are_copied_again(folder):
    """As behind an encoder whose outputs a stack of other layers takes: those have run, and their copies are gone."""
    checkpoint, mapped = load(str(folder)), load(str(folder), converted=folder / "converted")
    gradients = []
    for model, where in (
        (checkpoint.model, InMemory()),
        (mapped.model, OffloadedWeights("cpu", checkpoint.compute_dtype)),
    ):
        model.requires_grad_(False)
        hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).to(checkpoint.compute_dtype)
        with where.onload_model(model), torch.enable_grad():
            logits = model(inputs_embeds=hidden.requires_grad_(True)).logits
            logits.float().square().sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0].any()
    assert torch.equal(gradients[0], gradients[1])


def test_a_forward_pass_that_fails_leaves_no_copy(folder):
    model = load(str(folder), converted=folder / "converted").model
    placement = OffloadedWeights("cpu", torch.float32)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def fail(*_):
        raise ArithmeticError

    model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError), placement.onload_model(model):
        model(BATCHES[0])
    assert not placement._copies
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_layers_that_share_a_tensor_and_stay_leave_it_as_it_was():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]).half()
    layers[0][0].weight = layers[1][0].weight

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, hidden):
            return self.layers[0](self.layers[1](hidden))

    model, placement = Backwards(), OffloadedWeights("cpu", torch.float32, room=10**9)
    before = layers[0][0].weight.data_ptr()
    with placement.onload_model(model):
        model(torch.ones(1, 4))
    assert layers[0][0].weight.data_ptr() == before
    assert layers[0][0].weight.dtype == torch.float16
    assert not placement._copies


def test_tied_weights_in_a_wider_dtype_stay_tied_and_are_not_rounded(tmp_path):
    saved = save_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    weights = {name: each for name, each in saved.state_dict().items() if name != "lm_head.weight"}
    weights["model.embed_tokens.weight"] = torch.randn_like(weights["model.embed_tokens.weight"], dtype=torch.float32)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    prune_here(tmp_path)
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in files
    assert torch.equal(files["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_tied_weights_under_the_name_of_the_head_alone(tmp_path):
    saved = save_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    weights = dict(saved.state_dict())
    embedding = weights.pop("model.embed_tokens.weight")
    save_file({name: each.clone() for name, each in weights.items()}, tmp_path / "model" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    prune_here(tmp_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(pruned.get_input_embeddings().weight, embedding)
    assert torch.equal(pruned.lm_head.weight, embedding)


def test_a_config_of_another_model_is_refused_before_memory_is_taken(tmp_path):
    save_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 10**6}))
    with pytest.raises(secateur.SecateurError, match=r"lm_head.weight is \(\d+, 32\), but \(1000000, 32\) by "):
        prune_here(tmp_path)


def prune_here(folder):
    """Prune folder/model to folder/out."""
    (folder / "text.txt").write_text(TEXT)
    secateur.prune(folder / "model", folder / "out", solver="magnitude", calibration=folder / "text.txt", samples=4,
                   seq_len=32)  # fmt: skip
