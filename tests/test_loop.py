"""The loop over model families: what is observed, pruned, written and replayed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers import dense_pass, find_blocks, quiet
from models import FAMILIES, VOCABULARY, mixtral, randomised, tiny_model, tokens
from torch import nn
from torch.nn.utils import prune
from zoo import tiny

import secateur
from secateur.calibration import experts
from secateur.calibration.experts import recorded_calls
from secateur.calibration.stream import Stream
from secateur.errors import UnsupportedModelError
from secateur.numerics import damping
from secateur.numerics.hessian import Hessian, relative_error
from secateur.numerics.masks import is_met
from secateur.pruning import loop, matrix_step
from secateur.pruning.context import RunContext
from secateur.pruning.dense_target import Moments
from secateur.pruning.loop import prune_model
from secateur.pruning.matrix_step import prune_matrix
from secateur.recipe.patterns import NM, Unstructured
from secateur.recipe.recipe import Recipe, Rule
from secateur.recipe.steps import BlockRefit
from secateur.runtime import memory
from secateur.solvers import swaps

every_family = pytest.mark.parametrize("family", FAMILIES)


def context(pattern, solver="mrp", **others):
    """A run of one solver, without progress."""
    return RunContext(Recipe(pattern=pattern, solver=solver, **others), quiet)


def surveyed(model, batches):
    found = dense_pass(model, batches)
    return found.blocks, found.stream


@every_family
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_every_matrix_of_every_family_is_pruned_exactly(family, pattern):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    report = secateur.prune(model, pattern=pattern, calibration=tokens())
    assert len(report.matrices) == FAMILIES[family][2] * model.config.num_hidden_layers
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.removesuffix(".weight") for name in changed} == {matrix.name for matrix in report.matrices}
    weights = sum(matrix.rows * matrix.columns for matrix in report.matrices)
    assert sum(matrix.zeros for matrix in report.matrices) == weights // 2
    for matrix in report.matrices:
        wanted = secateur.parse_pattern(matrix.pattern)
        stored = model.get_parameter(matrix.name + ".weight").data
        weight = stored if matrix.input_dim == 1 else stored.T
        assert weight.shape == (matrix.rows, matrix.columns)
        assert int((weight == 0).sum()) == wanted.num_pruned(*weight.shape) == matrix.zeros
        assert is_met(wanted, weight == 0)
    assert model.training, "the training flag is given back"
    assert bool(torch.isfinite(model(tokens()[0]).logits).all())


@every_family
def test_mrp_loses_less_than_sparsegpt_and_magnitude(family):
    errors = {}
    for solver in ("mrp", "sparsegpt", "magnitude"):
        report = secateur.prune(tiny_model(family), pattern="50%", solver=solver, calibration=tokens(32))
        errors[solver] = report.mean_relative_error
    assert errors["mrp"] < errors["sparsegpt"] < errors["magnitude"]


@every_family
def test_hessians_equal_those_of_module_inputs(family):
    """Against an independent way to see inputs: hooks on modules, which exist for these families."""
    model = tiny_model(family)
    batches = tokens()
    blocks, stream = surveyed(model, batches)
    block = blocks[1]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in block.module.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2:
            path = f"{block.name}.{name}"
            hooks.append(module.register_forward_pre_hook(
                lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
            ))  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    stream.advance(blocks[0])
    hessians = stream.observe(block, stream.groups[block.name])
    members = [(group, matrix) for group in stream.groups[block.name] for matrix, _ in group.members]
    assert {matrix.name for _, matrix in members} == set(seen)
    for group, matrix in members:
        X = torch.cat(seen[matrix.name])
        assert hessians[group.leader.name].tokens == len(X)
        assert torch.allclose(hessians[group.leader.name].H, X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def test_matrices_with_one_input_share_one_hessian():
    _, stream = surveyed(tiny_model("llama"), tokens())
    groups = [
        [matrix.name.rsplit(".", 1)[1] for matrix, _ in group.members] for group in stream.groups["model.layers.0"]
    ]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_replay_equals_the_models_own_forward():
    """With no matrix changed, the last hidden states of the stream are the model's."""
    for family in ("gemma3", "gpt2", "falcon", "bloom"):
        model = tiny_model(family)
        batches = tokens()
        blocks, stream = surveyed(model, batches)
        with torch.no_grad():
            for block in blocks:
                stream.advance(block)
            norm = next(module for name, module in model.base_model.named_children() if name in ("norm", "ln_f"))
            for hidden, batch in zip(stream.hidden, batches, strict=True):
                expected = model.base_model(batch, use_cache=False).last_hidden_state
                assert torch.allclose(norm(hidden), expected, atol=1e-5)


