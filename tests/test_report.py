"""The report: its figures against the model itself, its page in a browser, and what hostile names can't do to it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from helpers import dense_pass
from models import TEXT, save_checkpoint, tiny_model, tokens
from ruamel.yaml import YAML
from safetensors.torch import save_file

import secateur
from secateur.errors import SecateurError
from secateur.pruning.depth import DepthMeter
from secateur.pruning.loss_curves import LossCurve, prices_of_zeros
from secateur.recipe.patterns import Unstructured
from secateur.reporting.charts import Series, chart
from secateur.reporting.figures import OUTPUT_ERROR, BlockReport, DepthReport, MatrixReport, Speed, StageReport
from secateur.reporting.heat_map import heat_map, split_name
from secateur.reporting.page import _short, headline, run_page, two_runs_page
from secateur.reporting.report import Report
from secateur.reporting.stages import StageClock
from secateur.reporting.weight_files import read_weight_files

pytestmark = pytest.mark.usefixtures("drawn_charts")

EVIL = '<img src=x onerror="alert(1)"></title><script>alert(2)</script>$x^2$\x1b[31m'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def model(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


@pytest.fixture
def prune(model, tmp_path):
    """Prunes the model to a folder of a name."""

    def run(name="pruned", **options):
        asked = {"pattern": "50%", "solver": "magnitude", "samples": 4, "seq_len": 32} | options
        return secateur.prune(model, tmp_path / name, calibration=tmp_path / "text.txt", **asked)

    return run


def a_report(blocks=32, name="model"):
    """A report of a run with all its parts, of as many blocks."""
    matrices = [
        MatrixReport(f"model.layers.{block}.{kind}", 64, 64, 1, "50%", 1800 + 7 * block, 0.001 * (block + 1), None, 1.0,
                     4096, 0.0, "mrp", {})
        for block in range(blocks)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    ]  # fmt: skip
    return Report(
        model=name,
        recipe=secateur.Recipe.from_dict({"pattern": "50%", "solver": "mrp"}),
        environment={"torch": "2", "threads": 2},
        calibration={"source": name, "samples": 8, "seq_len": 64, "sha256": "0"},
        matrices=matrices,
        blocks=[BlockReport(f"model.layers.{block}", OUTPUT_ERROR, 0.2, 0.1, 2, 0.02, 1.0) for block in range(blocks)],
        depth=[DepthReport(f"model.layers.{block}", 1 - 0.001 * block, 0.01 * block) for block in range(blocks)],
        stages=[StageReport("dense pass", 3.0, 10**9), StageReport("prune", 500.0, 2 * 10**9)],
        dense={f"{name}.head": name},
        notices=[name],
        prices={matrix.name: 1.5 for matrix in matrices},
        model_parameters=10**7,
        layer_parameters=10**6,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers.3", "mlp.up_proj")),
        ("decoder.block.0.layer.1.DenseReluDense.wi", ("decoder.block.0", "layer.1.DenseReluDense.wi")),
        ("model.layers.0.mlp.experts.7.w1", ("model.layers.0", "mlp.experts.w1")),
        ("model.layers.0.mlp.experts.gate_up_proj[5]", ("model.layers.0", "mlp.experts.gate_up_proj")),
        ("weight", ("", "weight")),
    ],
)
def test_a_matrix_has_a_block_and_a_kind(name, expected):
    assert split_name(name) == expected


def test_a_cell_of_several_experts_shows_their_mean_by_weights():
    first = a_report(1).matrices[0]
    experts = [
        replace(first, name="layers.0.experts.0.w", rows=10, columns=10, zeros=0),
        replace(first, name="layers.0.experts.1.w", rows=10, columns=30, zeros=300),
    ]
    grid = heat_map("zeros", experts, lambda each: each.sparsity, lambda value: f"{value:.0%}", lambda each: "why")
    ((_, (cell,)),) = grid.rows
    assert cell.text == "75%"
    assert "mean of 2 matrices" in cell.title
    assert "Of this one: why" in cell.title


def test_depth_is_that_of_the_two_models(prune, model, tmp_path):
    """Hidden states behind each block by hooks, in float64, on the first batch."""
    report = prune(samples=2)
    ids = _first_batch(report, model, tmp_path)
    dense, pruned = (_hidden_states(folder, ids) for folder in (model, tmp_path / "pruned"))
    assert len(report.depth) == len(dense) == 2
    for found, theirs, ours in zip(report.depth, dense, pruned, strict=True):
        cosine = torch.cosine_similarity(ours, theirs, dim=-1).mean()
        error = (ours - theirs).norm() / theirs.norm()
        assert found.cosine == pytest.approx(float(cosine), abs=2e-3)
        assert found.relative_error == pytest.approx(float(error), rel=0.05)


def _first_batch(report, model, tmp_path):
    from secateur.calibration.batches import calibration_batches
    from secateur.checkpoints.load import load

    checkpoint = load(str(model))
    text = secateur.CalibrationText(source=str(tmp_path / "text.txt"), samples=2, seq_len=32)
    batches = calibration_batches(text.source, checkpoint.tokenizer, checkpoint.model.config, text)
    assert batches.origin["sha256"] == report.calibration["sha256"]
    return batches.batches[0]["input_ids"]


def _hidden_states(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for block in model.model.layers:
        block.register_forward_hook(
            lambda _module, _args, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(ids)
    return found


def test_depth_does_not_depend_on_whether_the_dense_stream_is_kept():
    """A run that refits has the dense outputs of every block; the meter makes the same ones where it has to."""
    found = dense_pass(tiny_model("llama").eval(), tokens(6))
    stream = found.stream
    given, own = DepthMeter(stream), DepthMeter(stream)
    with torch.no_grad():
        stream.dense = stream.hidden.copy()
        for block in found.blocks:
            outputs = stream.outputs(block, of_dense=True)
            given.advance_dense(block, outputs)
            own.advance_dense(block, None)
            assert torch.equal(given.dense, own.dense)
            stream.dense = outputs


def test_depth_is_nothing_where_nothing_is_pruned():
    """Zeros that are there already: the pruned model is the dense one."""
    model = tiny_model("llama")
    secateur.prune(model, pattern="50%", solver="magnitude", calibration=tokens())
    report = secateur.prune(model, pattern="50%", solver="magnitude", calibration=tokens())
    assert all(each.relative_error == 0 and each.cosine == pytest.approx(1) for each in report.depth)


def test_the_headline_compares_the_fastest_model_with_the_first():
    speeds = [
        Speed(name, 1, 1, 1.0, 1.0, rate, 2) for name, rate in (("dense", 20.0), ("pruned", 19.0), ("int8", 18.0))
    ]
    tile = {what: figure for figure, what, _ in headline(replace(a_report(1), speeds=speeds), None)}
    assert tile["decoding speed"] == "0.95x"
    tile = {what: figure for figure, what, _ in headline(replace(a_report(1), speeds=speeds[1:2]), None)}
    assert tile["tokens/s of decoding"] == "19.0"


def test_figures_of_other_weights_are_dropped(prune, main, tmp_path):
    """After packing to int8 or fine-tuning, what was measured before is not this model's."""
    prune()
    folder, text = tmp_path / "pruned", tmp_path / "text.txt"
    main("eval", folder, "--text", text, "--seq-len", 32, "--record")
    assert Report.load(folder).perplexities
    secateur.pack(folder, tmp_path / "packed", values="int8")
    assert not Report.load(tmp_path / "packed").perplexities
    assert "## Quality" in (folder / "README.md").read_text()
    assert "## Quality" not in (tmp_path / "packed" / "README.md").read_text()
    shutil.copytree(folder, tmp_path / "same")
    Report.load(folder).save(tmp_path / "same")
    assert Report.load(tmp_path / "same").perplexities


