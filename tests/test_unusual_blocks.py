"""Blocks that are not a plain decoder's: what they return, hand on, and take in."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from helpers import find_chain, quiet
from models import VOCABULARY, mixtral, tokens
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import ModelOutput
from zoo import tiny

import secateur
from secateur.calibration.dense_pass import run_dense_pass
from secateur.calibration.stream import Stream
from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import BlockCall
from secateur.models.determinism import deterministic_forward

WIDTH = 16


class OddConfig(PretrainedConfig):
    model_type = "odd"
    vocab_size = VOCABULARY


@dataclass
class BlockOutput(ModelOutput):
    hidden_states: Any = None
    attentions: Any = None


class Layer(nn.Module):
    """Two projections, and a product of the caller's choice in between."""

    def __init__(self, inside, form):
        super().__init__()
        self.inside, self.out, self.form = inside, nn.Linear(WIDTH, WIDTH), form

    def forward(self, hidden_states):
        return self.form(hidden_states + self.out(torch.relu(run(self.inside, hidden_states))))


def run(inside, hidden):
    return (
        inside(hidden, hidden, hidden, need_weights=False)[0]
        if isinstance(inside, nn.MultiheadAttention)
        else inside(hidden)
    )


class OddModel(PreTrainedModel):
    """A language model of such layers."""

    config_class = OddConfig

    def __init__(self, make=lambda: nn.Linear(WIDTH, WIDTH), form=lambda hidden: hidden):
        super().__init__(OddConfig())
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList([Layer(make(), form) for _ in range(2)])

    def forward(self, input_ids=None, **_):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            output = layer(hidden)
            hidden = output["hidden_states"] if isinstance(output, dict) else output
            hidden = getattr(hidden, "hidden_states", hidden)
        return CausalLMOutput(logits=self.head(hidden))


@dataclass
class Carrier:
    """An output that is neither a tensor nor a collection."""

    hidden_states: torch.Tensor


def test_blocks_whose_output_is_an_object_are_pruned_as_one_block():
    model = OddModel(form=Carrier)
    report = secateur.prune(model, calibration=tokens(16), recipe="fast")
    assert "can't be replayed block by block (block layers.0 returns Carrier" in report.notices[0]
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    "form", [BlockOutput, namedtuple("BlockOutput", ["hidden_states"]), lambda hidden: {"hidden_states": hidden}]
)
def test_an_output_with_names_keeps_its_form(form):
    """Also where gradients are taken through the blocks."""
    plain, named = OddModel(), OddModel(form=form)
    for model in (plain, named):
        secateur.prune(model, calibration=tokens(16))
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), named.parameters(), strict=True))