def test_later_blocks_see_pruned_predecessors():
    """Block 1's reported error belongs to the Hessian behind the pruned block 0."""
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    batches = tokens()
    report = secateur.prune(model, pattern="50%", solver="wanda", calibration=batches)
    name = "model.layers.1.self_attn.q_proj"
    found = next(matrix for matrix in report.matrices if matrix.name == name)
    errors = {}
    for label, source in (("pruned", model), ("dense", dense)):
        captured = []
        hook = source.get_submodule(name).register_forward_pre_hook(lambda _, args, to=captured: to.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                source.eval()(batch)
        hook.remove()
        X = torch.cat(captured).flatten(0, 1)
        old, new = dense.get_submodule(name).weight.data, model.get_submodule(name).weight.data
        errors[label] = relative_error(new, old, X.T @ X / len(X))
    assert found.relative_error == pytest.approx(errors["pruned"], rel=1e-4)
    assert found.relative_error != pytest.approx(errors["dense"], rel=1e-3)


def test_true_sequential_observes_pruned_siblings():
    """o_proj then sees the output of pruned q, k, v; by default it sees that of the dense ones."""
    model = tiny_model("llama", num_hidden_layers=1)
    one, again = copy.deepcopy(model), copy.deepcopy(model)
    plain = secateur.prune(one, pattern="70%", solver="sparsegpt", calibration=tokens())
    sequential = secateur.prune(
        again, pattern="70%", solver="sparsegpt", calibration=tokens(), settings={"true_sequential": True}
    )
    for name, same in (("q_proj", True), ("o_proj", False), ("down_proj", False)):
        first, second = (
            next(matrix.relative_error for matrix in report.matrices if matrix.name.endswith(name))
            for report in (plain, sequential)
        )
        assert (first == second) is same


def test_same_seed_gives_the_same_bits():
    states = []
    for _ in range(2):
        model = tiny_model("qwen2", torch.bfloat16)
        secateur.prune(model, pattern="2:4", calibration=tokens())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_keep_their_dtype_and_zeros_survive_rounding():
    model = tiny_model("llama", torch.bfloat16)
    report = secateur.prune(model, pattern="50%", calibration=tokens())
    for matrix in report.matrices:
        weight = model.get_submodule(matrix.name).weight
        assert weight.dtype == torch.bfloat16
        assert int((weight == 0).sum()) == matrix.zeros


def test_weights_are_rounded_to_the_dtype_they_are_saved_in():
    model = tiny_model("llama")
    storage = {matrix.name: torch.bfloat16 for block in find_blocks(model) for matrix in block.matrices}
    rounded = RunContext(Recipe(), quiet, storage_of=lambda name, _own: storage[name])
    prune_model(model, [{"input_ids": batch} for batch in tokens()], rounded)
    for name in storage:
        weight = model.get_submodule(name).weight.data
        assert torch.equal(weight, weight.bfloat16().float())


def test_ties_and_the_head_stay_dense():
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    secateur.prune(model, pattern="50%", calibration=tokens())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_include_and_exclude_choose_matrices():
    model = tiny_model("llama")
    report = secateur.prune(
        model, pattern="50%", calibration=tokens(), include=["*.mlp.*"], exclude=["*.1.mlp.up_proj"]
    )
    assert {matrix.name.split(".", 2)[2] for matrix in report.matrices} == {
        "0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.down_proj",
    }  # fmt: skip
    assert report.dense["model.layers.1.mlp.up_proj"] == "a rule leaves '*.1.mlp.up_proj' dense"
    assert report.dense["model.layers.0.self_attn.q_proj"] == "a rule leaves '*' dense"
    with pytest.raises(ValueError, match=r"no matrix matches '\*.mpl.\*'.*the nearest are .*mlp"):
        find_blocks(model, exclude=["*.mpl.*"])


@pytest.mark.parametrize(
    "settings", [{}, {"target.kind": "residual", "target.strength": 0.5}], ids=["plain", "residual target"]
)
def test_padding_counts_nowhere(settings):
    """Neither in Hessians, nor in targets, nor in the figures of depth."""
    ids = torch.stack([batch[0] for batch in tokens(8)])
    padded = torch.cat([ids, torch.full((len(ids), 6), 5)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 6, dtype=torch.long)], 1)
    options = {"pattern": "50%", "solver": "wanda", "settings": settings}
    first = secateur.prune(tiny_model("llama"), calibration=[ids[:2], ids[2:]], **options)
    batches = [{"input_ids": padded[rows], "attention_mask": mask[rows]} for rows in (slice(2), slice(2, 4))]
    second = secateur.prune(tiny_model("llama"), calibration=batches, **options)
    for a, b in zip(first.matrices, second.matrices, strict=True):
        assert a.tokens == b.tokens
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-3)
    for a, b in zip(first.depth, second.depth, strict=True):
        assert (a.cosine, a.relative_error) == pytest.approx((b.cosine, b.relative_error), rel=1e-3)