def test_the_page_of_experts_knows_what_packing_gives(tmp_path):
    """Experts are stored one by one or stacked, and recorded as `stack[3]`."""
    weight = torch.randn(4, 64, 64).to(torch.bfloat16) * (torch.rand(4, 64, 64) > 0.5)
    first = a_report(1).matrices[0]
    matrices = [
        replace(first, name=f"layers.0.experts.w[{index}]", rows=64, columns=64, zeros=int((part == 0).sum()))
        for index, part in enumerate(weight)
    ]
    save_file({"layers.0.experts.w": weight}, tmp_path / "model.safetensors")
    found = read_weight_files(tmp_path, matrices)
    assert found.packed_bytes < 0.6 * found.bytes
    assert {picture.name for picture in found.pictures} <= {matrix.name for matrix in matrices}
    assert found.pictures


def test_two_runs_without_a_common_matrix():
    other = a_report(2)
    other.matrices = [replace(each, name=each.name.replace("model.layers", "transformer.h")) for each in other.matrices]
    assert "Change of zeros" not in two_runs_page(a_report(2), other, ("a", "b"))


def test_a_report_does_not_write_through_a_link(prune, tmp_path):
    report = prune()
    (tmp_path / "other.txt").write_text("theirs")
    for name in ("report.html", "secateur.json", "recipe.yaml"):
        (tmp_path / "pruned" / name).unlink()
        (tmp_path / "pruned" / name).symlink_to(tmp_path / "other.txt")
    report.save(tmp_path / "pruned")
    assert (tmp_path / "other.txt").read_text() == "theirs"
    assert "recipe.yaml" in report.files
    assert not secateur.inspect(tmp_path / "pruned").problems


