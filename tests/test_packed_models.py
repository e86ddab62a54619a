"""Packed folders: packed, unpacked, loaded by transformers, saved again; and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from models import FAMILIES, TEXT, character_tokenizer, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file, save_file
from zoo import tiny

import secateur
from secateur.evaluation import speed
from secateur.evaluation.speed import weight_files
from secateur.packed import kernels
from secateur.packed.files import read_headers
from secateur.packed.linear import PackedLinear
from secateur.sources.resolve import resolve_dense

needs_kernels = pytest.mark.skipif(kernels.level() == "none", reason="the kernels were not built, or need AVX2")
MIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 128}  # fmt: skip
# Falcon has a linear layer of another class; of GPT-2, only a run's report says that its matrices are transposed.
UNPACKED = ("falcon", "gpt2")
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8}


def any_model(family):
    if family in FAMILIES:
        return tiny_model(family, torch.bfloat16)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MIXTRAL) if family == "mixtral" else transformers.MambaConfig(**MAMBA)
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def without_half(model):
    """Half of every matrix of the layers set to zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) and "embed" not in name and "head" not in name and "wte" not in name:
            with torch.no_grad():
                parameter[torch.rand(parameter.shape, generator=generator) < 0.5] = 0
    return model


@pytest.fixture
def saved(tmp_path):
    """Saves a sparse model of a family, and packs it."""

    def make(family="llama", **options):
        folder = tmp_path / family
        without_half(any_model(family)).save_pretrained(folder, **options)
        character_tokenizer().save_pretrained(folder)
        secateur.pack(folder, tmp_path / f"{family}-packed")
        return folder, tmp_path / f"{family}-packed"

    return make


@pytest.fixture
def pruned(tmp_path):
    """A model that secateur pruned, and the text."""
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    secateur.prune(tmp_path / "model", tmp_path / "pruned", pattern="50%", solver="magnitude", samples=4, seq_len=32,
                   calibration=tmp_path / "text.txt")  # fmt: skip
    return tmp_path / "pruned"


def weights_of(folder):
    return {name: each for path in sorted(folder.glob("model*.safetensors")) for name, each in load_file(path).items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "mamba"])
def test_every_family_packs_unpacks_loads_and_saves_again(saved, tmp_path, family):
    folder, packed = saved(family)
    secateur.unpack(packed, tmp_path / "unpacked")
    assert_same_weights(weights_of(tmp_path / "unpacked"), weights_of(folder))

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    dense = secateur.load(packed, dense=True)
    assert_same_weights(dict(dense.state_dict()), dict(plain.state_dict()))
    assert not hasattr(dense.config, "quantization_config")

    model = transformers.AutoModelForCausalLM.from_pretrained(packed).eval()
    served = kernels.level() != "none" and family not in UNPACKED
    assert any(isinstance(each, PackedLinear) for each in model.modules()) == served
    ids = tokens(2)[0]
    with torch.no_grad():
        expected, found = plain(ids).logits.float(), model(ids).logits.float()
    assert (found - expected).norm() <= 0.02 * expected.norm()

    model.save_pretrained(tmp_path / "again")
    secateur.unpack(tmp_path / "again", tmp_path / "unpacked-again")
    assert_same_weights(weights_of(tmp_path / "unpacked-again"), weights_of(folder))


@needs_kernels
@pytest.mark.parametrize("family", ["zamba2", "rwkv", "blt"])
def test_tied_layers_and_models_that_initialise_by_shapes_are_loaded(tmp_path, family):
    """Zamba's layers share matrices; RWKV and BLT look at the shape of a weight that was read, to initialise it."""
    without_half(tiny(family).to(torch.bfloat16)).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    secateur.pack(tmp_path / "model", tmp_path / "packed")
    model, dense = secateur.load(tmp_path / "packed"), secateur.load(tmp_path / "packed", dense=True)
    assert any(isinstance(each, PackedLinear) for each in model.modules())
    assert all(each.dtype != torch.uint8 for each in model.parameters())
    assert_same_weights(dict(model.state_dict()), dict(dense.state_dict()))


