"""The rules that keep the code as it was meant: import direction, sizes, and documents that match the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "secateur"
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
# Functions that may be longer, with the reason.
LONG_FUNCTIONS = {
    "cli.prune": "one declaration an option",
    "cli.compare": "one declaration an option",
    "api.prune": "one parameter and one line of documentation an option",
}

# Each module may import only modules of its own layer's left: mathematics, model, engine, files, interface.
LAYERS = (
    ("workspace", "pattern", "linalg", "gram", "solvers"),
    (
        "parallel",
        "memory",
        "observe",
        "model",
        "lockstep",
        "residence",
        "stacks",
        "experts",
        "capture",
        "survey",
        "report",
    ),
    (
        "sensitivity",
        "allocation",
        "target",
        "refit",
        "engine",
        "coverage",
        "recipe",
        "calibration",
        "evaluation",
        "tasks",
    ),
    ("assets", "converted", "checkpoint", "durable", "block_files", "manifest", "store", "export", "inspection"),
    ("run", "api", "demo", "peer_llmcompressor", "peers", "compare", "table", "console", "cli", "__main__"),
)


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    return next(index for index, names in enumerate(LAYERS) if top in names)


def imports_of(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateur":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    for name, tree in modules().items():
        if name == "__init__":
            continue
        for imported in imports_of(tree):
            assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}, which lies above it"


def test_solvers_know_no_model():
    for name, tree in modules().items():
        if layer_of("solvers") == 0 and name.split(".")[0] in LAYERS[0]:
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert "Module" not in names, f"{name} touches nn.Module"


def test_no_branch_on_a_model_family():
    for name, tree in modules().items():
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "model_type" not in words, f"{name} looks at model_type"


def test_functions_and_files_stay_short():
    for name, tree in modules().items():
        source = SOURCE / (name.replace(".", "/") + ".py")
        assert len(source.read_text().splitlines()) <= MAX_FILE_LINES, f"{name} is too long"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and f"{name}.{node.name}" not in LONG_FUNCTIONS:
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {length} lines"


def test_no_broad_except_and_no_pickle():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{name} catches {caught}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), f"{name} imports pickle"


def test_every_public_thing_has_a_docstring():
    for name, tree in modules().items():
        assert ast.get_docstring(tree), f"{name} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_readme_maps_every_file_once():
    readme = (ROOT / "README.md").read_text()
    mapped = re.findall(r"^\| `([\w/]+\.py)` \|", readme, re.MULTILINE)
    files = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")]
    assert sorted(mapped) == sorted(files)


def test_readme_has_the_two_commands_on_one_line_each():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in lines if line.endswith("secateur demo")]) == 1
    assert len([line for line in lines if line.endswith("pytest -n 2")]) == 1


def test_generated_pages_are_up_to_date():
    for script in (
        "docs/make_cli.py",
        "docs/make_results.py",
        "docs/make_benchmarks.py",
        "docs/make_architectures.py",
        "docs/make_performance.py",
    ):
        done = subprocess.run(
            [sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"run `python {script}`: {done.stdout}{done.stderr}"


def test_public_api_resolves():
    import secateur

    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