def test_what_is_published_does_not_say_where_it_lay(prune, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "customers").mkdir()
    shutil.copy("text.txt", "customers/acme.txt")
    options = ["--samples", 4, "--seq-len", 32, "--solver", "magnitude"]
    code, _, errors = main("prune", "model", "out", "--calibration", "customers/acme.txt", *options)
    assert code == 0, errors
    card = (tmp_path / "out" / "README.md").read_text()
    assert "acme.txt" in card
    assert "customers" not in card
    assert str(tmp_path) not in (tmp_path / "out" / "secateur.json").read_text()


def test_prices_are_slopes_of_the_curves():
    """Losses exp(a s): the slope at s is a exp(a s), whatever the size of the matrix."""

    def curve(rate, weights):
        levels = [0.3, 0.4, 0.5, 0.6, 0.7]
        return LossCurve(levels, [weights * 2.718281828 ** (rate * level) for level in levels], weights)

    curves = {"gentle": curve(1.0, 100), "median": curve(4.0, 1000), "steep": curve(8.0, 100)}
    found = prices_of_zeros(curves, Unstructured(0.5))

    def slope(rate):
        return rate * 2.718281828 ** (rate * 0.5)

    assert found["median"] == pytest.approx(1.0)
    assert found["steep"] == pytest.approx(slope(8) / slope(4), rel=1e-2)
    assert found["gentle"] == pytest.approx(slope(1) / slope(4), rel=1e-2)


def test_the_reasons_name_rules_and_prices(prune, tmp_path):
    report = prune(recipe="balanced", solver=None, settings={"rules": [{"match": "*.0.mlp.up_proj", "pattern": "75%"}]})
    page = (tmp_path / "pruned" / "report.html").read_text()
    assert "The rule for *.0.mlp.up_proj says 75%" in page
    assert report.prices
    assert "model.layers.0.mlp.up_proj" not in report.prices  # the allocation left it to its rule
    assert "the median matrix" in page


def test_stages_add_up():
    now = [0.0]
    seen = []
    clock = StageClock(lambda *call: seen.append(call), lambda: now[0])
    for stage, until in (("dense pass", 2.0), ("prune", 5.0), ("prune", 9.0), ("save", 10.0)):
        now[0] = until
        clock(stage, 1, 2)
    assert [(each.name, each.seconds) for each in clock.stages()] == [
        ("dense pass", 2.0),
        ("prune", 7.0),
        ("save", 1.0),
    ]
    assert all(each.memory_bytes > 10**7 for each in clock.stages())
    assert seen[-1] == ("save", 1, 2)