def test_an_index_that_names_another_folder_is_refused(saved, tmp_path):
    _, packed = saved(max_shard_size="20KB")
    (tmp_path / "elsewhere").mkdir()
    index = packed / "packed.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in {*content["weight_map"].values()}:
        (packed / name).rename(tmp_path / "elsewhere" / name)
    content["weight_map"] = {name: f"../elsewhere/{file}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(secateur.SecateurError, match="names files of another folder"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_a_packed_model_in_another_dtype_is_saved_in_it(saved, tmp_path):
    _, packed = saved()
    model = secateur.load(packed).to(torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 1e-4)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.float32
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


def test_a_full_disk_leaves_the_weights_that_were_there(saved, monkeypatch):
    _, packed = saved()
    model, before = secateur.load(packed), {path.name: path.read_bytes() for path in packed.iterdir()}

    def full(path, *_):
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("secateur.packed.saving.write_weights", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


@pytest.mark.parametrize("shards", ["50GB", "40KB"])
def test_weights_are_replaced_only_once_the_config_is_written(saved, monkeypatch, shards):
    _, packed = saved()
    model = secateur.load(packed)
    model.save_pretrained(packed, max_shard_size=shards)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(model.config), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(packed)
    model.save_pretrained(packed / "elsewhere", is_main_process=False)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    with pytest.raises(secateur.SecateurError, match="saved as safetensors"):
        model.save_pretrained(packed, safe_serialization=False)


@needs_kernels
def test_a_state_dict_is_that_of_the_dense_model_and_loads_packed(saved):
    folder, packed = saved()
    plain, model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), secateur.load(packed)
    assert_same_weights(dict(model.state_dict()), dict(plain.state_dict()))
    layer = model.model.layers[0].mlp.up_proj
    changed = {name: each.flip(0) if name.endswith("up_proj.weight") else each
               for name, each in plain.state_dict().items()}  # fmt: skip
    assert str(model.load_state_dict(changed)) == "<All keys matched successfully>"
    assert layer.is_packed
    assert_same_weights(dict(model.state_dict()), changed)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: each for name, each in changed.items() if not name.endswith("up_proj.weight")})
    assert layer.is_packed


