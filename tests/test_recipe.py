"""Recipes: presets, files, settings, rules, and every bad request before any work."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT, character_tokenizer, mixtral, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file

import secateur
from secateur import Recipe, Rule, SecateurError
from secateur.numerics.masks import is_met
from secateur.recipe.declare import fields_of
from secateur.recipe.files import to_yaml
from secateur.recipe.presets import PRESETS
from secateur.recipe.recipe import CalibrationText, recipe_schema
from secateur.recipe.resolve import resolve_recipe
from secateur.recipe.settings import SECTIONS, parse_settings
from secateur.recipe.solvers import MRP, SOLVERS
from secateur.recipe.steps import BlockRefit
from secateur.request import Request
from secateur.storage.json_files import sealed


def test_the_declarations_do_not_import_torch():
    code = "import sys, secateur.recipe.resolve, secateur.recipe.rules; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_option_has_a_help_text_and_a_default_in_its_range():
    kinds = [Recipe, CalibrationText, *SECTIONS.values(), *SOLVERS.values()]
    for kind in kinds:
        assert kind() == kind()
        for name, field in fields_of(kind).items():
            assert field.description, f"{kind.__name__}.{name}"


def test_balanced_is_the_default_and_a_named_solver_stands_alone():
    assert resolve_recipe() == Recipe.preset("balanced") == resolve_recipe("balanced")
    alone = resolve_recipe(solver="sparsegpt")
    assert (alone.refit, alone.allocation, alone.target, alone.refine) == (None, None, None, None)
    assert resolve_recipe(settings={"solver": "sparsegpt"}) == alone


def test_n_m_presets_have_no_allocation_and_search_further():
    assert Recipe.preset("best", "50%").solver.search_iterations == 12
    assert Recipe.preset("best", "2:4").solver.search_iterations == 24
    for name in ("balanced", "best"):
        assert Recipe.preset(name, "50%").allocation.rule == "curve"
        assert Recipe.preset(name, "2:4").allocation is None
    assert resolve_recipe("best", {"pattern": "2:4"}) == Recipe.preset("best", "2:4")


def test_presets_refit_otherwise_where_many_weights_go():
    for name in ("balanced", "best"):
        strengths = {pattern: Recipe.preset(name, pattern).refit.strength for pattern in ("50%", "59%", "60%", "2:4")}
        assert strengths == {"50%": 1, "59%": 1, "60%": 0.6, "2:4": 0.6}
    caps = {pattern: Recipe.preset("best", pattern).refit.max_tokens for pattern in ("50%", "59%", "60%", "2:4")}
    assert caps == {"50%": 600_000, "59%": 600_000, "60%": 1_200_000, "2:4": 600_000}


def test_a_recipe_is_not_changed_to_another_kind_of_pattern():
    with pytest.raises(SecateurError, match="allocation and refit do not suit 2:4"):
        Recipe.preset("best", "50%").changed({"pattern": "2:4"})
    assert Recipe.preset("fast", "50%").changed({"pattern": "2:4"}).pattern == Recipe(pattern="2:4").pattern


def test_settings_turn_steps_on_and_off_and_replace_solvers():
    changed = resolve_recipe("best", {"refit.epochs": 3, "allocation": "none", "damping": 0.05})
    assert changed.refit.epochs == 3
    assert changed.refit.step_tokens == 1024
    assert changed.allocation is None
    assert changed.damping == 0.05
    assert resolve_recipe("fast", {"refit.rate": 0.01}).refit.rate == 0.01
    other = resolve_recipe("best", {"solver.name": "mrp", "solver.block": 64})
    assert (other.solver.name, other.solver.block) == ("mrp", 64)
    assert Recipe.preset("fast").changed({"solver": "wanda"}).solver.name == "wanda"


def test_options_of_a_solver_that_is_not_named_are_the_default_ones(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pattern: 60%\n")
    for recipe in (path, Recipe.preset("fast"), {}, {"solver": MRP()}):
        assert resolve_recipe(recipe, {"solver.block": 64}).solver == MRP(block=64)


def test_settings_do_not_depend_on_their_order_and_lose_nothing():
    for names in (["solver.search_iterations", "solver.name"], ["solver.name", "solver.search_iterations"]):
        values = {"solver.search_iterations": 12, "solver.name": "admm"}
        assert resolve_recipe("fast", {name: values[name] for name in names}).solver.search_iterations == 12
    assert resolve_recipe("fast", {"solver.search_iterations": 12, "solver": "admm"}).solver.search_iterations == 12
    changed = resolve_recipe({"refit": BlockRefit(rate=0.01)}, {"refit.epochs": 1})
    assert changed.refit == BlockRefit(rate=0.01, epochs=1)
    with pytest.raises(SecateurError, match="target is 'dense': it must be a mapping of options"):
        resolve_recipe({"target": "dense"}, {"target.strength": 0.5})


def test_python_spellings_of_options_are_python():
    error = SecateurError("‹settings.refit=none›, ‹recipe=fast›, ‹seed=3›, ‹exclude='*.a'›, ‹refit.rate›")
    assert str(error) == "settings={'refit': None}, recipe='fast', seed=3, exclude='*.a', settings={'refit.rate': ...}"
    assert (
        error.for_command_line()
        == "--set refit=none, --recipe fast, --seed 3, --exclude '*.a', --set " + "refit.rate=..."
    )


def test_values_of_settings_are_yaml():
    found = parse_settings(["refit.rate=1e-3", "true_sequential=true", "pattern=2:4", "allocation=null", "seed=7"])
    assert found == {"refit.rate": 1e-3, "true_sequential": True, "pattern": "2:4", "allocation": None, "seed": 7}


PATTERNS = st.one_of(
    st.floats(0, 1).map(lambda share: f"{share * 100:.4g}%"),
    st.integers(2, 16).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: f"{n}:{m}")),
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(PRESETS)), PATTERNS, st.booleans(), st.integers(0, 2**63 - 1))
def test_any_recipe_is_the_same_after_a_file(tmp_path_factory, name, pattern, sequential, seed):
    rules = [{"match": "a.*", "dense": True}, {"match": ["b", "*"], "pattern": "2:4", "solver": {"name": "wanda"}}]
    recipe = Recipe.preset(name, pattern).changed({"true_sequential": sequential, "seed": seed, "rules": rules})
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_schema_accepts_every_preset_and_refuses_a_typo():
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the extra `eval`")
    schema = recipe_schema()
    for name in PRESETS:
        for pattern in ("50%", "2:4"):
            jsonschema.validate(Recipe.preset(name, pattern).to_dict(), schema)
    jsonschema.validate({"solver": "wanda", "rules": [{"match": "*", "dense": True}]}, schema)
    for wrong in ({"refti": {}}, {"refit": {"rate": 2}}, {"solver": {"name": "mrp", "mask": "X"}}, {"version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.fixture
def model(tmp_path):
    save_checkpoint(tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_saved_recipe_gives_the_same_bits(model, tmp_path):
    given = {"pattern": "60%", "calibration": tmp_path / "text.txt", "samples": 8, "seq_len": 32, "seed": 3}
    report = secateur.prune(model, tmp_path / "a", settings={"refit.epochs": 2}, **given)
    for number, name in enumerate(("recipe.yaml", "secateur.json")):
        out = tmp_path / f"again-{number}"
        again = secateur.prune(model, out, recipe=tmp_path / "a" / name)
        assert weights(out) == weights(tmp_path / "a")
        assert again.recipe == report.recipe
    assert Recipe.load(tmp_path / "a" / "recipe.yaml") == report.recipe
    assert "# Epochs over the calibration batches" in (tmp_path / "a" / "recipe.yaml").read_text()


def test_a_recipe_of_the_callers_batches_asks_for_them(model, tmp_path):
    secateur.prune(model, tmp_path / "a", solver="wanda", calibration=tokens())
    with pytest.raises(SecateurError, match="made for batches of tensors"):
        secateur.prune(model, tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml")
    secateur.prune(model, tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml", calibration=tokens())
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


MIXED = [
    {"match": ["model.layers.0.*", "model.layers.2.*"], "dense": True},
    {"match": "*.mlp.*", "pattern": "2:4"},
    {"match": "model.layers.2.mlp.up_proj", "dense": True},
    {"match": "*.o_proj", "solver": {"name": "magnitude"}},
]


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_rules_give_exactly_the_patterns_asked_for(model, tmp_path, preset):
    """The last match wins; an allocation spreads zeros over those alone that have the recipe's pattern."""
    recipe = Recipe.preset(preset, "60%").changed({"rules": MIXED})
    out = tmp_path / "out"
    text = {"calibration": tmp_path / "text.txt", "samples": 8, "seq_len": 32}
    report = secateur.prune(model, out, recipe=recipe, **text)
    found = {matrix.name.removeprefix("model.layers."): matrix for matrix in report.matrices}
    saved = load_file(out / "model.safetensors")
    mlp = [f"{layer}.mlp.{name}_proj" for layer in (0, 1, 2) for name in ("gate", "up", "down")]
    assert {name for name, matrix in found.items() if matrix.pattern == "2:4"} == {*mlp} - {"2.mlp.up_proj"}
    assert {name for name, matrix in found.items() if matrix.solver == "magnitude"} == {
        f"{n}.self_attn.o_proj" for n in (0, 1, 2)
    }
    rest = [matrix for matrix in found.values() if matrix.pattern != "2:4"]
    assert {matrix.name for matrix in rest} == {
        *(f"model.layers.{n}.self_attn.o_proj" for n in (0, 1, 2)),
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkv"),
    }
    total = sum(matrix.rows * matrix.columns for matrix in rest)
    assert abs(sum(matrix.zeros for matrix in rest) - round(0.6 * total)) <= len(rest) * (preset == "fast")
    assert (len({matrix.pattern for matrix in rest}) > 1) == (preset == "balanced")
    for matrix in report.matrices:
        zero = saved[f"{matrix.name}.weight"] == 0
        assert is_met(secateur.parse_pattern(matrix.pattern), zero)
        assert int(zero.sum()) == matrix.zeros
    assert report.dense["model.layers.0.self_attn.q_proj"].startswith("a rule leaves")
    assert not secateur.inspect(out).problems