def test_dropout_is_off_whatever_mode_the_model_is_in():
    training, evaluating = tiny_model("gpt2").train(), tiny_model("gpt2").eval()
    assert training.config.resid_pdrop > 0
    for model in (training, evaluating):
        secateur.prune(model, pattern="50%", solver="sparsegpt", calibration=tokens())
    assert all(torch.equal(tensor, training.state_dict()[name]) for name, tensor in evaluating.state_dict().items())
    assert training.transformer.h[0].training


def test_figures_are_of_the_weights_as_they_are_saved(monkeypatch):
    measured = []
    monkeypatch.setattr(matrix_step, "relative_error", lambda *tensors: measured.append(tensors) or 0.0)
    secateur.prune(tiny_model("llama", torch.bfloat16), pattern="50%", calibration=tokens())
    assert len(measured) == 14
    assert all(torch.equal(saved, saved.bfloat16().float()) for saved, *_ in measured)


def test_weights_of_a_double_precision_model_that_did_not_move_keep_their_digits():
    model = tiny_model("llama", torch.float64)
    before = copy.deepcopy(model.state_dict())
    secateur.prune(model, pattern="50%", solver="magnitude", calibration=tokens())
    for name, after in model.state_dict().items():
        assert torch.equal(after[after != 0], before[name][after != 0]), name