@needs_kernels
@pytest.mark.parametrize("rows", [80, 4096])
def test_a_matrix_of_another_shape_than_the_config_is_refused(tmp_path, rows):
    """A kernel would read beyond the bias."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=128,
    )  # fmt: skip
    dense = tmp_path / "dense"
    without_half(transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)).save_pretrained(dense)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(dense / "model.safetensors") | {name: torch.zeros(rows, 64, dtype=torch.bfloat16)}
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    secateur.pack(dense, tmp_path / "packed")
    with pytest.raises(secateur.SecateurError, match=rf"q_proj.weight has the shape \({rows}, 64\) in the packed file"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_shards_of_any_name_are_packed_and_counted(saved, tmp_path):
    folder, _ = saved(max_shard_size="40KB")
    for path in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("model-", "weights-"))
        else:
            path.rename(path.with_name(path.name.replace("model-", "weights-")))
    found = secateur.pack(folder, tmp_path / "again")
    back = secateur.unpack(tmp_path / "again", tmp_path / "back")
    assert found["packed_bytes"] == back["packed_bytes"] > 0
    assert 0.9 <= back["dense_bytes"] / found["dense_bytes"] <= 1.1


@needs_kernels
def test_conv1d_and_shards_stay_packed(saved, pruned, tmp_path):
    save_checkpoint(tmp_path / "gpt2-model", "gpt2")
    secateur.prune(tmp_path / "gpt2-model", tmp_path / "gpt2-pruned", pattern="2:4", solver="magnitude", samples=4,
                   seq_len=32, calibration=tmp_path / "text.txt", max_shard_size="20KB")  # fmt: skip
    secateur.pack(tmp_path / "gpt2-pruned", tmp_path / "gpt2-packed", compression="none")
    assert len(list((tmp_path / "gpt2-packed").glob("packed-*.safetensors"))) > 1
    model = secateur.load(tmp_path / "gpt2-packed")
    assert sum(isinstance(each, PackedLinear) for each in model.modules()) == 8
    assert isinstance(model.transformer.h[0].mlp.c_fc, PackedLinear)
    plain = secateur.load(tmp_path / "gpt2-pruned")
    ids = tokens(2)[0]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=0.05)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("packed-*.safetensors"))) > 1
    assert_same_weights(dict(secateur.load(tmp_path / "again", dense=True).state_dict()), dict(plain.state_dict()))


def test_plain_transformers_fails_loudly(saved):
    """Without secateur, transformers finds no weights. It must not start from random ones."""
    _, packed = saved()
    script = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, packed], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_importing_secateur_is_enough_before_or_after_transformers(saved):
    _, packed = saved()
    for order in ("import secateur, transformers", "import transformers.modeling_utils, secateur"):
        script = f"import sys; {order}; print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).model)"
        done = subprocess.run([sys.executable, "-c", script, packed], capture_output=True, text=True, check=True)
        assert ("PackedLinear" in done.stdout) == (kernels.level() != "none")
    light = "import sys, secateur; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_a_look_for_transformers_or_an_import_that_is_stopped_leaves_the_format_to_be_registered(saved):
    _, packed = saved()
    script = (
        "import sys, secateur, importlib.util; importlib.util.find_spec('transformers.modeling_utils')\n"
        "import transformers; print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).model)\n"
        "assert not any(type(each).__module__.startswith('secateur') for each in sys.meta_path)"
    )
    done = subprocess.run([sys.executable, "-c", script, packed], capture_output=True, text=True, check=True)
    assert ("PackedLinear" in done.stdout) == (kernels.level() != "none")


def test_what_is_checked_of_a_packed_folder_is_what_is_loaded(saved):
    """A second index, which the config does not name, is not looked at; one that it names must be sound."""
    _, packed = saved()
    index = packed / "packed.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    assert secateur.inspect(packed).problems == []
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["sharded"] = True
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(secateur.SecateurError, match="not a plain file name"):
        secateur.load(packed)


def test_small_tensors_of_bytes_are_no_packed_ones(tmp_path):
    save_file({"flags": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "packed.safetensors")
    assert read_headers(tmp_path / "packed.safetensors") == {}


def test_a_model_whose_card_was_edited_is_packed_with_that_card(pruned, tmp_path):
    (pruned / "README.md").write_text("# my own words\n")
    secateur.pack(pruned, tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_text().startswith("# my own words\n")


def test_pipeline_generate_and_device_map(saved):
    _, packed = saved()
    tokenizer = character_tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipeline("the quick", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("the quick")
    from_name = transformers.pipeline("text-generation", model=str(packed))
    assert from_name("the quick", max_new_tokens=4, do_sample=False) == [found]


def test_lm_eval_takes_a_packed_folder(saved, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    folder, packed = saved()
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "the quick", "choices": [" a", " b"], "label": 0}) + "\n" for _ in range(4))
    )
    (tmp_path / "task.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"model": "hf", "tasks": ["tiny"], "task_manager": manager, "device": "cpu", "log_samples": True}
    likelihoods = []
    for model in (folder, packed):
        found = lm_eval.simple_evaluate(model_args=f"pretrained={model}", **options)
        likelihoods.append([float(each[0]) for each in found["samples"]["tiny"][0]["filtered_resps"]])
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=0.05)


def _packed_layers(model):
    return sum(isinstance(module, PackedLinear) and module.is_packed for module in model.modules())


@pytest.mark.usefixtures("measured_here")
def test_a_packed_model_of_the_hub_stays_packed(saved, tmp_path, monkeypatch):
    _, packed = saved()
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(packed))
    options = {"text": tmp_path / "text.txt", "max_tokens": 64, "seq_len": 32}
    found, expected = (secateur.evaluate(model, **options) for model in ("somebody/packed", packed))
    assert found["loss"] == expected["loss"]
    assert _packed_layers(secateur.load("somebody/packed")) == _packed_layers(secateur.load(packed))
    measured = secateur.bench(["somebody/packed"], prompt_tokens=4, new_tokens=16)[0]
    assert measured.file_bytes == sum(path.stat().st_size for path in packed.glob("*.safetensors"))


@needs_kernels
def test_another_dtype_is_dense(saved, capsys):
    folder, packed = saved()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):  # each model that is loaded says so
        model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
        assert "torch.float32 was asked for" in capsys.readouterr().err
    assert_same_weights(dict(model.state_dict()), dict(plain.state_dict()))


def test_the_commands_take_packed_folders(pruned, main, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    code, out, _ = main("pack", pruned, tmp_path / "packed")
    assert code == 0
    assert "packed 14 matrices" in out
    assert "secateur.json" in {path.name for path in (tmp_path / "packed").iterdir()}
    assert "secateur unpack" in (tmp_path / "packed" / "README.md").read_text()
    code, out, _ = main("inspect", tmp_path / "packed", "--json")
    assert code == 0
    assert json.loads(out)["problems"] == []
    short = ("--text", tmp_path / "text.txt", "--max-tokens", "256", "--seq-len", "32")
    _, of_packed, _ = main("eval", tmp_path / "packed", *short, "--against", pruned, "--json")
    _, of_dense, _ = main("eval", pruned, *short, "--json")
    assert json.loads(of_packed)["perplexity"] == pytest.approx(json.loads(of_dense)["perplexity"], rel=0.01)
    assert json.loads(of_packed)["against"]["kl"] < 0.01
    few = ("--pattern", "75%", "--solver", "magnitude", "--samples", "4", "--seq-len", "32")
    code, _, err = main("prune", tmp_path / "packed", tmp_path / "more", *few, "--calibration", tmp_path / "text.txt")
    assert code == 0, err
    assert secateur.inspect(tmp_path / "more").problems == []
    code, out, _ = main("unpack", tmp_path / "packed", tmp_path / "unpacked")
    assert code == 0
    assert_same_weights(weights_of(tmp_path / "unpacked"), weights_of(pruned))
    assert (tmp_path / "unpacked" / "README.md").read_text() == (pruned / "README.md").read_text()


def test_a_card_tells_what_its_folder_holds(pruned, tmp_path):
    """A folder without a card gets its name as one; a card from the hub has the model's name in its commands."""
    (pruned / "README.md").unlink()
    secateur.pack(pruned, tmp_path / "packed")
    card = tmp_path / "packed" / "README.md"
    assert card.read_text().startswith("# pruned\n")
    card.write_text(card.read_text().replace("THIS_MODEL", "somebody/small"))
    secateur.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert "packed" not in (tmp_path / "unpacked" / "README.md").read_text()