def test_inspect_checks_every_matrix_against_its_own_rule(model, tmp_path):
    out = tmp_path / "out"
    recipe = Recipe(pattern="2:4", solver="magnitude", rules=[Rule(match="*.up_proj", pattern="1:4")])
    secateur.prune(model, out, recipe=recipe, calibration=tokens())
    path = out / "secateur.json"
    whole = json.loads(path.read_text())
    assert not secateur.inspect(out).problems
    changed = json.loads(json.dumps(whole))
    del changed["sha256"]
    changed["recipe"]["rules"][0]["pattern"] = "3:4"
    path.write_text(json.dumps(sealed(changed)))
    assert "its rule in the recipe says 3:4" in secateur.inspect(out).problems[0]
    changed["recipe"]["rules"] = [{"match": "*.q_proj", "dense": True}]
    path.write_text(json.dumps(sealed(changed)))
    assert any("a rule of the recipe leaves it dense" in problem for problem in secateur.inspect(out).problems)


def test_a_rule_can_prune_what_is_dense_by_default():
    def report(*rules):
        recipe = Recipe(solver="magnitude", rules=list(rules))
        return secateur.prune(mixtral(), recipe=recipe, calibration=tokens())

    assert report(Rule(match="*", pattern="60%")).dense["model.layers.0.mlp.gate"] == "router"
    assert "model.layers.0.mlp.gate" not in report(Rule(match="*.gate", dense=False)).dense
    found = secateur.prune(mixtral(), solver="magnitude", calibration=tokens(), include="*.mlp.*")
    assert found.dense["model.layers.0.mlp.gate"] == "router"
    assert {each.name.rpartition(".")[0] for each in found.matrices} == {
        f"model.layers.{n}.mlp.experts" for n in (0, 1)
    }


