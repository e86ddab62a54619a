"""What a new user gets wrong first is refused before any work, with a message that says what to write."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from commands import command
from models import save_checkpoint, save_gguf, tiny_model, tokens

import secateur
from secateur.calibration.batches import _from_tensors
from secateur.cli.progress import LogLines
from secateur.recipe.resolve import resolve_recipe
from secateur.reporting.report import Report
from secateur.solvers import Solved

SMALL = ("--samples", 4, "--seq-len", 32, "--solver", "magnitude")


@pytest.fixture
def model(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pattern", "0.5%"), "For 50% write 50%, and for 0.5% write 0.005"),
        (("--pattern", "1"), "pattern 1 removes every weight"),
        (("--pattern", "0"), "pattern 0 removes no weight"),
        (("--max-memory", "8"), "write 8GB"),
        (("--device", "gpu"), "a GPU is 'cuda'"),
        (("--device", "GPU:1"), "a GPU is 'cuda:1'"),
        (("--set", "pattern=1"), "pattern 1 removes every weight"),
        (("--set", "epochs=2"), "no option 'epochs' outside of its sections: write refit.epochs"),
        (("--set", "samples=8"), "write calibration.samples"),
        (("--include", "mlp"), "write '*.mlp.*'"),
        (("--exclude", "model.layers.1"), "write 'model.layers.1.*'"),
        (("--set", "strength=0.5"), "write target.strength or refit.strength"),
        (("--pattern", "1:2", "--set", "allocation.rule=curve"), "mixes 1:2 with no other pattern"),
    ],
)
def test_ambiguous_values_are_refused(main, model, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = main("prune", model, tmp_path / "out", "--calibration", tmp_path / "text.txt", *SMALL, *arguments)
    assert code == 2
    assert message in " ".join(errors.split())
    assert sorted(tmp_path.rglob("*")) == before


WRONG_TYPES = """
from pathlib import Path

import secateur
from models import save_checkpoint, tiny_model, tokens

model, tensors = tiny_model("llama"), tokens()
save_checkpoint(Path("model"))
for call in (
    lambda: secateur.prune(model, calibration=tensors, settings="refit.rate=0.01"),
    lambda: secateur.prune(model, calibration=5),
    lambda: secateur.prune(model, calibration={"input_ids": tensors[0]}),
    lambda: secateur.bench("model", prompt_tokens="4"),
    lambda: secateur.evaluate("model", seq_len="64"),
):
    try:
        call()
    except secateur.SecateurError as error:
        print(error)
"""


def test_arguments_of_another_type(tmp_path):
    """In a fresh process, as the tests' own checks of types would be first."""
    run = [sys.executable, "-c", WRONG_TYPES]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    said = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    for line, wanted in zip(said.splitlines(), (
        "settings is 'refit.rate=0.01': give a dictionary",
        "calibration is a int: give a text's name, token tensors, or a list of batches",
        "calibration is a dict: give a text's name, token tensors, or a list of batches",
        "prompt_tokens is '4': it must be a whole number",
        "seq_len is '64': it must be a whole number",
    ), strict=True):  # fmt: skip
        assert line.startswith(wanted)


def test_what_costs_nothing_to_check_is_checked_before_a_model_is_fetched(model, tmp_path, monkeypatch):
    def fetch(*_):
        raise AssertionError("the model was fetched")

    monkeypatch.setattr("secateur.request.resolve_dense", fetch)
    monkeypatch.setattr("secateur.api.models.resolve", fetch)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for call, message in (
        (lambda: secateur.prune("owner/large", tmp_path / "full"), "exists and is not empty"),
        (lambda: secateur.prune("owner/large", tmp_path / "out", calibration="my-txt.txt"), "is not a file, folder"),
        (lambda: secateur.prune("owner/large", tmp_path / "out", offload_dir=tmp_path / "no"), "offload_dir"),
        (lambda: secateur.dry_run("owner/large", calibration="self:no.txt"), "no.txt is not a file, folder"),
        (lambda: secateur.evaluate("owner/large", "my-txt.txt"), "is not a file, folder"),
        (lambda: secateur.evaluate(model, against=model), "can't be compared with itself"),
    ):
        with pytest.raises(secateur.SecateurError, match=message):
            call()