def test_a_card_has_one_way_to_load_its_folder(pruned, tmp_path):
    secateur.pack(pruned, tmp_path / "packed")
    dense, packed = ((folder / "README.md").read_text() for folder in (pruned, tmp_path / "packed"))
    assert [card.count("```python") for card in (dense, packed)] == [1, 1]
    assert "import secateur" not in dense
    assert packed.index("import secateur") < packed.index("from_pretrained")


def test_a_run_can_write_the_packed_format(pruned, tmp_path):
    options = {"pattern": "50%", "solver": "magnitude", "samples": 4, "seq_len": 32, "max_shard_size": "20KB"}
    report = secateur.prune(tmp_path / "model", tmp_path / "direct", settings={"format": "packed"},
                            calibration=tmp_path / "text.txt", **options)  # fmt: skip
    assert not list((tmp_path / "direct").glob("model*"))
    assert len(list((tmp_path / "direct").glob("packed-*.safetensors"))) > 1
    assert_same_weights(
        dict(secateur.load(tmp_path / "direct", dense=True).state_dict()), dict(secateur.load(pruned).state_dict())
    )
    assert secateur.inspect(tmp_path / "direct").problems == []
    again = secateur.prune(tmp_path / "model", tmp_path / "direct", settings={"format": "packed"}, resume=True,
                           calibration=tmp_path / "text.txt", **options)  # fmt: skip
    assert again.files == report.files
    with pytest.raises(secateur.SecateurError, match="save the model, then use pack"):
        secateur.prune(tiny_model("llama"), calibration=tokens(), settings={"format": "packed"}, pattern="50%")