def test_a_report_of_a_model_in_memory_is_saved_beside_it(tmp_path):
    model = tiny_model("llama")
    report = secateur.prune(model, pattern="2:4", solver="wanda", calibration=tokens())
    model.save_pretrained(tmp_path)
    report.save(tmp_path)
    inspection = secateur.inspect(tmp_path)
    assert not inspection.problems
    assert sum(matrix.ok is True for matrix in inspection.matrices) == 14
    assert Recipe.load(tmp_path / "recipe.yaml").solver.name == "wanda"
    assert len(repr(report)) < 200


@pytest.mark.parametrize("family", ["vit", "mixtral"])
def test_models_of_any_class_are_inspected_and_packed_without_a_tokenizer(tmp_path, family):
    """Where the files have other names than the model, as transformers renames or fuses tensors on loading."""
    import transformers

    model, batches = mixtral(), tokens()
    if family == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))
        batches = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(4)]
    report = secateur.prune(model, pattern="2:4", solver="wanda", calibration=batches)
    model.save_pretrained(tmp_path / "pruned")
    report.save(tmp_path / "pruned")
    secateur.pack(tmp_path / "pruned", tmp_path / "packed")
    for folder in ("pruned", "packed"):
        inspection = secateur.inspect(tmp_path / folder)
        assert not inspection.problems
        assert sum(matrix.ok is True for matrix in inspection.matrices) == len(report.matrices)
    config = tmp_path / "pruned" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["pipeline"]}))
    with pytest.raises(SecateurError, match=r"names no model class of transformers \(architectures: \['pipeline'\]\)"):
        secateur.inspect(tmp_path / "pruned")


