"""The documentation: it builds without warnings, and every command and example on its pages runs.

Commands run on a tiny model called `my-model`, page by page, in a folder with the files that the pages name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, Hub
from models import character_tokenizer, save_checkpoint, tiny_model, tokens

import secateur

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "index.md", DOCS / "troubleshooting.md", *sorted((DOCS / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that something else runs, or that install.
ELSEWHERE = {
    "pip install -e .": "installs",
    ". .venv/bin/activate": "the shell does this",
    "python3 -m venv .venv && . .venv/bin/activate": "the shell does this",
    "secateur demo": ".ci/run does this",
    "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/secateur demo": ".ci/run does this",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/pytest -n 2": ".ci/run does this",
}
LARGEST = {"--samples": "8", "--seq-len": "96"}
SENTENCE = "the quick brown fox jumps over the lazy dog, and then it does so again.\n"
CHAT = {"messages": [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": SENTENCE * 4}]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the pages take for granted: a model, texts, a pruned and a packed model."""
    folder = tmp_path_factory.mktemp("prepared")
    save_checkpoint(folder / "my-model", max_position_embeddings=int(LARGEST["--seq-len"]))
    (folder / "held-out.txt").write_text(SENTENCE * 30)
    (folder / "my-texts.txt").write_text((SENTENCE[:50] + "\n\n") * 16)
    (folder / "my-texts.jsonl").write_text("".join(json.dumps({"text": SENTENCE * 9}) + "\n" for _ in range(9)))
    (folder / "chats.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(12)))
    (folder / "table.csv").write_text("id,body\n" + "".join(f'{row},"{SENTENCE * 9}"\n' for row in range(9)))
    small = {"samples": 8, "seq_len": 32, "solver": "magnitude", "calibration": folder / "my-texts.jsonl"}
    secateur.prune(folder / "my-model", folder / "pruned", **small)
    secateur.pack(folder / "pruned", folder / "packed")
    return folder


@pytest.fixture
def sandbox(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("secateur.calibration.documents.shipped_text", lambda _name: SENTENCE * 30)
    return folder


def blocks(page):
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.long
@pytest.mark.usefixtures("cells_here", "measured_here")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_example_of_a_page_runs(page, sandbox, main, monkeypatch):
    batches = [{"input_ids": batch} for batch in tokens()]
    namespace = {"batches": batches, "tokenizer": character_tokenizer(chat=True), "vit": None}
    save_adapter(sandbox) if "adapter" in page.read_text() else None
    for kind, text in blocks(page):
        if kind == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)", text)):
            (sandbox / name[1]).write_text(text)
        if kind == "json":
            json.loads(text)
        if kind == "python":
            namespace["model"] = tiny_model("llama")
            exec(compile(text.replace('"seq_len": 512', '"seq_len": 96'), str(page), "exec"), namespace)
        if kind == "sh":
            for line in filter(None, text.splitlines()):
                run(line.partition("  #")[0].strip(), main, monkeypatch)


def run(line, main, monkeypatch):
    """Run a line of a page; what it writes must not be there yet."""
    if line in ELSEWHERE:
        return
    command, _, target = line.partition(" > ")
    program, *arguments = shortened(shlex.split(command))
    assert program in ("secateur", "torchrun"), line
    if arguments[0] == "prune" and "--resume" not in arguments:
        shutil.rmtree(arguments[2], ignore_errors=True)
    if arguments[0] in ("pack", "unpack"):
        shutil.rmtree(arguments[2], ignore_errors=True)
    if program == "torchrun":
        out = arguments[arguments.index("prune") + 2]
        shutil.rmtree(out, ignore_errors=True)
        short = ["--calibration", "my-texts.jsonl", "--samples", "8", "--recipe", "fast"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, *short]
        done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return
    if arguments[0] == "push":
        with Hub() as hub:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            code, out, errors = main(*arguments)
            assert hub.repos
    else:
        code, out, errors = main(*arguments)
    assert code == 0, f"{line}: {errors}"
    if target:
        Path(target).write_text(out)


def shortened(words):
    """A command that calibrates, on few and short sequences; a recipe file has its own numbers."""
    if words[0] == "torchrun" or words[1] not in ("prune", "compare") or any(".yaml" in word for word in words):
        return words
    for option, most in LARGEST.items():
        if option in words:
            place = words.index(option) + 1
            words[place] = min(words[place], most, key=int)
    return words if "--samples" in words else [*words, "--samples", LARGEST["--samples"]]


def save_adapter(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained("adapter")


def test_every_block_has_a_language():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(fences[::2]), f"{page}: a block without a language is not run"
        assert not any(fences[1::2]), page


def test_the_site_builds_without_warnings(tmp_path):
    """Strict: a link or an anchor that leads nowhere is an error. Pages that nothing leads to are none of ours."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "secateur.api.pruning.prune" in api


def test_pictures_of_the_pages_are_there():
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page}: {target}"


def test_the_example_notebook_runs_from_top_to_bottom(prepared, tmp_path):
    """On a tiny model: the demo of `.ci/run` does the same steps on the notebook's own."""
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "prune.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if "show" in cell.metadata.get("tags", ()))
    assert 'MODEL, OUT, PACKED = "smollm2"' in code[0].source
    for cell in code:
        cell.source = cell.source.replace("smollm2", str(prepared / "my-model")).replace("seq_len=512", "seq_len=96")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("secateur-report" in str(output) for cell in code for output in cell.outputs)