def test_bad_input_is_refused_and_leaves_nothing(pruned, tmp_path, saved):
    dense = tmp_path / "model"
    with pytest.raises(secateur.SecateurError, match=r"packed, the model would take 1\.0\d of its"):
        secateur.pack(dense, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patched:  # before any work
        patched.setattr("secateur.checkpoints.packing.inspect_folder", pytest.fail)
        with pytest.raises(secateur.SecateurError, match="not an empty folder"):
            secateur.pack(pruned, dense)
    with pytest.raises(secateur.SecateurError, match="which is read"):
        secateur.pack(pruned, pruned / "inside")
    with pytest.raises(secateur.SecateurError, match="is not packed"):
        secateur.unpack(pruned, tmp_path / "out")
    with pytest.raises(secateur.SecateurError, match="zstd or none"):
        secateur.pack(pruned, tmp_path / "out", compression="gzip")
    secateur.pack(pruned, tmp_path / "packed")
    with pytest.raises(secateur.SecateurError, match="secateur unpack"):
        secateur.pack(tmp_path / "packed", tmp_path / "out")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("secateur.checkpoints.packing.available_bytes", lambda: 1000)
        with pytest.raises(secateur.SecateurError, match="takes 0.0 GB of memory, and 0.0 GB are free"):
            secateur.pack(pruned, tmp_path / "out")

    config = tmp_path / "packed" / "config.json"
    content = config.read_text()
    config.write_text(content.replace('"version": 1', '"version": 2'))
    for use in (secateur.load, secateur.inspect, lambda folder: secateur.unpack(folder, tmp_path / "out")):
        with pytest.raises(secateur.SecateurError, match=r"version 2 of the format.*upgrade"):
            use(tmp_path / "packed")
    config.write_text(content)

    weights = load_file(pruned / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
    damaged = shutil.copytree(pruned, tmp_path / "damaged")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(secateur.SecateurError, match="not what was saved"):
        secateur.pack(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_packed_files_are_found(pruned, tmp_path):
    secateur.pack(pruned, tmp_path / "packed")
    path = tmp_path / "packed" / "packed.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(secateur.SecateurError):
        secateur.unpack(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(secateur.SecateurError):
        secateur.load(tmp_path / "packed")
    assert not (tmp_path / "out").exists()


def test_bench_beyond_a_models_positions_says_so(tmp_path):
    """GPT-2 has a table of them. A model needs no tokenizer for it."""
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(secateur.SecateurError, match=r"IndexError: .* Does it have 66 positions\?"):
        secateur.bench(tmp_path / "model", prompt_tokens=33, new_tokens=33)


def test_bench_tells_the_prompt_from_what_follows(tmp_path, monkeypatch):
    """A prompt of 8 tokens takes 2 s with the first new token, each further token half a second."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(speed, "_generate_seconds", lambda _model, _prompt, new: 2.0 + 0.5 * (new - 1))
    found = speed.measure_here(tmp_path / "model", 8, 16, 0)
    assert (found.prefill_tokens_per_second, found.decode_tokens_per_second) == (4.0, 2.0)
    monkeypatch.setattr(speed, "_generate_seconds", lambda *_: 1.0)
    with pytest.raises(secateur.SecateurError, match="too few to measure"):
        speed.measure_here(tmp_path / "model", 8, 16, 0)


@pytest.mark.usefixtures("measured_here")
def test_bench_loads_a_pickle_where_it_is_asked_to(tmp_path):
    model, numbers = tiny_model("llama"), {"prompt_tokens": 4, "new_tokens": 16}
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(secateur.SecateurError, match="can run code: allow_pickle loads them"):
        secateur.bench(tmp_path / "model", **numbers)
    (speed,) = secateur.bench(tmp_path / "model", **numbers, allow_pickle=True)
    assert speed.file_bytes == (tmp_path / "model" / "pytorch_model.bin").stat().st_size


def test_the_working_folder_is_no_place_for_a_packed_model(saved, tmp_path, monkeypatch):
    folder, packed = saved()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for make, source in ((secateur.pack, folder), (secateur.unpack, packed)):
        with pytest.raises(secateur.SecateurError, match=r"\. is the working folder"):
            make(source, ".")
    assert (tmp_path / "here").samefile(".")


def test_bench_hands_on_the_error_of_its_process(monkeypatch):
    def too_few(*_):
        raise secateur.SecateurError("raise ‹new_tokens›")

    monkeypatch.setattr(speed, "measure_here", too_few)
    monkeypatch.setattr(sys, "argv", ["speed", "model", "8", "1", "0"])
    with pytest.raises(SystemExit, match="^raise ‹new_tokens›$"):
        speed.main()


def test_what_a_packed_model_cannot_do_is_refused(saved, tmp_path):
    _, packed = saved()
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    for option in ({"push_to_hub": True}, {"state_dict": model.state_dict()}, {"variant": "fp16"}):
        with pytest.raises(secateur.SecateurError, match=f"can't be saved with {next(iter(option))}"):
            model.save_pretrained(tmp_path / "again", **option)
    assert not (tmp_path / "again").exists()
    with pytest.raises(secateur.SecateurError, match="can't stay on a disk"):
        transformers.AutoModelForCausalLM.from_pretrained(packed, device_map={"model": "disk", "lm_head": "cpu"})


def test_bench_measures_fresh_processes(saved, main, monkeypatch):
    folder, packed = saved()
    (folder / "psutil.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(folder)
    code, out, err = main(
        "bench", folder, packed, "--prompt-tokens", "8", "--new-tokens", "16", "--threads", "1", "--json"
    )
    assert code == 0, err
    dense, ours = json.loads(out)["models"]
    assert dense["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert ours["file_bytes"] == (packed / "packed.safetensors").stat().st_size
    assert ours["decode_tokens_per_second"] > 0
    for other in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / other).write_bytes(bytes(1000))
    assert weight_files(folder) == [folder / "model.safetensors"]
    code, _, err = main("bench", folder, "--new-tokens", "0")
    assert (code, "1 or more" in err) == (2, True)


def test_env_names_the_kernels(main):
    code, out, _ = main("env", "--json")
    assert code == 0
    assert json.loads(out)["kernels"] == kernels.description()


@pytest.mark.usefixtures("own_modules")
def test_code_of_a_packed_model_runs_where_it_is_trusted_and_nobody_is_asked(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (pruned / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (pruned / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((pruned / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (pruned / "config.json").write_text(json.dumps(config))
    (pruned / "secateur.json").unlink()
    secateur.pack(pruned, tmp_path / "packed")
    text = {"text": tmp_path / "text.txt", "seq_len": 32}
    for folder in (pruned, tmp_path / "packed"):
        with pytest.raises(secateur.SecateurError, match="brings Python code .*trust_remote_code"):
            secateur.load(folder)
        assert type(secateur.load(folder, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    figures = [
        secateur.evaluate(folder, trust_remote_code=True, **text)["perplexity"]
        for folder in (pruned, tmp_path / "packed")
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)
    (speed,) = secateur.bench(tmp_path / "packed", prompt_tokens=4, new_tokens=16, trust_remote_code=True)
    assert speed.decode_tokens_per_second > 0


def test_the_cached_dense_form_follows_every_file_of_a_packed_model(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    _, packed = saved()
    (packed / "chat_template.jinja").write_text("{{ 'one' }}")
    assert (resolve_dense(str(packed)) / "chat_template.jinja").read_text() == "{{ 'one' }}"
    (packed / "chat_template.jinja").write_text("{{ 'two' }}")
    assert (resolve_dense(str(packed)) / "chat_template.jinja").read_text() == "{{ 'two' }}"


def test_a_linked_tokenizer_is_not_lost_by_packing(saved, tmp_path):
    folder, packed = saved()
    for number, model in enumerate((folder, packed)):
        shutil.move(model / "tokenizer.json", tmp_path / f"tokenizer-{number}.json")
        (model / "tokenizer.json").symlink_to(tmp_path / f"tokenizer-{number}.json")
    with pytest.raises(secateur.SecateurError, match="tokenizer.json is a link to"):
        secateur.pack(folder, tmp_path / "out")
    with pytest.raises(secateur.SecateurError, match="tokenizer.json is a link to"):
        secateur.unpack(packed, tmp_path / "out")