def test_a_run_writes_its_page_and_the_page_can_be_written_again(prune, main, tmp_path):
    prune()
    folder = tmp_path / "pruned"
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    code, out, errors = main("report", folder)
    assert code == 0, errors
    assert "report.html" in out
    assert (folder / "report.html").read_text() == first
    assert not secateur.inspect(folder).problems
    secateur.pack(folder, tmp_path / "packed")
    assert "weight files" in (tmp_path / "packed" / "report.html").read_text()
    assert not secateur.inspect(tmp_path / "packed").problems


def test_a_loaded_report_is_the_saved_one(prune, tmp_path):
    saved = prune(recipe="balanced", solver=None)
    loaded = Report.load(tmp_path / "pruned")
    without = {"files": {}, "out": None}
    assert asdict(replace(loaded, **without)) == asdict(replace(saved, **without))


def test_two_runs_side_by_side(prune, main, tmp_path, monkeypatch):
    prune("one")
    prune("two", pattern="2:4")
    monkeypatch.chdir(tmp_path)
    code, _, errors = main("report", "one", "two")
    assert code == 0, errors
    page = (tmp_path / "comparison.html").read_text()
    assert '-pattern: "50%"' in html.unescape(page) or "-pattern: 50%" in page
    assert re.search(r"\+pattern: .*2:4", page)
    assert "Change of zeros" in page


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["model"], ["pruned", "nosuch"], ["pruned", "--out", "no/such/place.html"]]
)
def test_report_refuses_what_it_can_not_show(prune, main, tmp_path, monkeypatch, arguments):
    prune()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = main("report", *arguments)
    assert code == 2
    assert any(name in errors for name in ("nosuch", "model", "place.html"))
    assert sorted(tmp_path.rglob("*")) == before


def test_report_refuses_damaged_metadata(prune, main, tmp_path):
    prune()
    path = tmp_path / "pruned" / "secateur.json"
    path.write_text(path.read_text().replace('"cosine"', '"sine"'))
    code, _, errors = main("report", tmp_path / "pruned")
    assert code == 2
    assert "secateur.json" in errors


def test_measured_figures_are_kept_with_the_model(prune, main, model, tmp_path):
    prune()
    folder, text = tmp_path / "pruned", tmp_path / "text.txt"
    code, _, errors = main("eval", folder, "--text", text, "--seq-len", 32, "--against", model, "--record")
    assert code == 0, errors
    report = Report.load(folder)
    (measured,) = report.perplexities
    dense = secateur.evaluate(model, text, seq_len=32)
    assert measured.dense == pytest.approx(dense["perplexity"], rel=1e-5)
    assert measured.perplexity == pytest.approx(secateur.evaluate(folder, text, seq_len=32)["perplexity"])
    header = YAML(typ="safe", pure=True).load((folder / "README.md").read_text().split("---\n")[1])
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(measured.perplexity, abs=1e-3)
    assert result["dataset"]["name"] == "text.txt"  # not where it was on this machine
    assert f"{measured.perplexity:.2f}" in (folder / "report.html").read_text()
    assert not secateur.inspect(folder).problems
    main("eval", folder, "--text", text, "--seq-len", 32, "--record")
    main("eval", folder, "--text", text, "--seq-len", 16, "--record")
    again, other = Report.load(folder).perplexities
    assert again == measured  # what --against found stays
    assert (other.seq_len, other.dense) == (16, None)
    (folder / "README.md").unlink()
    main("eval", folder, "--text", text, "--seq-len", 16, "--record")
    assert f"{measured.perplexity:.2f}" in (folder / "README.md").read_text()


def test_figures_of_the_working_folder_have_its_name(prune, main, tmp_path, monkeypatch):
    prune()
    monkeypatch.chdir(tmp_path / "pruned")
    code, _, errors = main("eval", ".", "--text", tmp_path / "text.txt", "--seq-len", 32, "--record")
    assert code == 0, errors
    assert "\n# pruned\n" in (tmp_path / "pruned" / "README.md").read_text()
    secateur.pack(".", tmp_path / "packed")
    assert "\n# pruned\n" in (tmp_path / "packed" / "README.md").read_text()


