"""Damaged and hostile files: exit code 2 and a message, never a traceback, and no escape to the terminal."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from models import TEXT, character_tokenizer, save_checkpoint, save_gguf
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification

import secateur
from secateur.runtime.messages import visible
from secateur.sources.gguf import convert_gguf
from secateur.storage.json_files import sealed

SMALL = ("--pattern", "50%", "--solver", "sparsegpt", "--samples", "4", "--seq-len", "32")
HOSTILE = ["[/red]x", "[link=https://evil.example]x[/link]", "\x1b[31mred", "[bold", "\u202etxt", "x\x07"]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a text, a GGUF file, and the model pruned."""
    place = tmp_path_factory.mktemp("made")
    save_checkpoint(place / "model", num_hidden_layers=2)
    (place / "text.txt").write_text(TEXT)
    save_gguf(place / "model.gguf")
    secateur.prune(
        place / "model", place / "pruned", pattern="50%", solver="sparsegpt", samples=4, seq_len=32,
        calibration=place / "text.txt",
    )  # fmt: skip
    return place


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made / "model", tmp_path / "model")


@pytest.fixture
def pruned(made, tmp_path):
    return shutil.copytree(made / "pruned", tmp_path / "pruned")


def changed_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def changed_metadata(folder, **values):
    data = json.loads((folder / "secateur.json").read_text()) | values
    del data["sha256"]
    (folder / "secateur.json").write_text(json.dumps(sealed(data)))