def test_a_row_scale_counts_in_the_choice_and_nowhere_else():
    matrix = find_blocks(tiny_model("llama"))[0].matrices[0]
    W = matrix.weight(1).detach().clone()
    scale = torch.ones(len(W))
    scale[: len(W) // 2] = 4.0
    moments = Moments(Hessian(torch.eye(W.shape[1]), 100))
    report = prune_matrix(matrix, 1, moments, None, Unstructured(0.5), scale, context("50%", "magnitude"))
    found = matrix.weight(1)
    order = (W * scale[:, None]).abs().flatten().argsort()
    assert report.zeros == W.numel() // 2
    assert not found.flatten()[order[: report.zeros]].any()
    assert torch.equal(found.flatten()[order[report.zeros :]], W.flatten()[order[report.zeros :]])


def test_the_seed_is_that_of_the_refit_too():
    recipe = {"pattern": "2:4", "solver": {"name": "magnitude"}, "refit": {"epochs": 1}}
    models = [tiny_model("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        secateur.prune(model, recipe=recipe | {"seed": seed}, calibration=tokens(96))
    same, again, other = (model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_a_residual_target_observes_a_block_again_after_each_group(monkeypatch):
    observed = []
    observe = loop.observe_moments
    monkeypatch.setattr(
        loop, "observe_moments", lambda *a: observed.append([g.leader.name for g in a[2]]) or observe(*a)
    )
    settings = {"target.kind": "residual", "target.strength": 0.25}
    secateur.prune(tiny_model("llama"), pattern="2:4", calibration=tokens(), settings=settings)
    assert len(observed) == 2 * 4  # q, k and v share an input, and so do gate and up
    assert all(len(groups) == 1 for groups in observed)


class Skipping(nn.Module):
    """A block list whose second block never uses one of its matrices."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(Half() for _ in range(2))
        self.config = None

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decay = nn.Parameter(torch.randn(8, 4))
        self.twisted = nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden):
        mixed = (self.twisted @ hidden.transpose(1, 2)).transpose(1, 2)  # weight @ x, as Mamba's dt_proj
        return self.used(hidden) + mixed @ torch.exp(self.decay.T)


def test_a_module_that_is_never_called_stays_dense_and_is_listed():
    outcome = prune_model(Skipping(), [{"input_ids": tokens()[0]}], context(NM(2, 4)))
    assert outcome.dense["layers.1.unused"] == "its module is never called on the calibration inputs"


class Choosing(nn.Module):
    """A list of experts of which the first alone is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden):
        return hidden + self.experts[0](hidden)


def test_an_expert_in_a_list_that_is_never_called_is_an_error_that_names_it():
    with pytest.raises(
        ValueError, match=r"layers.0.experts.1 saw no calibration token: it entered no matrix product.*exclude"
    ):
        prune_model(Chain(Choosing), [{"input_ids": tokens()[0]}], context(NM(2, 4)))


class TwoExperts(nn.Module):
    """Modules as experts: the first gets 3 tokens of a sequence, the second all others."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden):
        first, second = hidden[:, :3], hidden[:, 3:]
        return hidden + torch.cat([self.experts[0](first), self.experts[1](second)], 1)


def test_an_expert_that_is_a_module_keeps_the_hessian_of_its_few_tokens():
    model, inputs = Chain(TwoExperts), []
    batch = {"input_ids": tokens()[0][:1]}
    hook = model.layers[0].experts[0].register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    with torch.no_grad():
        model(batch["input_ids"])
    hook.remove()
    W, (X,) = model.layers[0].experts[0].weight.detach().double().clone(), inputs
    outcome = prune_model(model, [batch], context(NM(2, 4)))
    first, second, *_ = outcome.matrices
    assert [first.tokens, second.tokens, first.borrowed] == [3, 21, 0]
    lost = (model.layers[0].experts[0].weight.detach().double() - W) @ X[0].double().T
    assert first.relative_error == pytest.approx(
        float(lost.square().sum() / (W @ X[0].double().T).square().sum()), rel=1e-3
    )
    (notice,) = outcome.notices
    assert "2 matrices saw fewer calibration tokens than they have inputs (layers.0.experts.0: 3 tokens, 8" in notice


def test_fused_experts_of_an_unknown_form_keep_the_hessian_of_their_few_tokens(monkeypatch):
    monkeypatch.setattr(experts, "_all_sent_to", lambda *_: None)
    model, calibration = mixtral(num_local_experts=8, num_experts_per_tok=2), [tokens()[0]]
    layer = model.model.layers[0].mlp
    with recorded_calls(layer.experts) as calls, torch.no_grad():
        model(calibration[0])
    hidden, index, _ = calls[0][0]
    X, W = hidden.double(), layer.experts.gate_up_proj.detach().double().clone()
    counts = [int((index == expert).sum()) for expert in range(8)]
    assert 0 < min(counts) < 32
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=calibration)
    assert "matrices saw fewer calibration tokens than they have inputs" in report.notices[0]
    expert = counts.index(min(counts))
    matrix = {each.name: each for each in report.matrices}[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"]
    assert (matrix.tokens, matrix.borrowed) == (min(counts), 0)
    X = X[(index == expert).any(-1)]
    lost = (layer.experts.gate_up_proj[expert].detach().double() - W[expert]) @ X.T
    expected = float(lost.square().sum() / (W[expert] @ X.T).square().sum())
    assert matrix.relative_error == pytest.approx(expected, rel=1e-3)


class ByKeyword(nn.Module):
    """An MLP whose weights are stored transposed, and are given to methods of tensors by keyword."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, hidden):
        rows = hidden.reshape(-1, 8)
        mixed = rows.mm(mat2=self.up).relu().matmul(other=self.down)
        return (mixed + torch.stack([rows, rows]).bmm(mat2=self.experts).sum(0)).view_as(hidden)


class WithSubmodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = ByKeyword()

    def forward(self, hidden):
        return hidden + self.mlp(hidden)


def test_weights_that_products_take_by_keyword_are_seen():
    outcome = prune_model(Chain(WithSubmodule), [{"input_ids": tokens()[0]}], context(NM(2, 4)))
    names = {report.name for report in outcome.matrices if report.tokens == 48}
    assert names == {
        f"layers.{index}.mlp.{name}" for index in (0, 1) for name in ("up", "down", "experts[0]", "experts[1]")
    }


def test_a_model_that_changes_its_weights_in_a_forward_pass_is_refused():
    """RWKV divides those of deep blocks, and a saved copy would be divided again when it is loaded."""
    model = tiny("rwkv")
    model.config.rescale_every = 6
    with pytest.raises(UnsupportedModelError, match=r"changes its weights \(rwkv.blocks.0.*rescale_every=0"):
        secateur.prune(model, solver="magnitude", calibration=tokens())


def test_an_output_without_gradients_is_refused_by_the_curve_allocation():
    with pytest.raises(UnsupportedModelError, match="no gradient .* the curve allocation needs: use recipe='fast'"):
        secateur.prune(tiny("reformer"), solver="mrp", calibration=tokens(), settings={"allocation.rule": "curve"})


def test_weight_at_x_is_seen_and_other_uses_are_explained():
    model = Skipping()
    outcome = prune_model(
        model, [{"input_ids": tokens()[0]}], context(NM(2, 4), "wanda", rules=[Rule(match="*.unused", dense=True)])
    )
    reports = outcome.matrices
    assert {report.name for report in reports} == {f"layers.{i}.{name}" for i in (0, 1) for name in ("used", "twisted")}
    assert all(report.tokens == 48 for report in reports)
    assert "enters no matrix product" in outcome.dense["layers.0.decay"]


class Chain(Skipping):
    """Blocks that misbehave in a chosen way."""

    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.between = False

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            if self.between:
                hidden.mul_(0.5)
        return hidden


class InPlace(nn.Module):
    def __init__(self, in_place=True):
        super().__init__()
        self.up, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, hidden):
        change = self.up(hidden)
        return hidden.add_(change) if self.in_place else hidden + change


def test_blocks_that_change_their_input_are_replayed_right():
    reports = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = Chain(lambda in_place=in_place: InPlace(in_place))
        reports.append(prune_model(model, [{"input_ids": tokens()[0]}], context(NM(2, 4), "wanda")).matrices)
    assert [report.relative_error for report in reports[0]] == [report.relative_error for report in reports[1]]


def observed_inputs(model, batch):
    """The Hessian of what enters each Linear in a forward pass of the model, by hooks."""
    hessians = {}

    def keep(name):
        def hook(_module, args):
            X = args[0].reshape(-1, args[0].shape[-1]).double()
            hessians[name] = hessians.get(name, 0) + X.T @ X

        return hook

    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return hessians


@pytest.mark.parametrize("oddity", ["changes between blocks", "a loop", "a shared weight"])
def test_a_model_that_can_not_be_replayed_by_blocks_is_pruned_as_a_whole(oddity):
    torch.manual_seed(0)
    model, batch = Chain(InPlace), {"input_ids": tokens()[0]}
    if oddity == "changes between blocks":
        model.between = True
    elif oddity == "a loop":
        model.layers.append(model.layers[0])
    else:
        model.layers[1].up.weight = model.layers[0].up.weight
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    hessians = observed_inputs(model, batch)
    outcome = prune_model(model, [batch], context(NM(2, 4), "mrp"))
    assert "can't be replayed block by block" in outcome.notices[0]
    shared = oddity == "a shared weight"
    assert [each.name for each in outcome.matrices] == (["layers.0.up"] if shared else ["layers.0.up", "layers.1.up"])
    for report in outcome.matrices:
        H = sum(hessians.values()) if shared else hessians[report.name]
        D = (model.get_submodule(report.name).weight - dense[f"{report.name}.weight"]).detach().double()
        W = dense[f"{report.name}.weight"].double()
        expected = float(((D @ H) * D).sum() / ((W @ H) * W).sum())
        assert report.relative_error == pytest.approx(expected, rel=1e-4), "the dense model's inputs, of all uses"
        assert report.zeros == 32
    again = prune_model(copy.deepcopy(model), [batch], context(NM(2, 4), true_sequential=True))
    assert again.notices[0].endswith("fitted to its inputs where those before it are pruned")
    with pytest.raises(UnsupportedModelError, match=r"replayed block by block.*refit would need.*recipe='fast'"):
        prune_model(model, [batch] * 2, context(NM(2, 4), refit=BlockRefit()))


class SharedInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        return self.first(hidden) + self.second(hidden) + self.first(torch.tanh(hidden))


def test_a_matrix_with_a_second_input_shares_no_hessian():
    model = Chain(SharedInput)
    reports = prune_model(model, [{"input_ids": tokens()[0]}], context(NM(2, 4))).matrices
    assert [report.tokens for report in reports] == [96, 48, 96, 48]


@pytest.mark.parametrize("more", [{}, {"allocation.rule": "curve"}])  # without row scales, and with them
def test_a_run_refines_its_masks(more):
    errors = []
    for settings in (more, more | {"refine": {}}):
        report = secateur.prune(tiny_model("llama"), solver="wanda", calibration=tokens(32), settings=settings)
        errors.append(report.matrices[0].relative_error)
    assert all("rows_at_optimum" in each.figures for each in report.matrices)
    assert errors[1] < 0.9 * errors[0]


def test_a_run_that_would_refine_too_wide_a_matrix_is_refused_before_any_change(monkeypatch):
    monkeypatch.setitem(swaps.MAX_COLUMNS, "cpu", 32)
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"down_proj: swap refinement of 64 input columns .* limited to 32"):
        secateur.prune(model, solver="wanda", calibration=tokens(), settings={"refine": {}})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_damping_and_shrinkage_of_a_recipe_reach_the_solver():
    settings = {"damping": 0.05, "shrinkage": 0.25}
    report = secateur.prune(tiny_model("llama"), solver="mrp", calibration=tokens(8), settings=settings)
    assert {tuple(each.figures["damping"]) for each in report.matrices} == {(0.05,)}
    assert {each.figures["shrinkage"] for each in report.matrices} == {0.25}


def test_fused_experts_are_solved_one_by_one_with_their_own_tokens():
    model = mixtral()
    report = secateur.prune(model, pattern="2:4", calibration=tokens(32))
    experts = [matrix for matrix in report.matrices if ".experts." in matrix.name]
    assert len(experts) == 2 * 4 * 2
    assert sum(matrix.tokens for matrix in experts if "0.mlp.experts.gate_up_proj" in matrix.name) == 2 * 32 * 24
    weight = model.model.layers[1].mlp.experts.down_proj
    assert bool(((weight.view(4, 32, -1, 4) == 0).sum(-1) == 2).all())
    assert all(report.dense[f"model.layers.{index}.mlp.gate"] == "router" for index in (0, 1))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_are_observed_whatever_implementation_the_model_has(implementation):
    reports = []
    for chosen in ("eager", implementation):
        model = mixtral()
        model.set_experts_implementation(chosen)
        reports.append(secateur.prune(model, pattern="2:4", solver="mrp", calibration=tokens(32)))
        assert model.config._experts_implementation == chosen, "given back"
    first, second = ([(each.name, each.tokens, each.relative_error) for each in report.matrices] for report in reports)
    assert first == second


def test_experts_with_few_tokens_borrow_those_of_all():
    model, calibration = mixtral(num_local_experts=8, num_experts_per_tok=2), [tokens()[0][:1, :12]]
    layer = model.model.layers[0].mlp
    with recorded_calls(layer.experts) as calls, torch.no_grad():
        model(calibration[0])
    hidden, index, _ = calls[0][0]
    dense = {name: layer.experts.get_parameter(name).detach().double() for name in ("gate_up_proj", "down_proj")}
    settings = {"shrinkage": "auto"}
    report = secateur.prune(model, pattern="2:4", solver="mrp", calibration=calibration, settings=settings)
    assert "experts saw fewer calibration tokens than they have inputs" in report.notices[0]
    matrices = {matrix.name: matrix for matrix in report.matrices}
    for expert in range(8):
        own = (index == expert).any(-1)
        X, gate_up = hidden.double(), dense["gate_up_proj"][expert]
        gate, up = (X @ gate_up.T).chunk(2, dim=-1)
        inputs = {"gate_up_proj": X, "down_proj": torch.nn.functional.silu(gate) * up}
        for name, A in inputs.items():
            matrix = matrices[f"model.layers.0.mlp.experts.{name}[{expert}]"]
            assert matrix.tokens == int(own.sum())
            share = max(0.0, 1 - int(own.sum()) / A.shape[1])
            assert matrix.borrowed == pytest.approx(share)
            effective = round(1 / ((1 - share) ** 2 / max(1, int(own.sum())) + share**2 / len(A)))
            assert matrix.figures["shrinkage"] == damping.shrinkage_for(A.shape[1], effective)
            routed = A[own].T @ A[own] / own.sum() if own.any() else 0.0
            H = share * (A.T @ A) / len(A) + (1 - share) * routed
            W = dense[name][expert]
            D = layer.experts.get_parameter(name)[expert].detach().double() - W
            expected = float(((D @ H) * D).sum() / ((W @ H) * W).sum())
            assert matrix.relative_error == pytest.approx(expected, rel=1e-3)


def test_experts_that_get_zeros_for_the_tokens_of_others_see_and_borrow_tokens_too():
    """Llama 4 runs all tokens through every expert, times a score that is zero for tokens of others."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 12, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}
    config = transformers.Llama4TextConfig(num_local_experts=8, num_experts_per_tok=1, **sizes, **heads)
    model, calibration = randomised(transformers.Llama4ForCausalLM(config)), [tokens()[0][:2]]
    layer = model.model.layers[0].feed_forward
    with recorded_calls(layer.experts) as calls, torch.no_grad():
        model(calibration[0])
    by_expert = calls[0][0][0].view(8, -1, 32).double()
    sent = by_expert.any(-1).sum(1).tolist()
    assert 0 in sent, "an expert without a token"
    assert max(sent) > 12, "and one with enough for its down projection"
    dense = {name: layer.experts.get_parameter(name).detach().double() for name in ("gate_up_proj", "down_proj")}
    report = secateur.prune(model, pattern="50%", solver="mrp", calibration=calibration)
    assert "experts saw fewer calibration tokens than they have inputs" in report.notices[0]
    matrices = {matrix.name: matrix for matrix in report.matrices}
    for expert, count in enumerate(sent):
        all_tokens, own = by_expert.sum(0), by_expert[expert][by_expert[expert].any(-1)]
        for name in ("gate_up_proj", "down_proj"):
            matrix, W = matrices[f"model.layers.0.feed_forward.experts.{name}[{expert}]"], dense[name][expert].T
            everything, routed = (
                X if name == "gate_up_proj" else _activations(X, dense["gate_up_proj"][expert])
                for X in (all_tokens, own)
            )
            share = max(0.0, 1 - count / W.shape[1])
            assert (matrix.tokens, matrix.borrowed) == (count, pytest.approx(share))
            H = share * (everything.T @ everything) / len(everything)
            H = H + (1 - share) * (routed.T @ routed) / max(1, count)
            D = layer.experts.get_parameter(name)[expert].detach().double().T - W
            expected = float(((D @ H) * D).sum() / ((W @ H) * W).sum())
            assert matrix.relative_error == pytest.approx(expected, rel=1e-3)


def _activations(X, gate_up):
    gate, up = (X @ gate_up).chunk(2, dim=-1)
    return up * torch.nn.functional.silu(gate)


def test_hessians_that_do_not_fit_are_observed_in_passes(monkeypatch):
    whole = secateur.prune(mixtral(), pattern="2:4", solver="mrp", calibration=tokens(32))
    passes, observe = [], Stream.observe

    def watched(stream, block, groups, *others):
        passes.append(len(groups))
        return observe(stream, block, groups, *others)

    monkeypatch.setattr(Stream, "observe", watched)
    monkeypatch.setattr(memory, "HESSIAN_BYTES", 4 * 5 * 64**2)
    model = mixtral()
    parts = secateur.prune(model, pattern="2:4", solver="mrp", calibration=tokens(32))
    assert len(passes) > 2, "of two blocks"
    assert {matrix.name for matrix in parts.matrices} == {matrix.name for matrix in whole.matrices}
    assert all(matrix.sparsity == 0.5 for matrix in parts.matrices)
    assert parts.mean_relative_error == pytest.approx(whole.mean_relative_error, rel=1e-5)


def test_damping_retries_are_in_the_report(monkeypatch):
    real, calls = damping.inverse_factor, []

    def fail_once(H):
        calls.append(1)
        return None if len(calls) == 1 else real(H)

    monkeypatch.setattr(damping, "inverse_factor", fail_once)
    report = secateur.prune(tiny_model("llama"), pattern="50%", solver="mrp", calibration=tokens())
    assert report.matrices[0].figures["damping"] == [0.01, 0.1]
    assert report.matrices[-1].figures["damping"] == [0.01]


def test_hopeless_hessian_names_the_layer(monkeypatch):
    monkeypatch.setattr("secateur.numerics.damping.inverse_factor", lambda H: None)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: the Hessian \(32 inputs\) is not positive"):
        secateur.prune(tiny_model("llama"), pattern="50%", calibration=tokens())


def unchanged(model, action, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        action(model)
    assert all(torch.equal(tensor, before[name]) or tensor.isnan().any() for name, tensor in model.state_dict().items())


def test_bad_models_are_refused_and_left_as_they_were():
    def pruned(model, **options):
        return secateur.prune(model, **({"pattern": "50%", "calibration": tokens()} | options))

    damaged = tiny_model("llama")
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    unchanged(damaged, pruned, r"model.layers.1.mlp.up_proj.weight has 1 weights that are NaN")
    exploding = tiny_model("llama")
    exploding.model.layers[1].mlp.down_proj.weight.data.fill_(1e38)
    unchanged(exploding, pruned, r"model.layers.1 gives NaN or infinite activations in the dense model")
    unchanged(
        tiny_model("llama"), lambda model: pruned(model, pattern="2:5"), r"layers.0.self_attn.q_proj: pattern 2:5 needs"
    )
    unchanged(tiny_model("llama"), lambda model: pruned(model, calibration=[]), "empty")
    unchanged(tiny_model("llama"), lambda model: pruned(model, calibration="c4"), "tokenizer")
    long = [torch.ones(1, 65, dtype=torch.long)]
    unchanged(
        tiny_model("llama"), lambda model: pruned(model, calibration=long), "65 tokens, but the model has 64 positions"
    )
    foreign = [torch.full((1, 8), 128)]
    unchanged(
        tiny_model("llama"),
        lambda model: pruned(model, calibration=foreign),
        "from 128 to 128, but the model's vocabulary",
    )


def test_models_that_hide_their_weights_are_refused():
    offloaded = tiny_model("llama")
    offloaded.model.layers[0]._hf_hook = object()
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0 carries an accelerate offload hook.*device_map"):
        secateur.prune(offloaded, pattern="50%", calibration=tokens())
    with pytest.raises(UnsupportedModelError, match="is compiled"):
        secateur.prune(torch.compile(tiny_model("llama")), pattern="50%", calibration=tokens())
    with pytest.raises(UnsupportedModelError, match="no prunable block"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModelError, match="has no transformers `config`"):
        secateur.prune(nn.DataParallel(tiny_model("llama")), pattern="50%", calibration=tokens())
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="outside"):
        secateur.prune(tiny_model("llama"), pattern="50%", calibration=tokens())


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
    ],
)
def test_weights_that_are_computed_before_each_call_are_refused(make):
    model = tiny_model("llama")
    make(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp.up_proj.weight is computed from other param"):
        secateur.prune(model, pattern="50%", calibration=tokens())


def test_what_a_tokenizer_gives_and_a_single_glob_are_taken():
    from transformers import BatchEncoding

    plain, wrapped = tiny_model("llama"), tiny_model("llama")
    settings = {"pattern": "50%", "solver": "wanda"}
    report = secateur.prune(plain, calibration=tokens(4), include=["*.mlp.*"], **settings)
    batches = [BatchEncoding({"input_ids": ids[None] if ids.ndim == 1 else ids}) for ids in tokens(4)]
    again = secateur.prune(wrapped, calibration=batches, include="*.mlp.*", **settings)
    assert [matrix.name for matrix in again.matrices] == [matrix.name for matrix in report.matrices]
    assert all(torch.equal(tensor, wrapped.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_random_numbers_of_a_forward_pass_are_the_runs_own():
    """As the hashes of an attention are: the same run gives the same bits, and the caller's generator isn't touched."""
    results = []
    for callers_seed in (1, 2):
        model = tiny_model("llama").eval()
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _m, _a, output: output + 0.1 * torch.randn_like(output))
        torch.manual_seed(callers_seed)
        before = torch.get_rng_state()
        secateur.prune(model, pattern="50%", calibration=tokens())
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_products_are_in_full_fp32_whatever_the_caller_allows():
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, set()
    model = tiny_model("llama").eval()
    model.model.layers[1].register_forward_hook(lambda *_: seen.add(settings.fp32_precision))
    settings.fp32_precision = "tf32"
    try:
        secateur.prune(model, pattern="50%", solver="sparsegpt", calibration=tokens())
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
    assert seen == {"ieee"}


def test_integer_matrices_are_taken_for_quantised_weights():
    model = tiny_model("llama")
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(model.layers.1.mlp.up_proj.weight is torch.int8\)"):
        secateur.prune(model, pattern="50%", calibration=tokens())
