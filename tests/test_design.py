"""The rules that keep the code as it was meant: import direction, sizes, words, and documents that match the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "secateur"
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_FILES = 12
# Functions that may be longer, with the reason.
LONG_FUNCTIONS = {
    "cli.app.prune": "one line a flag",
    "cli.app.compare": "one line a flag",
    "api.pruning.prune": "one line of signature and documentation an argument",
    "api.pruning.dry_run": "one line of signature and documentation an argument",
    "api.models.evaluate": "one line of signature and documentation an argument",
}
# Bottom to top: a folder (or a file beside the folders) imports only from those before it.
ORDER = (
    "errors",
    "storage",
    "recipe",
    "runtime",
    "numerics",
    "solvers",
    "packed",
    "models",
    "calibration",
    "reporting",
    "permutation",
    "pruning",
    "resume",
    "sources",
    "checkpoints",
    "evaluation",
    "training",
    "request",
    "run",
    "api",
    "comparison",
    "cli",
    "__main__",
)
TORCH_FREE = (
    "errors",
    "storage",
    "recipe",
    "cli.flags",
    "cli.app",
    "cli.process",
    "cli.deployment",
    "cli.console",
    "cli.progress",
)
# Who may catch every exception: what other packages raise can't be listed, and the edge of the program hides nothing.
BROAD_EXCEPTS = {
    "sources.gguf": "the parsers of three packages on a damaged file",
    "recipe.solvers": "the code of a plug-in",
    "solvers.checked": "the code of a plug-in",
    "comparison.compare": "whatever a cell dies of in its process, those after it run",
    "calibration.texts": "the tokenizers library raises Exception itself",
    "runtime.own_process": "an error is raised in the process that waits",
    "cli.process": "an unexpected error becomes a file and exit code 70",
}
# Phrases that make a sentence hard to read; tests/test_design.py alone may name them.
BANNED = {
    r"\bbut for\b": "except for",
    r"\bbeside\b": "next to, in addition",
    r"\bis told of\b": "is reported",
    r"(?<!there )\b(is|are) no (?!longer\b|more\b)[a-zA-Z]": "is not a",
    r"\bof (its|their) own\b": "say whose, or leave it out",
    r"\bso many\b": "give the name of the number",
    r"\ball the same\b": "still, even so",
    r"\bsuch as had been\b": "that was",
    r"\bby nobody\b": "untested",
    r"\bwhat (\w+ ){1,3}is is\b": "name the thing",
}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def top_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(tree: ast.AST, top_level_only: bool = False) -> set[str]:
    """Modules of the package that a file imports, in every spelling, inside functions too."""
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = (node.module or "").split(".")
            if parts[0] == "secateur":
                found |= {".".join(parts[1:])} if parts[1:] else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("secateur.")}
    return found - {"", "__version__"}


@pytest.mark.parametrize(
    "line",
    ["from secateur.cli.app import main", "import secateur.cli.app", "def f():\n    import secateur.cli.app as a",
     "from secateur import cli", "def f():\n    from secateur.cli import app"],
)  # fmt: skip
def test_every_spelling_of_an_import_is_seen(line):
    assert {top_of(name) for name in imports_of(ast.parse(line))} == {"cli"}


def test_imports_point_one_way():
    for name, tree in modules().items():
        if name == "__init__":
            continue
        for imported in imports_of(tree):
            assert ORDER.index(top_of(imported)) <= ORDER.index(top_of(name)), f"{name} imports {imported}, above it"


def test_no_circle_inside_a_folder():
    graph = {name: imports_of(tree, top_level_only=True) for name, tree in modules().items()}

    def reaches(name: str, target: str, seen: set[str]) -> bool:
        for each in graph.get(name, ()):
            if each == target or (each not in seen and reaches(each, target, seen | {each})):
                return True
        return False

    for name in graph:
        assert not reaches(name, name, set()), f"{name} imports itself through others"


def test_folders_are_few_and_small_and_say_what_belongs_there():
    assert {top_of(name) for name in modules()} == {*ORDER, "__init__"}
    for folder in [path for path in SOURCE.iterdir() if (path / "__init__.py").exists()]:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, f"{folder.name} has too many files"
        assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "") > 60, folder.name


def test_declarations_and_the_command_line_import_no_torch():
    heavy = {"torch", "transformers", "safetensors", "jaxtyping", "huggingface_hub"}
    for name, tree in modules().items():
        if not any(name == each or name.startswith(f"{each}.") for each in TORCH_FREE):
            continue
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {top_of(each) for each in names} & heavy, name


def test_numerics_and_solvers_know_no_model():
    for name, tree in modules().items():
        if top_of(name) in ("numerics", "solvers"):
            words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert "Module" not in words, f"{name} touches nn.Module"


# The first has a table of models that count positions in another way, the second only looks whether there is any type.
LOOK_AT_MODEL_TYPE = {"calibration.texts", "resume.output_folder"}


def test_no_branch_on_a_model_family():
    found = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "model_type")
        or (isinstance(node, ast.Constant) and node.value == "model_type")
    }
    assert found == LOOK_AT_MODEL_TYPE


def test_functions_and_files_stay_short():
    for name, tree in modules().items():
        source = SOURCE / (name.replace(".", "/") + ".py")
        assert len(source.read_text().splitlines()) <= MAX_FILE_LINES, f"{name} is too long"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and f"{name}.{node.name}" not in LONG_FUNCTIONS:
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {length} lines"


def test_no_broad_except_no_pickle_and_errors_of_our_class():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                raised_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if re.search("everything|Exception", caught) and not raised_again:
                    assert name in BROAD_EXCEPTS, f"{name} catches {caught}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                allowed = "from pickle import UnpicklingError"
                assert "pickle" not in ast.unparse(node).replace(allowed, ""), f"{name} imports pickle"
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert not ast.unparse(node.exc).startswith("ValueError"), f"{name} raises a bare ValueError"


def written() -> dict[str, str]:
    """Every text that people read: sources, tests, scripts, documents."""
    paths = [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    paths += [*(ROOT / "tools").glob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    own = Path(__file__)
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths if path != own}


def banned_in(text: str) -> list[str]:
    return [
        f"{found[0]!r} (instead: {better})" for phrase, better in BANNED.items() for found in re.finditer(phrase, text)
    ]


def test_banned_phrases_are_found():
    assert banned_in("It is no model, but for its files, which are of their own.")
    assert not banned_in("It is no longer a model; 5 is not a size.")


def test_plain_english():
    for name, text in written().items():
        for number, line in enumerate(text.splitlines(), 1):
            assert not banned_in(line), f"{name}, line {number}: {', '.join(banned_in(line))}"


def test_every_promise_has_its_tests():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"(test_\w+\.py): ((?:test_\w+(?:, )?)+)", page)
    assert len(named) > 10
    for file, tests in named:
        functions = set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE))
        assert set(tests.split(", ")) <= functions, file


def test_contributing_lists_every_folder_once():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\| `([\w]+)/` \|", text, re.MULTILINE)
    assert listed == [name for name in ORDER if (SOURCE / name).is_dir()]


def test_readme_has_the_two_commands_on_one_line_each():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in lines if line.endswith("secateur demo")]) == 1
    assert len([line for line in lines if line.endswith("pytest -n 2")]) == 1


def test_readme_bullets_are_short():
    bullets = re.findall(r"^- (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert bullets
    for bullet in bullets:
        assert len(bullet.split()) <= 40, bullet


def test_recipes_in_the_documents_are_valid():
    from secateur import Recipe

    blocks = [
        block
        for page in (ROOT / "docs" / "guides" / "rules.md", ROOT / "docs" / "recipe.md")
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) > 1
    for block in blocks:
        Recipe.from_dict(YAML(typ="safe").load(block))


def test_generated_pages_and_pictures_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/make_pages.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run `python tools/make_pages.py`: {done.stdout}{done.stderr}"


def test_public_api_resolves():
    import secateur

    assert (SOURCE / "py.typed").exists()
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