@pytest.mark.parametrize("pattern", [1, 0, "1.0", "0.5%"])
def test_the_same_in_python(pattern):
    with pytest.raises(secateur.SecateurError, match="write"):
        secateur.prune(tiny_model("llama"), pattern=pattern, solver="magnitude", calibration=tokens())
    for request in (
        {"settings": {"pattern": pattern, "solver": "magnitude"}},
        {"recipe": {"pattern": pattern, "solver": "magnitude"}},
        {"recipe": {"solver": "magnitude", "rules": [{"match": "*", "pattern": pattern}]}},
    ):
        with pytest.raises(secateur.SecateurError, match="write"):
            secateur.prune(tiny_model("llama"), calibration=tokens(), **request)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        ([torch.ones(2, 8, dtype=torch.long)], {"samples": 2}, "samples=2 is for a text"),
        ([torch.ones(2, 8, dtype=torch.long)], {"seq_len": 4}, "seq_len=4 is for a text"),
        ([{"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8)}], {}, "all padding"),
    ],
)
def test_calibration_data_that_would_be_ignored_or_fail_late_is_refused(calibration, options, message):
    model = tiny_model("llama")
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.prune(model, solver="magnitude", calibration=calibration, **options)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@pytest.mark.parametrize(("item", "kind"), [("a text", "str"), ({"input_ids": [1, 2]}, "list"), ({}, "NoneType")])
def test_calibration_data_of_another_kind_is_named(item, kind):
    with pytest.raises(secateur.SecateurError, match=f"item 2 of the calibration data is or holds a {kind}"):
        _from_tensors([torch.ones(2, 8, dtype=torch.long), item], tiny_model("llama").config)


def test_a_preset_as_an_object_or_a_file_holds_on_to_its_pattern(tmp_path):
    """Its allocation and refit are those of the kind of pattern that it was made for."""
    recipe = secateur.Recipe.preset("balanced")
    for request, match in (
        ({"pattern": "2:4"}, "the recipe says pattern: 50%, and pattern='2:4' contradicts it"),
        ({"settings": {"pattern": "2:4"}}, r"made for 50%, .*Recipe.preset\(NAME, '2:4'\)"),
    ):
        with pytest.raises(secateur.SecateurError, match=match):
            secateur.prune(tiny_model("llama"), recipe=recipe, calibration=tokens(), **request)
    steps = {"pattern": "2:4", "allocation": None, "refit.epochs": 3}
    assert resolve_recipe(recipe, steps).pattern == secateur.parse_pattern("2:4"), "its steps were replaced too"
    recipe.save(tmp_path / "mine.yaml")
    for same in (tmp_path / "mine.yaml", recipe.to_dict()):
        with pytest.raises(secateur.SecateurError, match=r"made for 50%, .*secateur recipe NAME --pattern 2:4"):
            secateur.prune(tiny_model("llama"), recipe=same, calibration=tokens(), settings={"pattern": "2:4"})
    for same in (recipe, tmp_path / "mine.yaml", recipe.to_dict()):
        assert resolve_recipe(same, {"pattern": "60%"}) == recipe.changed({"pattern": "60%"})


def test_one_row_of_tokens_is_no_list_of_batches():
    with pytest.raises(secateur.SecateurError, match="is one row of tokens: give a list of tensors"):
        secateur.prune(tiny_model("llama"), solver="magnitude", calibration=torch.arange(8))


def test_a_name_left_empty_is_told(main, model, tmp_path):
    """As an unset variable of a shell leaves it."""
    prompts = main("prune", model, tmp_path / "out", "--calibration", "self:", *SMALL)
    assert prompts[0] == 2
    assert "--calibration self: names no prompts" in " ".join(prompts[2].split())
    nothing = main("eval", "")
    assert nothing[0] == 2
    assert "the model's name is empty" in nothing[2]


@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
def test_a_device_may_be_torchs(model, tmp_path, device):
    text = {"calibration": tmp_path / "text.txt", "samples": 4, "seq_len": 32}
    report = secateur.prune(model, tmp_path / "out", solver="magnitude", device=device, **text)
    assert report.environment["device"] == "cpu"
    figures = secateur.evaluate(tmp_path / "out", tmp_path / "text.txt", seq_len=32, max_tokens=64, device=device)
    assert figures["windows"] == 2


def test_places_in_the_home_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    secateur.Recipe().save("~/mine.yaml")
    assert secateur.Recipe.load("~/mine.yaml") == secateur.Recipe()


def test_a_pattern_that_removes_all_is_asked_for_in_words():
    with pytest.raises(secateur.SecateurError, match="pattern 1 removes every weight"):
        secateur.solve(torch.ones(2, 4), torch.eye(4), 1)


def test_options_of_a_solver_that_came_as_an_object_are_checked():
    @dataclasses.dataclass(frozen=True)
    class Keeper:
        name: ClassVar[str] = "keeper"
        share: float = 0.5

        def __call__(self, W, hessian, pattern):
            return W

    resolve_recipe(solver=Keeper())
    assert resolve_recipe({"solver": {"name": "keeper", "share": 0.25}}).solver == Keeper(0.25)
    wrongs = ({"bogus": 1}, "solver keeper has no option 'bogus'"), ({"share": "half"}, "share is 'half'")
    for wrong, message in wrongs:
        with pytest.raises(secateur.SecateurError, match=message):
            resolve_recipe({"solver": {"name": "keeper", **wrong}})


def test_shares_of_all_sizes_come_back_exactly():
    for share in (1 / 3, 0.005, 1e-7, 0.7, 0.123456789012345, 0.5, 1.0, 0.0):
        recipe = secateur.Recipe(pattern=share)
        again = secateur.Recipe.from_dict(recipe.to_dict())
        assert again.pattern.sparsity == share
        resolve_recipe(recipe.to_dict())  # no share is taken for a mistake


@pytest.mark.parametrize("pattern", ["100%", "0.005", 0.5, "2:4"])
def test_what_is_meant_is_taken(pattern):
    report = secateur.prune(tiny_model("llama"), pattern=pattern, solver="magnitude", calibration=tokens())
    assert report.sparsity == pytest.approx(secateur.parse_pattern(pattern).sparsity, abs=1e-2)


def test_out_in_the_models_folder_is_refused(main, model, tmp_path):
    code, _, errors = main("prune", model, model / "pruned", "--calibration", tmp_path / "text.txt", *SMALL)
    assert code == 2
    assert "lies in the model's folder" in " ".join(errors.split())
    assert not (model / "pruned").exists()


def test_a_missing_folder_is_named(main):
    code, _, errors = main("inspect", "nosuch")
    assert code == 2
    assert "there is no folder nosuch" in errors


def test_a_lora_adapter_is_named(main, model, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    for words in (("eval", tmp_path / "adapter"), ("prune", tmp_path / "adapter", tmp_path / "out")):
        code, _, errors = main(*words)
        assert code == 2
        assert "merge it first" in " ".join(errors.split())
    shutil.copytree(model, tmp_path / "adapter", dirs_exist_ok=True)  # as merged models are saved next to them
    for words in (("eval", tmp_path / "adapter"), ("pack", tmp_path / "adapter", tmp_path / "out")):
        code, _, errors = main(*words)
        assert code == 2
        assert "move its adapter_* files away" in " ".join(errors.split())


def test_a_conversion_says_what_it_writes_where_and_for_how_long(main, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    save_gguf(tmp_path / "model.gguf")
    code, _, errors = main("eval", tmp_path / "model.gguf", "--max-tokens", 64, "--seq-len", 32)
    assert code == 0, errors
    line = next(line for line in errors.splitlines() if "converting" in line)
    assert str(tmp_path / "cache" / "models") in line
    assert "0 MB and 10 s" in line


def test_inspect_prints_a_summary_first(main, model, tmp_path):
    main("prune", model, tmp_path / "out", "--calibration", tmp_path / "text.txt", *SMALL)
    code, out, _ = main("inspect", tmp_path / "out")
    assert code == 0
    assert "14 pruned matrices with 50.00% zeros" in out
    assert "layers.1" not in out
    assert "mlp.up_proj" in out
    _, every, _ = main("inspect", tmp_path / "out", "--matrices")
    assert "layers.1" in every


def test_the_time_left_after_a_resume_counts_only_what_was_pruned_now():
    """Eight blocks are replayed in 8 s, then each takes 100 s: the first estimate is of those."""
    now, lines = [0.0], []
    show = LogLines(lambda: now[0], lines.append)
    for done in range(1, 9):
        now[0] += 1
        show("replay", done, 30)
    for done in range(9, 12):
        now[0] += 100
        show("prune", done, 30)
    assert lines[-1] == "prune: 11 of 30, 31 min 40 s left"


@dataclasses.dataclass(frozen=True)
class Mine:
    """Keeps the first weights of each row."""

    name: ClassVar[str] = "mine"
    scale: float = 1.0

    def __call__(self, W, hessian, pattern):
        keep = torch.ones_like(W, dtype=torch.bool)
        keep.view(-1)[-pattern.num_pruned(*W.shape) :] = False
        return Solved(W * keep * self.scale, keep, {})


def test_a_solver_object_is_taken_as_it_is():
    model = tiny_model("llama")
    report = secateur.prune(model, pattern="50%", solver=Mine(scale=2.0), calibration=tokens())
    assert {matrix.solver for matrix in report.matrices} == {"mine"}
    assert report.recipe.solver == Mine(scale=2.0)
    one = secateur.prune(tiny_model("llama"), pattern="2:4", solver=secateur.MRP(mask="M"), calibration=tokens())
    other = secateur.prune(
        tiny_model("llama"), pattern="2:4", solver={"name": "mrp", "mask": "M"}, calibration=tokens()
    )
    assert one.mean_relative_error == other.mean_relative_error


def test_a_report_of_a_solver_that_is_not_installed_can_be_read(model, tmp_path):
    """Another process than the one that had the object."""
    secateur.prune(model, tmp_path / "out", solver=Mine(), calibration=tmp_path / "text.txt", samples=4, seq_len=32)
    for name in ("inspect", "report"):
        done = command(name, tmp_path / "out")
        assert done.returncode == 0, done.stderr
    recipe = Report.load(tmp_path / "out").recipe
    assert recipe.to_dict()["solver"] == {"name": "mine", "scale": 1.0}


def test_a_solver_object_without_a_name_is_refused():
    @dataclasses.dataclass
    class Nameless:
        def __call__(self, W, hessian, pattern):
            raise AssertionError

    with pytest.raises(secateur.SecateurError, match="`name`"):
        secateur.prune(tiny_model("llama"), solver=Nameless(), calibration=tokens())