BAD_FILES = {
    "pattern: 50%\nrefit:\n  raet: 3\n": r"bad.yaml, line 3: refit has no option 'raet': .*did you mean 'rate'",
    "refit:\n  rate: fast\n": r"bad.yaml, line 2: refit.rate is 'fast': it must be a number",
    "refit:\n  epochs: 1.5\n": "line 2: refit.epochs is 1.5: it must be a whole number",
    "true_sequential: 1\n": "line 1: true_sequential is 1: it must be a valid boolean",
    "pattern: 2:4\nsolver: {name: mrp, blok: 3}\n": r"line 2: solver mrp has no option 'blok': .*did you mean 'block'",
    "solver: sparsgpt\n": r"line 1: unknown solver 'sparsgpt': .*did you mean 'sparsegpt'",
    "solver: {block: 3}\n": "line 1: the solver's name is missing",
    "polish: {}\n": "line 1: the recipe has no option 'polish'",
    "rules:\n- match: a\n  pattern: 3:2\n": "line 3: pattern 3:2 is not legal",
    "rules:\n- match: a\n": r"line 2: a rule needs a pattern, a solver or dense",
    "rules:\n- {match: a, dense: true, pattern: 2:4}\n": "line 2: a rule with dense: true can't have a pattern",
    "rules: 3\n": "line 1: rules is 3: it must be a list",
    "rules:\n- match: '*.nothing'\n  dense: true\n": r"no matrix matches '\*.nothing': .*the nearest are model",
    "- pattern\n": "is not a recipe: it must be a mapping",
    "": "is not a recipe: it must be a mapping such as `pattern: 50%`, but it is empty",
    "pattern: [\n": r"bad.yaml, line \d: not valid YAML",
    "pattern: 50%\npattern: 60%\n": "line 2: not valid YAML .*duplicate key",
    "solver: &a mrp\nallocation: *a\n": r"line 2: a recipe can't use YAML aliases",
    "<<: {seed: 3}\n": r"line 1: a recipe can't use YAML merge keys",
    "version: 2\n": "line 1: version is 2: this secateur reads recipes up to version 1; upgrade it",
    "max_memory: lots\n": "line 1: max_memory is 'lots'",
    "calibration: {samples: 0}\n": "line 1: calibration.samples is 0",
    "pattern: 2:4\nallocation: {rule: owl}\n": "line 2: allocation owl has no form for 2:4",
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.items(), ids=[text.replace("\n", "|") for text in BAD_FILES])
def test_bad_files_are_named_by_line_before_any_work(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SecateurError, match=message):
        secateur.prune(model, recipe=path, calibration=tokens())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_without_a_pattern_mixes_n_m_patterns_only_where_asked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("allocation: {rule: curve}\n")
    assert resolve_recipe(path, pattern="60%").allocation is not None
    with pytest.raises(SecateurError, match=r"would mix 2:4 with others.*--pattern 2:4"):
        resolve_recipe(path, pattern="2:4")
    assert resolve_recipe(path, {"allocation.rule": "curve"}, pattern="2:4").allocation is not None
    assert resolve_recipe(path, {"allocation": "none"}, pattern="2:4").allocation is None