def refused(main, *arguments):
    """Run a command that must refuse; its message."""
    code, out, errors = main(*arguments)
    assert code == 2, (code, out, errors)
    assert "error" in errors.lower()
    assert "Traceback" not in errors
    assert "bug in secateur" not in errors
    assert "\x1b" not in out + errors
    return errors


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_files_are_printed_as_they_are(main, model, tmp_path, name):
    folder = tmp_path / name.replace("/", "-")
    model.rename(folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.ones(4, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, errors = main("inspect", folder)
    assert code == 0, errors
    for shown in (out, errors):
        assert not {"\x1b", "\x07", "\u202e"} & {*shown}
    assert "".join(visible(name)[:12].split()) in "".join(out.replace("│", "").split())
    code, out, errors = main("eval", folder, "--max-tokens", "64", "--seq-len", "32")
    assert code == 0, errors
    assert "\x1b" not in out + errors


def test_a_model_card_is_valid_yaml_whatever_names_say(main, made, model, tmp_path):
    name = "a: b #c \"d\" 'e'\nlicense: mit\n[x]"
    folder = model.rename(tmp_path / name)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: [1, 2]\n---\n# card\n")
    code, _, errors = main("prune", folder, tmp_path / "out\nlicense: none", "--calibration", made / "text.txt", *SMALL)
    assert code == 0, errors
    card = (tmp_path / "out\nlicense: none" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    found = YAML(typ="safe").load(header)
    assert found["license"] == "apache-2.0"
    assert "base_model" not in found  # a path means nothing to anybody else
    assert "\n# out\\nlicense: none\n" in f"\n{body}"


@pytest.mark.parametrize(
    "card",
    [
        "---\n" + DEEP + "\n---", "---\n" + "[" * 30_000 + "\n---", "---\na: *b\n---", "---\n- a\n---",
        "---\n\ttab: [\n---", "---\n---", "---\nlicense: !!bool foo\n---", "---\nlicense: !!int ''\n---",
        "---\na: &a {b: c}\n" + "".join(f"a: &a {{<<: [{', '.join(['*a'] * 10)}]}}\n" for _ in range(8)) + "---",
    ],
)  # fmt: skip
def test_a_source_card_of_any_kind_does_no_harm(main, made, model, tmp_path, card):
    (model / "README.md").write_text(card)
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL)
    assert code == 0, errors


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": 5},
        {"architectures": [5]},
        {"attn_implementation": "evil/kernel"},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": "2"},
        {"vocab_size": -1},
        {"hidden_size": 10**9},
        {"num_attention_heads": 0},
        {"model_type": ["llama"]},
        {"model_type": "x" * 300},
        {"auto_map": 5},
        {"quantization_config": 5},
        {"rope_parameters": 5},
    ],
)
def test_configs_that_make_no_sense(main, made, model, tmp_path, values):
    changed_json(model / "config.json", **values)
    for command in (("prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL), ("eval", model)):
        refused(main, *command)
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_far_larger_model_takes_no_memory(main, made, model, tmp_path):
    """Missing weights would be drawn at random before anybody sees that they are missing."""
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    changed_json(model / "config.json", intermediate_size=2_000_000)
    for command in (("prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL), ("eval", model)):
        assert "config.json makes a model of" in " ".join(refused(main, *command).split())
    with pytest.raises(secateur.SecateurError, match=r"config\.json makes a model of"):
        secateur.load(model)


def test_weights_under_another_name(main, made, model, tmp_path):
    """The library would load them, and the files that secateur checks would be others."""
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    changed_json(model / "config.json", transformers_weights="other.safetensors")
    errors = refused(main, "prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL)
    assert "transformers_weights is 'other.safetensors'" in errors
    changed_json(model / "config.json", transformers_weights=None, text_config={"transformers_weights": "a.bin"})
    for command in (("prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL), ("eval", model)):
        assert "transformers_weights is 'a.bin'" in refused(main, *command)
    changed_json(model / "config.json", text_config={"quantization_config": {"quant_method": "gptq"}})
    assert "is quantised (gptq)" in refused(main, "eval", model)


@pytest.mark.parametrize("name", ["²", "9" * 5000, "layers.10", "layers.2"])
def test_tensors_of_any_name_are_inspected(main, model, name):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: torch.ones(4, 4)}, model / "model.safetensors", {"format": "pt"})
    code, out, errors = main("inspect", model, "--json")
    assert code in (0, 1), errors
    assert name in [matrix["name"] for matrix in json.loads(out)["matrices"]]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [DEEP, "{", '{"a": 1e400}', "\x00", '"\\ud800"', "[]", ""])
def test_damaged_json_of_a_model(main, made, model, tmp_path, file, content):
    (model / file).write_text(content)
    code, out, errors = main("prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL)
    assert code in (0, 2), (code, out, errors)
    assert "Traceback" not in errors
    assert code == 2 or file not in ("config.json", "tokenizer.json")


@pytest.mark.parametrize(
    "content", [DEEP, "{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {}}']
)
def test_a_damaged_index(main, model, content):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(content)
    refused(main, "eval", model)


def test_a_model_without_a_vocabulary(main, made, model, tmp_path):
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"]["vocab"] = {}
    data["added_tokens"] = []
    (model / "tokenizer.json").write_text(json.dumps(data))
    refused(main, "prune", model, tmp_path / "out", "--calibration", made / "text.txt", *SMALL)


@pytest.mark.parametrize(
    "values",
    [
        {"identity": 5}, {"matrices": 5}, {"matrices": [5]}, {"matrices": [{}]}, {"summary": []},
        {"recipe": {"pattern": "x"}}, {"files": 5}, {"files": {"../x": {"sha256": "", "bytes": 0}}}, {"dense": 5},
        {"blocks": [{"a": 1}]}, {"calibration": 5}, {"calibration": {}}, {"calibration": {"samples": "x", "source": 5}},
        {"notices": 5}, {"environment": []},
    ],
)  # fmt: skip
def test_a_report_with_odd_fields(main, made, pruned, tmp_path, values):
    changed_metadata(pruned, **values)
    for command in (("eval", pruned, "--text", made / "text.txt", "--seq-len", 32, "--record"),
                    ("pack", pruned, tmp_path / "packed")):  # fmt: skip
        code, out, errors = main(*command)
        assert code in (0, 2), (out, errors)
        assert "bug in secateur" not in errors
    code, out, errors = main("inspect", pruned)
    assert code in (0, 2), (out, errors)
    assert "Traceback" not in errors
    prune = ("prune", made / "model", pruned, "--calibration", made / "text.txt", *SMALL)
    refused(main, *prune, "--resume")
    code, _, errors = main(*prune, "--overwrite")
    assert code == 0, errors


@pytest.mark.parametrize("content", [DEEP, "{", "[]", "{}", '{"sha256": 5}', "\x00"])
def test_a_report_that_is_none(main, pruned, content):
    (pruned / "secateur.json").write_text(content)
    refused(main, "inspect", pruned)
    if content != "{}":  # a recipe of defaults
        assert "secateur.json" in refused(main, "recipe", pruned / "secateur.json")


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"text": 5}',
        '{"text": "\\ud800"}',
        '{"text": 1e400}',
        "[]",
        "\x00",
        '{"messages": [5]}',
        '{"messages": {}}',
    ],
)
def test_damaged_jsonl(main, made, tmp_path, line):
    (tmp_path / "text.jsonl").write_text(line + "\n")
    refused(main, "prune", made / "model", tmp_path / "out", "--calibration", tmp_path / "text.jsonl", *SMALL)


@pytest.mark.parametrize(
    "content",
    [
        DEEP, "{", "[]", '{"cells": 5}', '{"settings": 5}', '{"settings": {}, "cells": {"dense": 5}}', '{"odd": 1}',
        '{"settings": {}, "cells": {"x": {"perplexity": {"a": 1.0}}}}',
        '{"settings": {}, "cells": {"dense": {"perplexity": {"a": "b"}}}}',
        '{"settings": {}, "cells": {"dense": {"perplexity": {"a": 1e400}}}}',
        '{"settings": {}, "cells": {"dense": {"perplexity": {}, "tasks": {"t": {}}}}}',
        '{"settings": {}, "cells": {"dense": {"perplexity": {}, "seconds": "x"}}}',
    ],
)  # fmt: skip
def test_damaged_results_of_a_comparison(main, made, tmp_path, content):
    (tmp_path / "compare.json").write_text(content)
    assert "compare.json" in refused(main, "compare", made / "model", "--out", tmp_path, "--recipes", "sparsegpt")


def test_pages_of_a_comparison_follow_no_link(tmp_path):
    from secateur.comparison.page import write_pages
    from secateur.comparison.results import Comparison

    (tmp_path / "private").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("compare.html", "compare.html.partial", "compare.csv"):
        (out / name).symlink_to(tmp_path / "private")
    write_pages(Comparison({"model": "<script>"}), out)
    assert (tmp_path / "private").read_text() == "mine"
    assert "&lt;script&gt;" in (out / "compare.html").read_text()


@pytest.mark.parametrize(
    "name", ["a" * 300, "~nobody-of-this-name", "loop", "loop/x", "a\x00b", "dangling", ".", "/", "\n"]
)
def test_odd_paths(main, made, model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    refused(main, "eval", name)
    refused(main, "inspect", name)
    refused(main, "eval", model, "--text", name)
    refused(main, "prune", model, tmp_path / "out", "--calibration", name, *SMALL)
    if name not in ("\n", "dangling"):  # a folder may be called so, and a link lead to one that is made
        refused(main, "prune", model, name, "--calibration", made / "text.txt", *SMALL)
    refused(
        main, "prune", model, tmp_path / "out", "--recipe", name if "/" in name or len(name) > 9 else f"./{name}.yaml"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickle_with_a_payload(main, model, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("it ran",))

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    refused(main, "eval", model, "--allow-pickle")
    refused(main, "bench", model)
    refused(main, "bench", model, "--allow-pickle")
    assert not (tmp_path / "ran").exists()


PLUGINS = {
    "raises": "raise RuntimeError('no luck')",
    "exits": "import sys; sys.exit(0)",
    "exits late": "import dataclasses, sys\n@dataclasses.dataclass\n"
    "class Solver:\n name = 'odd'\n def __call__(*_): sys.exit(0)",
    "other name": "import dataclasses\n@dataclasses.dataclass\nclass Solver: name = 'even'",
    "no call": "import dataclasses\n@dataclasses.dataclass\nclass Solver: name = 'odd'",
    "no class": "Solver = 5",
}


@pytest.mark.parametrize("kind", PLUGINS)
def test_plugins_that_fail(main, made, tmp_path, monkeypatch, kind):
    (tmp_path / "plugin_of_this_test.py").write_text(PLUGINS[kind])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_of_this_test", raising=False)
    point = metadata.EntryPoint("odd", "plugin_of_this_test:Solver", "secateur.solvers")
    monkeypatch.setattr("secateur.recipe.solvers.entry_points", lambda group: [point])
    arguments = ("--calibration", made / "text.txt", "--samples", "4", "--seq-len", "32", "--solver", "odd")
    assert "solver odd" in refused(main, "prune", made / "model", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_plugin_names_the_solver_and_the_matrix(main, made, tmp_path, monkeypatch):
    """It is not a bug in secateur, and from Python its traceback is there."""
    (tmp_path / "plugin_that_raises.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Solver:\n name = 'raising'\n"
        " def __call__(*_): raise IndexError('of mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("raising", "plugin_that_raises:Solver", "secateur.solvers")
    monkeypatch.setattr("secateur.recipe.solvers.entry_points", lambda group: [point])
    prune = (
        "prune",
        made / "model",
        tmp_path / "out",
        "--calibration",
        made / "text.txt",
        *SMALL,
        "--solver",
        "raising",
    )
    message = " ".join(refused(main, *prune).split())
    assert "model.layers.0.self_attn.q_proj: solver raising, a plug-in, failed: IndexError: of mine" in message
    with pytest.raises(secateur.SecateurError, match="solver raising, a plug-in") as failed:
        secateur.solve(torch.ones(2, 4), torch.eye(4), "50%", solver="raising")
    assert isinstance(failed.value.__cause__, IndexError)


def test_the_meta_device_is_none(main, made, tmp_path):
    prune = ("prune", made / "model", tmp_path / "out", "--calibration", made / "text.txt", *SMALL)
    assert "--device" in refused(main, *prune, "--device", "meta")
    assert "use cpu, cuda, cuda:1 or mps" in refused(main, *prune, "--device", "tpu")


def test_a_model_of_images_is_named_before_its_tokenizer_is_missed(main, made, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    message = refused(main, "prune", tmp_path / "vit", tmp_path / "out", "--calibration", made / "text.txt", *SMALL)
    assert "holds a ViTForImageClassification, which is not a causal language model" in message


@pytest.mark.parametrize("recipe", ["best", "balanced", "fast"])
def test_weights_of_any_size(main, made, model, tmp_path, recipe):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prune = ("prune", model, tmp_path / "out", "--calibration", made / "text.txt", "--pattern", "50%")
    code, _, errors = main(*prune, "--recipe", recipe, "--samples", "4", "--seq-len", "32")
    assert code in (0, 2), errors
    assert "bug in secateur" not in errors


def gguf_fuzzed(content, number):
    """A file with some bytes changed, cut off, or grown."""
    import random

    chance = random.Random(number)
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(min(len(changed), chance.choice([64, 4096, 1 << 30])))] = chance.randrange(256)
    return bytes(changed[: chance.randrange(len(changed))] if number % 4 == 0 else changed)


def test_damaged_gguf_files(main, made, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    content = (made / "model.gguf").read_bytes()
    codes = set()
    for number in range(24):
        (tmp_path / "model.gguf").write_bytes(gguf_fuzzed(content, number))
        code, _, errors = main("eval", tmp_path / "model.gguf", "--max-tokens", "64", "--seq-len", "32")
        assert code in (0, 2), errors
        assert "bug in secateur" not in errors
        codes.add(code)
    assert 2 in codes
    code, _, errors = main("eval", made / "model.gguf", "--max-tokens", "64", "--seq-len", "32")
    assert code == 0, errors


@pytest.mark.parametrize("damage", ["a bit", "the end", "config", "digests", "a killed conversion"])
def test_a_damaged_model_in_the_cache_is_made_again(main, made, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    evaluate = ("eval", made / "model.gguf", "--max-tokens", "64", "--seq-len", "32", "--json")
    code, first, errors = main(*evaluate)
    assert code == 0, errors
    (folder,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    bits = whole["model.safetensors"]
    if damage in ("a bit", "the end"):
        (folder / "model.safetensors").write_bytes(
            bits[:-1] + bytes([bits[-1] ^ 1]) if damage == "a bit" else bits[:-9]
        )
    elif damage == "a killed conversion":
        (folder.parent / ".partial-0123").mkdir()
        shutil.rmtree(folder)
    else:
        (folder / {"config": "config.json", "digests": ".digests.json"}[damage]).unlink()
    code, again, errors = main(*evaluate)
    assert code == 0, errors
    assert "converting" in errors
    assert again == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", folder.name]
    assert "converting" not in main(*evaluate)[2]


def test_an_unexpected_error_says_so_and_leaves_its_traceback(main, made, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise LookupError("[red]what nobody thought of\x1b")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("secateur.api.models.inspect", fail)
    code, _, errors = main("inspect", made / "model")
    assert code == 70
    assert "LookupError: [red]what nobody thought of\\x1b" in errors
    assert "This is a bug in secateur" in errors
    (kept,) = tmp_path.glob("secateur-error-*.txt")
    assert str(kept) in errors.replace("\n", "")
    assert "in fail" in kept.read_text()


def test_a_gguf_file_that_was_merged(main, tmp_path, monkeypatch):
    """llama.cpp's merge leaves zero parts in the file."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    save_gguf(tmp_path / "model.gguf", parts=0)
    code, _, errors = main("eval", tmp_path / "model.gguf", "--max-tokens", "64", "--seq-len", "32")
    assert code == 0, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": "blk.1.ffn_up"}, "lacks 1 tensors"),
        ({"parts": 2}, "one of 2 parts of a"),
        ({"extra": {"rope_freqs": (4,)}}, "(rope_freqs.weight scales its rotary positions): it would be another model"),
        ({"extra": {"blk.0.attn_q_norm": (8,)}}, "it would be another model"),
        ({"scaling": "yarn"}, "its rotary positions are scaled (yarn)"),
        ({"scaling": ""}, "its rotary positions are scaled (linear)"),  # a factor alone, as llama.cpp reads it
    ],
)
def test_a_gguf_file_that_transformers_reads_in_part(main, tmp_path, monkeypatch, options, message):
    """What is missing would be random, and what it does not know is skipped: both without an error."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    save_gguf(tmp_path / "model.gguf", **options)
    code, _, errors = main("eval", tmp_path / "model.gguf", "--max-tokens", "64", "--seq-len", "32")
    assert code == 2
    assert message in " ".join(errors.split())
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_a_gguf_file_has_its_own_tokenizer_whatever_lies_next_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    save_gguf(tmp_path / "model.gguf")
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "model.gguf"))
    assert tokenizer.tokenize("ab") == ["ab"]  # its own merge; the other has none