def test_torchs_attention_hides_its_products_and_says_so():
    model = OddModel(make=lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    with pytest.raises(UnsupportedModelError, match=r"in_proj_weight enters .*multi_head_attention_forward in"):
        secateur.prune(model, solver="wanda", calibration=tokens())


def test_a_matrix_that_the_head_uses_too_is_refused():
    model = OddModel(make=lambda: nn.Linear(WIDTH, VOCABULARY, bias=False))
    model.layers[1].inside, model.layers[1].out = model.head, nn.Linear(VOCABULARY, WIDTH)
    model.layers[0] = Layer(nn.Linear(WIDTH, WIDTH), lambda hidden: hidden)
    with pytest.raises(SecateurError, match=r"layers\.1\.inside is the same tensor as head\.weight"):
        secateur.prune(model, solver="wanda", calibration=tokens())
    assert bool((model.head.weight != 0).all())


class TwoViews(nn.Module):
    """The first half of the positions to one matrix, and every second one to another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        half = hidden.shape[1] // 2
        return torch.cat([self.first(hidden[:, :half]), self.second(hidden[:, ::2])], 1)


def test_two_views_of_one_tensor_are_two_inputs():
    model = OddModel(make=TwoViews).eval()
    stream = run_dense_pass(model, find_chain(model), [{"input_ids": ids} for ids in tokens()], quiet).stream
    leaders = [group.leader.name for group in stream.groups["layers.0"]]
    assert leaders == ["layers.0.inside.first", "layers.0.inside.second", "layers.0.out"]


def recorded_inputs(model, chain, batch):
    """What flows into each block of a model."""
    found = {}

    def keep(block):
        return lambda _module, args, kwargs: found.update({block.name: BlockCall.split(block, args, kwargs)[0].clone()})

    hooks = [each.module.register_forward_pre_hook(keep(each), with_kwargs=True) for each in chain.blocks]
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["zaya", "hy_v4", "gemma3n_text", "gpt_neo"])
@torch.no_grad()
def test_later_blocks_get_what_pruned_ones_hand_on(family):
    """A router's states (Zaya), or keys and values (Gemma 3n), next to hidden states."""
    model = tiny(family, least_depth=4)
    batches = [{"input_ids": ids} for ids in tokens(8)]
    with deterministic_forward(model):
        chain = find_chain(model)
        stream: Stream = run_dense_pass(model, chain, batches, quiet).stream
        expected_of_dense = recorded_inputs(model, chain, batches[0])
        stream.dense = [hidden.clone() for hidden in stream.hidden]
        reached, dense = {}, {}
        for block in chain.blocks:
            reached[block.name], dense[block.name] = stream.hidden[0].clone(), stream.dense[0].clone()
            stream.dense = stream.outputs(block, of_dense=True)
            for matrix in block.matrices:
                matrix.stored.mul_(torch.rand(matrix.stored.shape) > 0.5)
            stream.advance(block)
        expected = recorded_inputs(model, chain, batches[0])
    for name, hidden in expected.items():
        assert torch.allclose(reached[name], hidden, rtol=1e-4, atol=1e-5), name
        if family != "gemma3n_text":  # its blocks share a container
            assert torch.allclose(dense[name], expected_of_dense[name], rtol=1e-4, atol=1e-5), name


def padded_batches():
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(12)]
    for batch in batches:
        batch["attention_mask"][1, 9:] = 0
    return batches


def test_padding_is_left_out_where_positions_come_first():
    """Longformer multiplies (T, B, C)."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**sizes, vocab_size=VOCABULARY, attention_window=8, pad_token_id=1)
    model, batches = transformers.LongformerModel(config).eval(), padded_batches()
    with deterministic_forward(model):
        chain = find_chain(model)
        stream = run_dense_pass(model, chain, batches, quiet).stream
        block = chain.blocks[0]
        query = next(group for group in stream.groups[block.name] if group.leader.name.endswith("self.query"))
        found = stream.observe(block, [query])[query.leader.name]
    pairs = zip(stream.hidden, batches, strict=True)
    X = torch.cat([hidden[batch["attention_mask"].bool()] for hidden, batch in pairs]).double()
    assert found.tokens == len(X)
    torch.testing.assert_close(found.H.double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_is_left_out_of_latent_attention():
    """Its products have sizes of 1 between sequences and positions."""
    model, batches = tiny("youtu"), padded_batches()
    with deterministic_forward(model):
        stream = run_dense_pass(model, find_chain(model), batches, quiet).stream
    assert stream.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert "model.layers.0.self_attn.kv_b_proj" in [
        matrix.name for group in stream.groups["model.layers.0"] for matrix, _ in group.members
    ]


def test_experts_that_get_every_token_are_refused_with_padding():
    """Their rows come in the order that the router sends them."""
    model = mixtral(num_local_experts=2, num_experts_per_tok=2)
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_up_proj\[0\] .*padded ones can't be told apart"):
        secateur.prune(model, solver="wanda", calibration=padded_batches())


def test_experts_that_get_every_token_have_no_dense_target():
    model = mixtral(num_local_experts=2, num_experts_per_tok=2)
    with pytest.raises(SecateurError, match="it has no dense target"):
        secateur.prune(
            model, solver="mrp", calibration=tokens(), settings={"target.kind": "dense", "target.strength": 0.5}
        )


def test_a_block_without_gradients_can_not_be_refit():
    def detached(hidden):
        return hidden.detach()

    with pytest.raises(UnsupportedModelError, match="has no gradient with respect to its weights"):
        secateur.prune(OddModel(form=detached), calibration=tokens(16), settings={"allocation": None})


def test_a_stub_gives_none_for_what_no_later_block_takes():
    """Attention weights, which GPT-Neo's blocks return."""
    chain = find_chain(tiny("gpt_neo"))
    assert chain.stub_outputs is not None
    assert {stub.rest for stub in chain.stub_outputs.values()} == {(None,)}