def test_shortcuts_fill_in_and_may_not_contradict(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pattern: 60%\nsolver: wanda\n")
    assert resolve_recipe(path, seed=4, samples=8).seed == 4
    assert resolve_recipe(path, pattern="0.6").pattern == secateur.Unstructured(0.6)
    with pytest.raises(SecateurError, match=r"mine.yaml, line 1 says pattern: 60%, and pattern='2:4' contradicts it"):
        resolve_recipe(path, pattern="2:4")
    with pytest.raises(SecateurError, match="line 2 says solver: wanda") as raised:
        resolve_recipe(path, solver="mrp")
    assert "--solver mrp contradicts it" in raised.value.for_command_line()
    assert "--set solver=mrp" in raised.value.for_command_line()
    assert resolve_recipe(path, {"pattern": "2:4"}).pattern == secateur.NM(2, 4)
    assert resolve_recipe("balanced", solver="admm") == Recipe.preset("balanced")
    for made, other in ((Recipe.preset("balanced"), {"pattern": "70%"}), (Recipe(), {"solver": "admm"})):
        with pytest.raises(SecateurError, match="contradicts it"):
            resolve_recipe(made, **other)
        assert resolve_recipe(made, samples=8).calibration.samples == 8
    only_the_source = Recipe(calibration=CalibrationText(source="c4"))
    assert resolve_recipe(only_the_source, samples=32).calibration == CalibrationText(source="c4", samples=32)
    assert resolve_recipe({"calibration": only_the_source.calibration}, samples=32).calibration.samples == 32
    with pytest.raises(SecateurError, match="calibration.samples: 8"):
        resolve_recipe(Recipe(calibration=CalibrationText(samples=8)), samples=32)
    with pytest.raises(SecateurError, match="include can't be combined with a recipe's rules"):
        resolve_recipe(Recipe(rules=[Rule(match="*", dense=True)]), include=["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ptatern": "2:4"}, r"has no argument 'ptatern': .*did you mean 'pattern'"),
        ({"method": "mrp"}, "has no argument 'method'"),
        ({"epochs": 2}, r"has no argument 'epochs': .*write settings=\{'refit.epochs'"),
        ({"damping": 0.1}, r"write settings=\{'damping'"),
        ({"recipe": 3}, "recipe is a int: give a Recipe"),
        ({"recipe": {"refit": {"rate": "x"}}}, "refit.rate is 'x'"),
        ({"device": "nonsense"}, "device can't be used with a model object"),
        ({"max_shard_size": "garbage"}, "max_shard_size can't be used with a model object"),
        ({"resume": True, "overwrite": True}, "resume, overwrite can't be used with a model object"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(SecateurError, match=message):
        secateur.prune(tiny_model("llama"), calibration=tokens(), **arguments)


def test_shard_sizes_are_checked_before_any_work(model, tmp_path):
    for wrong in ("5 apples", "0GB", True, "-3"):
        with pytest.raises(SecateurError, match="max_shard_size is"):
            secateur.prune(model, tmp_path / "out", max_shard_size=wrong, calibration=tokens())
    secateur.prune(model, tmp_path / "out", solver="magnitude", max_shard_size="30KiB", calibration=tokens())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_other_wrong_kinds_of_things_are_named(tmp_path):
    with pytest.raises(SecateurError, match="inspect.. takes the folder of a checkpoint, not a LlamaForCausalLM"):
        secateur.inspect(tiny_model("llama"))
    with pytest.raises(SecateurError, match="inspect.. has no argument 'foldr'"):
        secateur.inspect(foldr=tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = secateur.prun


def test_an_encoder_at_the_default_recipe_is_told_what_to_do():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=128))
    with pytest.raises(SecateurError, match=r"gives no logits .*settings=\{'allocation': None\}") as raised:
        secateur.prune(model, calibration=tokens())
    assert "--set allocation=none" in raised.value.for_command_line()


def test_logits_of_pixels_are_refused():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    places = {"image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "num_labels": 16}
    model = transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**sizes, **places)).eval()
    images = [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(4)]
    with pytest.raises(SecateurError, match=r"logits of shape \(1, 16, 16, 16\)"):
        secateur.prune(model, calibration=images)


def test_a_model_that_returns_tuples_is_pruned_as_one_that_names_its_outputs():
    named, nameless = tiny_model("llama"), tiny_model("llama")
    nameless.config.return_dict = False
    for model in (named, nameless):
        secateur.prune(model, calibration=tokens())
    assert nameless.config.return_dict is False
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), nameless.parameters(), strict=True))


def test_a_batch_that_the_model_does_not_take_is_explained():
    batches = [{"input_ids": torch.ones(2, 8).long(), "inputs_embeds": torch.ones(2, 8, 32)}] * 2
    with pytest.raises(
        SecateurError,
        match=r"forward pass of LlamaModel fails on these inputs \(ValueError: .*exactly one of input_ids",
    ):
        secateur.prune(tiny_model("llama"), calibration=batches)


def test_batches_are_as_large_as_the_steps_of_a_refit(tmp_path):
    (tmp_path / "text.txt").write_text("a text of some length, to be cut into windows.\n" * 400)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    for changes, windows in (
        ({}, 32),
        ({"refit.epochs": 1}, 8),
        ({"refit.step_tokens": 1024}, 16),
    ):  # 2048 tokens at most
        recipe = resolve_recipe("fast", changes, samples=256, seq_len=64)
        request = Request(recipe, str(tmp_path / "text.txt"), None, lambda *_: None)
        batches = request.calibration(character_tokenizer(), config, lambda: False).batches
        assert {len(batch["input_ids"]) for batch in batches[:-1]} == {windows}


def test_random_bytes_are_a_recipe_or_an_error(tmp_path):
    chance, path = random.Random(0), tmp_path / "random.yaml"
    whole = to_yaml(Recipe.preset("best"))
    for _ in range(150):
        broken = bytearray(whole.encode())
        for _ in range(chance.randint(1, 6)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        with suppress(SecateurError):  # any other error fails the test
            Recipe.load(path)
