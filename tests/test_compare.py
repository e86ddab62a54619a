"""The comparison: cells that resume, one table, and bad requests before any work."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from models import TEXT, save_checkpoint

import secateur
from secateur.cli import app as cli
from secateur.cli.flags import split_list
from secateur.cli.progress import progress_shown
from secateur.comparison.cell import Cell, ComparisonSettings, label_of, parse_recipe
from secateur.comparison.compare import LONGEST_NAME, _file_name, check_recipe, compare
from secateur.comparison.page import to_html
from secateur.comparison.peers import _as_theirs
from secateur.comparison.results import DENSE, Comparison
from secateur.comparison.table import tables, to_csv
from secateur.errors import SecateurError
from secateur.recipe.patterns import parse_pattern
from secateur.runtime.own_process import run_in_own_process


@pytest.fixture
def settings(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    return ComparisonSettings(
        str(tmp_path / "model"), text, samples=8, seq_len=32, texts=(text,), eval_seq_len=32, max_tokens=320
    )


def test_cells_are_run_once_and_one_that_fails_is_named(settings, tmp_path, request):
    said: list[str] = []
    run = {"out": tmp_path / "out", "say": said.append, "watched": progress_shown}
    first = compare(settings, ["sparsegpt"], ["50%"], [0], **run)
    assert list(first.cells) == ["dense", "sparsegpt 50% 0"]
    path = tmp_path / "out" / "compare.json"
    written = json.loads(path.read_text())
    assert written == first.to_dict()
    cell = written["cells"]["sparsegpt 50% 0"]
    assert cell["perplexity"]["text.txt"] != written["cells"]["dense"]["perplexity"]["text.txt"] > 1
    assert 0 < cell["layer_error"] < 1
    assert cell["sparsity"] == 0.5
    assert cell["seconds"] > 0
    assert cell["peak_memory"] > 1e7
    assert cell["environment"]["torch"]
    request.getfixturevalue("cells_here")  # two cells in processes are enough
    with pytest.raises(ValueError, match=r"cell magnitude 3:7 0: .* an input dimension that is a multiple of 7"):
        compare(settings, ["magnitude"], ["3:7"], [0], **run)
    assert json.loads(path.read_text()) == written
    said.clear()
    second = compare(settings, ["sparsegpt", "magnitude"], ["50%"], [0], **run)
    assert [line for line in said if line.startswith("cell")] == ["cell 3 of 3: magnitude 50% 0"]
    assert second.cells["sparsegpt 50% 0"] == first.cells["sparsegpt 50% 0"], "kept with its measured time"
    other = ComparisonSettings(**(settings.__dict__ | {"samples": 4}))
    with pytest.raises(ValueError, match=r"made with other settings \(samples\)"):
        compare(other, ["sparsegpt"], ["50%"], [0], **run)
    assert json.loads(path.read_text())["cells"].keys() == second.cells.keys()


@pytest.mark.usefixtures("cells_here")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cell_that_was_stopped_goes_on_where_it_was(settings, tmp_path, monkeypatch, overwrite):
    """It is stopped in front of the second block, and prunes the first one only once, or else begins again."""
    from secateur.pruning import loop

    pruned: list[str] = []
    prune_block, threads, out = loop.prune_block, torch.get_num_threads, tmp_path / "out"

    def stopped(*arguments):
        if pruned:
            raise KeyboardInterrupt
        return counted(*arguments)

    def counted(*arguments):
        pruned.append("a block")
        return prune_block(*arguments)

    quiet = {"say": lambda _line: None}
    monkeypatch.setattr(loop, "prune_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, ["sparsegpt"], ["50%"], [0], out, **quiet)
    monkeypatch.setattr(loop, "prune_block", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(ValueError, match="an unfinished run that differs: environment threads .* start again with"):
        compare(settings, ["sparsegpt"], ["50%"], [0], out, **quiet)
    if not overwrite:
        monkeypatch.setattr(torch, "get_num_threads", threads)
    asked = replace(settings, overwrite=overwrite)
    found = compare(asked, ["sparsegpt"], ["50%"], [0], out, **quiet).cells["sparsegpt 50% 0"]
    assert len(pruned) == 2 + overwrite
    assert found["seconds"] > 0
    assert "peak_memory" not in found, "it would be that of the last process alone"
    assert {path.name for path in out.iterdir()} == {"compare.json", ".locks"}
    monkeypatch.setattr(loop, "prune_block", prune_block)
    whole = compare(settings, ["sparsegpt"], ["50%"], [0], tmp_path / "whole", **quiet).cells["sparsegpt 50% 0"]
    assert found["perplexity"] == whole["perplexity"]


@pytest.mark.usefixtures("cells_here")
def test_a_cell_that_fails_does_not_stop_the_others(settings, tmp_path):
    said: list[str] = []
    tables: list[list[str]] = []
    run = {"out": tmp_path / "out", "say": said.append, "show": lambda table: tables.append([*table.cells])}
    with pytest.raises(ValueError, match=r"^2 of 4 cells failed, and the others are kept: .*multiple of 7"):
        compare(settings, ["magnitude"], ["3:7", "4:7", "2:4"], [0], **run)
    assert tables == [["dense"], ["dense", "magnitude 2:4 0"]]
    assert [line for line in said if line.startswith("  failed: ")]
    with pytest.raises(ValueError, match="multiple of 7"):
        compare(settings, ["magnitude"], ["3:7", "2:4"], [0], **run)


@pytest.mark.usefixtures("cells_here")
def test_an_error_that_nobody_expected_stops_no_other_cell(settings, tmp_path, monkeypatch):
    def fail(matrix, *_):
        raise LookupError(f"of {matrix.name}")

    monkeypatch.setattr("secateur.pruning.loop.prune_matrix", fail)
    said: list[str] = []
    with pytest.raises(LookupError, match="of model"):  # and not as something that the user can mend
        compare(settings, ["magnitude", "wanda"], ["50%"], [0], tmp_path / "out", say=said.append)
    assert len([line for line in said if line.startswith("  failed: LookupError: of model")]) == 2


def test_a_folder_of_texts_counts_by_its_content(settings, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    found = []
    for text in ("one", "another"):
        (folder / "text.txt").write_text(text)
        found.append(replace(settings, calibration=str(folder)).identity()["calibration"])
    assert found[0].startswith("texts sha256:")
    assert found[0] != found[1]


@pytest.mark.usefixtures("cells_here")
def test_another_model_of_the_same_name_is_another_table(settings, tmp_path):
    run = {"out": tmp_path / "out", "say": lambda _line: None}
    compare(settings, ["magnitude"], ["50%"], [0], **run)
    save_checkpoint(tmp_path / "model", seed=1)
    with pytest.raises(SecateurError, match=r"made with other settings \(model\)"):
        compare(settings, ["wanda"], ["50%"], [0], **run)


@pytest.mark.usefixtures("cells_here")
def test_the_home_folder_is_one_place(settings, tmp_path, monkeypatch):
    """A shell leaves `--out=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    compare(settings, ["magnitude"], ["50%"], [0], Path("~/results"), say=lambda _line: None)
    assert not (tmp_path / "~").exists()
    assert sorted(each.name for each in (tmp_path / "home" / "results").iterdir()) == [".locks", "compare.json"]
    arguments = ["compare", settings.model, "--recipes", "magnitude", "--patterns", "50%", "--samples", "8"]
    arguments += ["--calibration", settings.calibration, "--text", settings.texts[0], "--seq-len", "32"]
    arguments += ["--eval-seq-len", "32", "--max-tokens", "320", "--out", "~/my results"]
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = tmp_path / "home" / "my results"
    assert (found / "compare.html").is_file()
    assert json.loads((found / "compare.json").read_text())["command"].endswith("--out '~/my results'")


@pytest.mark.usefixtures("cells_here")
def test_a_text_shorter_than_a_window_names_the_flag_of_windows(settings, tmp_path):
    (tmp_path / "short.txt").write_text("quick foxes. " * 4)
    short = replace(settings, texts=(str(tmp_path / "short.txt"),), eval_seq_len=200)
    with pytest.raises(SecateurError, match=r"lower ‹eval_seq_len›|lower eval_seq_len"):
        compare(short, ["magnitude"], ["50%"], [0], tmp_path / "out", say=lambda _line: None)


@pytest.mark.usefixtures("cells_here")
def test_a_recipe_file_is_a_cell_and_counts_by_its_content(settings, tmp_path):
    mine = tmp_path / "mine.yaml"
    keys = []
    for solver in ("magnitude", "wanda"):
        mine.write_text(f"solver: {solver}\n")
        found = compare(settings, [f"{mine}+damping=0.1"], ["50%"], [0], tmp_path / "out", say=lambda _line: None)
        keys = [*found.cells]
    assert keys[0] == "dense"
    assert all(re.fullmatch(r"mine.yaml@[0-9a-f]{8}\+damping=0.1 50% 0", key) for key in keys[1:])
    assert [found.cells[key]["recipe"]["solver"]["name"] for key in keys[1:]] == ["magnitude", "wanda"]


@pytest.mark.usefixtures("cells_here")
def test_what_is_wrong_with_the_text_is_said_with_the_first_cell(settings, tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    records = str(tmp_path / "records.jsonl")
    asked = replace(settings, calibration=records)
    with pytest.raises(ValueError, match="name the one that holds the text with text_field"):
        compare(asked, ["magnitude"], ["50%"], [0], tmp_path / "out", say=lambda _line: None)
    assert not (tmp_path / "out" / "compare.json").exists()
    asked = replace(asked, text_field="body")
    found = compare(asked, ["magnitude"], ["50%"], [0], tmp_path / "out", say=lambda _line: None)
    assert len(found.cells) == 2


@pytest.mark.usefixtures("cells_here")
def test_models_of_cells_are_removed_once_they_are_measured(settings, tmp_path):
    """Also where the process was killed before it had removed one."""
    run = {"out": tmp_path / "out", "say": lambda _line: None}
    compare(settings, ["magnitude"], ["50%"], [0], **run)
    for name in (".magnitude 50% 0", "..magnitude 50% 0.secateur"):
        (tmp_path / "out" / name).mkdir()
    compare(settings, ["magnitude"], ["50%"], [0], **run)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", ".locks"}


def test_a_recipe_file_with_a_text_of_its_own_is_refused(settings, tmp_path):
    (tmp_path / "mine.yaml").write_text("solver: wanda\ncalibration: {source: other.txt}\n")
    with pytest.raises(ValueError, match="it names a text, other.txt, and all cells share one"):
        compare(settings, [str(tmp_path / "mine.yaml")], ["50%"], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_in_the_folder_of_the_model_are_refused_before_any_work(settings):
    with pytest.raises(ValueError, match="lies in the model's folder"):
        compare(settings, ["magnitude"], ["50%"], [0], Path(settings.model) / "comparison")
    assert not (Path(settings.model) / "comparison").exists()


@pytest.mark.usefixtures("cells_here")
def test_processes_share_the_cells_of_a_table(settings, tmp_path):
    said: list[str] = []
    run = {"out": tmp_path / "out", "say": said.append}
    (tmp_path / "out" / ".locks").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".locks" / "magnitude 50% 0.lock"):
        mine = compare(settings, ["magnitude", "wanda"], ["50%"], [0], **run)
    assert list(mine.cells) == ["dense", "wanda 50% 0"]
    assert "cell 2 of 3: magnitude 50% 0 is run by another process" in said
    said.clear()
    whole = compare(settings, ["magnitude", "wanda"], ["50%"], [0], **run)
    assert [line for line in said if line.startswith("cell")] == ["cell 2 of 3: magnitude 50% 0"]
    assert whole.cells["wanda 50% 0"] == mine.cells["wanda 50% 0"]


def comparison():
    def cell(value, **more):
        return {"perplexity": {"a.txt": value}, "eval_seconds": 1.0} | more

    pruned = {"layer_error": 0.01, "sparsity": 0.5, "seconds": 10.0, "peak_memory": 2e9}
    tasks = {
        "tasks": {
            "piqa": {"acc,none": 0.5, "acc_norm,none": 0.625},
            "piqa_a": {"acc,none": 0.1},
            "piqa_b": {"acc,none": 0.2},
        },
        "tasks_asked": ["piqa"],
    }
    return Comparison(
        {"model": "<m>"},
        cells={
            "dense": cell(10.0, **tasks),
            "sparsegpt 50% 0": cell(20.0, **pruned),
            "mrp+refit.epochs=2 50% 0": cell(12.0, **pruned, **tasks),
            "mrp+refit.epochs=2 50% 1": cell(14.0, **pruned),
            "sparsegpt 2:4 0": cell(30.0, **pruned),
        },
    )


def test_a_table_has_dense_first_and_means_with_spread_over_seeds():
    found = tables(comparison())
    assert list(found) == ["50%", "2:4"]
    header, dense, sparsegpt, mrp = found["50%"]
    assert header == ["recipe", "seeds", "ppl a.txt", "piqa", "layer error", "seconds", "memory GB"]
    assert dense[:4] == ["dense", "", "10.00", "0.6250"]
    assert sparsegpt == ["sparsegpt", "1", "20.00", "", "0.0100", "10", "2.00"]
    assert mrp[:4] == ["mrp+refit.epochs=2", "2", "13.00 ± 1.41", "0.6250"]


@pytest.mark.usefixtures("drawn_charts")
def test_csv_has_every_cell_and_html_is_escaped():
    rows = list(csv.DictReader(to_csv(comparison()).splitlines()))
    assert [(row["recipe"], row["pattern"], row["seed"]) for row in rows][3] == ("mrp+refit.epochs=2", "50%", "1")
    assert rows[3]["ppl a.txt"] == "14.0"
    page = to_html(comparison())
    assert "&lt;m&gt;" in page
    assert "<m>" not in page


def test_recipes():
    assert parse_recipe("best") == {"recipe": "best"}
    assert parse_recipe("mrp+refit.epochs=2") == {"solver": "mrp", "settings": {"refit.epochs": 2}}
    check_recipe("best+true_sequential=true", "2:4", None)
    assert parse_recipe("balanced+refit.rate=1e+0")["settings"] == {"refit.rate": 1.0}
    assert split_list("best,mrp+rules=[{match: '*.mlp.*', dense: true}, {match: a}]") == (
        *("best", "mrp+rules=[{match: '*.mlp.*', dense: true}, {match: a}]"),
    )


def test_a_plus_in_a_files_name_is_none_in_front_of_a_setting(tmp_path):
    for name in ("a+b.yaml", "a+1.yaml"):
        (mine := tmp_path / name).write_text("solver: wanda\n")
        assert parse_recipe(f"{mine}+damping=0.1") == {"recipe": str(mine), "settings": {"damping": 0.1}}
        assert re.fullmatch(rf"{re.escape(name)}@[0-9a-f]{{8}}\+damping=0\.1", label_of(f"{mine}+damping=0.1"))


@pytest.mark.parametrize(
    ("recipes", "patterns", "message"),
    [
        (["sparsegtp"], ["50%"], "unknown solver 'sparsegtp'.*did you mean 'sparsegpt'"),
        (["mrp+refit"], ["50%"], "'refit' is not a setting: write NAME=VALUE"),
        (["mrp+true_sequential=maybe"], ["50%"], "true_sequential is 'maybe': it must be a valid boolean"),
        (["mrp+damping=O.1"], ["50%"], "mrp\\+damping=O.1 at 50%: "),
        (["mrp+colour=red"], ["50%"], "mrp\\+colour=red at 50%: the recipe has no option 'colour'"),
        (["mrp", "mrp+allocation.rule=owl"], ["50%", "2:4"], "owl at 2:4: allocation owl has no form"),
        (["mrp+solver.mask=M"], ["2:4", "50%"], "mask M enumerates"),
        (["mrp"], ["half"], "pattern 'half' is not understood"),
        (["mrp"], ["1"], "pattern 1 removes every weight"),
        (["mrp"], ["0.7%"], "0.7% is 0.007 of the weights"),
        (["missing.yaml"], ["50%"], "there is no recipe file missing.yaml"),
        (["mrp+format=packed"], ["50%"], "format=packed changes no figure"),
        (["mrp+pattern=70%"], ["50%"], "it sets pattern, .* pass patterns"),
        (["mrp+seed=5"], ["50%"], "it sets seed, .* pass seeds"),
        (["mrp+calibration.samples=3"], ["50%"], "it sets calibration.samples, .* pass samples"),
        (["llmcompressor-wanda"], ["50%"], "runs in another environment"),
    ],
)
def test_bad_requests_are_named_before_any_work(settings, tmp_path, recipes, patterns, message):
    with pytest.raises(ValueError, match=message):
        compare(settings, recipes, patterns, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes_of_torchrun_are_refused(settings, tmp_path, monkeypatch):
    """Their cells would exchange matrices of different methods."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without them"):
        compare(settings, ["mrp"], ["50%"], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_peer(tmp_path):
    with pytest.raises(SecateurError, match="is not a program"):
        check_recipe("llmcompressor-wanda", "50%", tmp_path)


@pytest.mark.usefixtures("cells_here")
def test_a_recipe_longer_than_a_file_name_is_a_cell(settings, tmp_path):
    names = [f"model.layers.{layer}.self_attn.{matrix}_proj" for layer in range(2) for matrix in "qkvo"]
    rules = ", ".join(f"{{match: {name}, dense: true}}" for name in names)
    table = compare(settings, [f"wanda+rules=[{rules}]"], ["50%"], [0], tmp_path / "out", say=lambda _line: None)
    (name,) = set(table.cells) - {DENSE}
    assert len(name) > 255
    assert table.cells[name]["perplexity"]


def test_cells_never_share_a_file_name():
    names = [f"mrp+{separator * 99}{end}" for separator in "_/" for end in ("a", "\N{HERB}" * 99)]
    found = [_file_name(Cell(name, "50%", 0)) for name in names]
    assert len(set(found)) == len(found)
    assert all("/" not in name and len(name.encode()) <= LONGEST_NAME for name in found)


@pytest.mark.usefixtures("cells_here")
def test_a_peer_that_is_not_there_is_explained(settings, tmp_path):
    """This environment has no llm-compressor; the message has the peer's last lines."""
    with pytest.raises(ValueError, match=r"(?s)llm-compressor failed \(exit code 1\):.*No module named"):
        compare(settings, ["llmcompressor-wanda"], ["50%"], [0], tmp_path, Path(sys.executable), say=lambda _line: None)


@pytest.mark.parametrize(("pattern", "theirs"), [("0.333", "0.333"), ("70%", "0.7"), ("2:4", "2:4"), ("1:4", "3:4")])
def test_a_peer_gets_the_same_number_of_zeros(pattern, theirs):
    """llm-compressor's n is the number of zeros in a group of m."""
    assert _as_theirs(parse_pattern(pattern)) == theirs


@pytest.mark.usefixtures("cells_here")
def test_divergence_from_the_dense_model_is_added_where_it_is_asked_for(settings, tmp_path):
    """Only to the pruned cell, which runs again for it and keeps it; the figures are those of `evaluate`."""
    said: list[str] = []
    run = {"recipes": ["magnitude"], "patterns": ["50%"], "seeds": [0], "out": tmp_path / "out", "say": said.append}
    first = compare(settings, **run)
    said.clear()
    asked = compare(replace(settings, divergence=True), **run)
    assert [line for line in said if line.startswith("cell")] == ["cell 2 of 2: magnitude 50% 0"]
    assert asked.cells["dense"] == first.cells["dense"]
    cell = asked.cells["magnitude 50% 0"]
    assert cell["perplexity"] == pytest.approx(first.cells["magnitude 50% 0"]["perplexity"], rel=1e-6)
    secateur.prune(settings.model, tmp_path / "pruned", pattern="50%", solver="magnitude")
    text = {"text": settings.texts[0], "seq_len": 32, "max_tokens": 320}
    theirs = secateur.evaluate(tmp_path / "pruned", **text, against=settings.model)["against"]
    assert cell["divergence"] == {"text.txt": theirs["kl"]}
    assert cell["top1_agreement"] == {"text.txt": theirs["top1_agreement"]}
    assert compare(settings, **run).cells == asked.cells
    header, dense, pruned = tables(asked)["50%"]
    assert header[3:5] == ["KL text.txt", "top-1 text.txt"]
    assert dense[3:5] == ["", ""]
    assert pruned[3] == f"{theirs['kl']:.4f}"


@pytest.mark.usefixtures("cells_here")
def test_two_texts_of_one_name_have_two_columns_and_changed_texts_another_table(settings, tmp_path):
    twin = tmp_path / "other" / "text.txt"
    twin.parent.mkdir()
    twin.write_text(TEXT.replace("fox", "cat"))
    twins = ComparisonSettings(**(settings.__dict__ | {"texts": (*settings.texts, str(twin))}))
    quiet = {"say": lambda _line: None}
    found = compare(twins, ["magnitude"], ["50%"], [0], tmp_path / "out", **quiet).cells["magnitude 50% 0"][
        "perplexity"
    ]
    assert list(found) == [settings.texts[0], str(twin)]
    assert len(set(found.values())) == 2
    twin.write_text(TEXT.replace("fox", "cow"))
    with pytest.raises(ValueError, match=r"made with other settings \(texts\)"):
        compare(twins, ["magnitude"], ["50%"], [0], tmp_path / "out", **quiet)


def test_prompts_of_own_words_count_by_content_and_not_by_folder(tmp_path):
    kept = []
    for folder, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text(content)
        kept.append(ComparisonSettings("model", f"self:{tmp_path / folder / 'prompts.txt'}").identity()["calibration"])
    assert kept[0] == kept[1] != kept[2]
    assert kept[0].startswith("self:prompts.txt sha256:")


@pytest.mark.usefixtures("cells_here")
def test_the_command_prints_a_table_and_writes_every_form(settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["compare", settings.model, "--recipes", "magnitude", "--patterns", "50%", "--seeds", "0,1"]
    arguments += ["--calibration", settings.calibration, "--text", settings.texts[0], "--samples", "8"]
    arguments += ["--seq-len", "32", "--eval-seq-len", "32", "--max-tokens", "320", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert "magnitude" in printed.out
    assert "prune: 2 of 2" in printed.err
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.csv", "compare.html", ".locks"}
    assert json.loads((out / "compare.json").read_text())["command"].startswith("secateur compare")
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments[:6], "--seeds", "one"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the process in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_cell_ends_with_the_comparison_that_was_stopped(tmp_path, how):
    """The parent is stopped while its cell's process sleeps; neither waits for the end of the cell."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, time\n"
        "from secateur.cli.process import prepare_process\n"
        "from secateur.runtime.own_process import run_in_own_process\n"
        "def cell():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "    prepare_process()\n"
        "    run_in_own_process(cell)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        cell = int(parent.stdout.readline())
        parent.send_signal(how)
        try:
            assert parent.wait(60) != 0
        finally:
            parent.kill()
    for _ in range(100):
        if not is_running(cell):
            return
        time.sleep(0.1)
    os.kill(cell, signal.SIGKILL)
    pytest.fail("the cell went on after its parent was killed")


def test_a_process_returns_what_its_function_does_or_says_why_it_did_not():
    assert run_in_own_process(divmod, 7, 3) == (2, 1)
    with pytest.raises(SecateurError, match="pattern"):
        run_in_own_process(parse_pattern, "many")
    with pytest.raises(ZeroDivisionError) as raised:
        run_in_own_process(divmod, 7, 0)
    assert "In the process that ran it:\nTraceback" in raised.value.__notes__[0]
    with pytest.raises(SecateurError, match=r"process died \(exit code 9\)"):
        run_in_own_process(os._exit, 9)


@pytest.mark.usefixtures("cells_here")
def test_tasks_run_for_the_seeds_named_and_add_up(settings, tmp_path, monkeypatch):
    def run_tasks(_model, _tokenizer, tasks, *_others):
        return {task: {"acc,none": 0.5} for task in tasks}

    monkeypatch.setattr("secateur.comparison.compare.check_tasks", lambda *_: None)
    monkeypatch.setattr("secateur.comparison.cell.run_tasks", run_tasks)
    run = {"recipes": ["magnitude"], "patterns": ["50%"], "seeds": [0, 1], "out": tmp_path / "out"}
    run |= {"say": lambda _: None}
    cells = compare(replace(settings, tasks=("one",)), **run, tasks_for_seeds=[1]).cells
    assert {key for key, cell in cells.items() if "tasks" in cell} == {"dense", "magnitude 50% 1"}
    cells = compare(replace(settings, tasks=("two",)), **run).cells
    assert cells["magnitude 50% 1"]["tasks_asked"] == ["one", "two"]
    with pytest.raises(SecateurError, match="task_seeds has 7, which is none of seeds"):
        compare(replace(settings, tasks=("two",)), **run, tasks_for_seeds=[1, 7])


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"tasks_for_seeds": [0]}, {}, "task_seeds is for tasks, which are not named"),
        ({"peer_python": "python"}, {}, "recipes names none of them"),
        ({}, {"text_field": "body"}, "text_field is 'body', and no text here has fields"),
    ],
)
def test_an_argument_that_nothing_uses_is_refused(settings, tmp_path, arguments, changes, message):
    with pytest.raises(SecateurError, match=message):
        compare(replace(settings, **changes), ["magnitude"], ["50%"], [0], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_process_imports_no_file_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "multiprocessing.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert run_in_own_process(divmod, 7, 3) == (2, 1)
    assert "PYTHONSAFEPATH" not in os.environ


class ErrorOfALibrary(OSError):
    """What unpickles in no process: its argument has no default."""

    def __init__(self, message: str, *, response: object) -> None:
        super().__init__(message)
        self.response = response


def raise_as_a_library():
    raise ErrorOfALibrary("not found", response=None)


def test_an_error_that_cannot_be_sent_keeps_its_words_and_its_kind():
    with pytest.raises(OSError, match="ErrorOfALibrary: not found") as raised:
        run_in_own_process(raise_as_a_library)
    assert "raise_as_a_library" in raised.value.__notes__[0]


def is_running(pid):
    """Whether a process exists and is not a zombie that waits for its new parent to collect it."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_only_members_of_a_task_group_are_left_out_of_a_table():
    texts = {"wiki": 10.0, "wiki_de": 11.0, "wiki_fr": 12.0}
    accuracy = {"acc": 0.5}
    ran = dict.fromkeys(("blimp", "blimp_a", "blimp_b", "hellaswag", "hellaswag_de", "hellaswag_fr"), accuracy)
    asked = ["blimp", "hellaswag", "hellaswag_de", "hellaswag_fr"]
    cells = {DENSE: {"perplexity": texts}, "fast 50% 0": {"perplexity": texts, "tasks": ran, "tasks_asked": asked}}
    header = tables(replace(comparison(), cells=cells))["50%"][0]
    assert header == ["recipe", "seeds", *(f"ppl {text}" for text in texts), *asked]