def test_a_folder_that_takes_no_figures_is_named_before_they_are_measured(prune, tmp_path, monkeypatch):
    prune()
    asked = {"seq_len": 32, "record": True}
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(SecateurError, match="which can't be written: leave it out"):
        secateur.evaluate(tmp_path / "pruned", tmp_path / "text.txt", **asked)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.checkpoints.measured.write_durably", full)
    with pytest.raises(SecateurError, match="could not be added to .*pruned .No space left on device"):
        secateur.evaluate(tmp_path / "pruned", tmp_path / "text.txt", **asked)


def test_figures_are_recorded_only_with_a_pruned_model(main, model, tmp_path):
    code, _, errors = main("eval", model, "--text", tmp_path / "text.txt", "--seq-len", 32, "--record")
    assert code == 2
    assert "secateur.json" in errors


def test_the_notebook_form_is_short(prune):
    report = prune()
    assert len(repr(report)) < 200
    shown = report._repr_html_()
    assert "zeros" in shown
    assert "mlp.up_proj" in shown
    assert len(shown) < 30_000


def test_hostile_names_stay_text(tmp_path):
    report = a_report(2, EVIL)
    report.speeds = [Speed(EVIL, 10, 10, 1.0, 1.0, 1.0, 1)]
    for page in (run_page(report), two_runs_page(report, report, (EVIL, EVIL)), report._repr_html_()):
        assert "<img src=x" not in page
        assert "<script" not in page
        assert "\x1b" not in page
        assert html.escape("<script>alert(2)") in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', run_page(report))[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_page_is_small(tmp_path):
    assert len(run_page(a_report(32))) < 3_000_000


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")


def shown_in_chromium(tmp_path, page, width):
    """What Chromium says on its console, and the widths of the page's content and window, in a frame of a width."""
    (tmp_path / "page.html").write_text(page)
    script = (
        "const frame = document.querySelector('iframe'); frame.onload = () => { const root = "
        "frame.contentDocument.documentElement; document.body.dataset.found = JSON.stringify({content: "
        "root.scrollWidth, window: root.clientWidth, svgs: root.querySelectorAll('svg').length}); };"
    )
    (tmp_path / "frame.html").write_text(
        f'<!doctype html><body><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        f"<script>{script}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1600,1000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line], found


@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["model", EVIL], ids=["plain", "hostile"])
def test_the_page_in_a_browser(tmp_path, width, name):
    messages, found = shown_in_chromium(tmp_path, run_page(a_report(32, name)), width)
    assert messages == []
    assert found["window"] <= width
    assert found["content"] <= found["window"], "it must not scroll sideways"
    assert found["svgs"] == 3


@needs_chromium
def test_the_browser_test_can_fail(tmp_path):
    page = "<!doctype html><script>console.error('an error')</script><div style='width:5000px'>wide</div>"
    messages, found = shown_in_chromium(tmp_path, page, 390)
    assert len(messages) == 1
    assert found["content"] > 4000


@pytest.mark.parametrize(
    ("error", "shown"), [(0.00001, "<.01%"), (0.0123, "1.2%"), (0.0995, "10%"), (0.997, "100%"), (1.2, "120%")]
)
def test_layer_errors_in_percent(error, shown):
    assert _short(error) == shown


@pytest.mark.usefixtures("drawn_charts")
def test_a_legend_names_every_line():
    drawn = str(chart([Series("_old", [1, 2], [1, 2]), Series("_new", [1, 2], [2, 3])], "x", "y", alt="two lines"))
    assert "_old" in drawn
    assert "_new" in drawn


def test_a_report_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("llama")
    report = secateur.prune(model, solver="magnitude", calibration=tokens())
    report.save("~/saved")
    assert (tmp_path / "saved" / "secateur.json").is_file()
    assert Report.load("~/saved").model == report.model
