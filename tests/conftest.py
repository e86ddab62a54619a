"""Shared fixtures. Shapes and dtypes in signatures are checked at run time, except in tests of whole runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import config, install_import_hook

# Before anything imports huggingface_hub: no test asks the real hub, or writes to the user's account.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": os.devnull}
os.environ.pop("HF_TOKEN", None)

# Before anything imports secateur: annotations become checks, in every module that names shapes. Checks of the others,
# some of which see every operation of torch, would take a third of the suite's time.
SOURCE = Path(__file__).parents[1] / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in (SOURCE / "secateur").rglob("*.py")
    if "from jaxtyping import" in path.read_text()
]
install_import_hook(MODULES, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from markupsafe import Markup  # noqa: E402

from secateur.reporting import charts  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Xdist runs two workers on two cores."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for commands the tests start


DRAW = charts._svg


@pytest.fixture(autouse=True, scope="session")
def _no_charts() -> Iterator[None]:
    """Charts take half of the time of a tiny run: who looks at them asks for `drawn_charts`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(charts, "_svg", lambda _figure, alt: Markup('<svg aria-label="{}"></svg>').format(alt))
        yield


@pytest.fixture(scope="module")
def drawn_charts() -> Iterator[None]:
    """Draw charts in the tests of a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(charts, "_svg", DRAW)
        yield


@pytest.fixture(scope="module")
def unchecked_shapes() -> Iterator[None]:
    """For modules of whole runs, a sixth of whose time the checks would take: other tests call the same functions."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden figures and real texts next to the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: golden figures and real texts are kept next to the checkout")
    return SHARED


@pytest.fixture
def main(monkeypatch, capsys):
    """The command in this process: gives exit code, stdout and stderr."""
    from secateur.cli import app as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A folder of this test alone for the Python code of models; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def forget():
        for name in [each for each in sys.modules if each.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    yield folder
    forget()


@pytest.fixture
def cells_here(monkeypatch):
    """Run cells in this process: a fresh one imports for seconds."""
    monkeypatch.setattr("secateur.comparison.compare.run_in_own_process", lambda run, *arguments: run(*arguments))


@pytest.fixture
def measured_here(monkeypatch):
    """Let `bench` measure in this process, for the same reason."""
    from secateur.evaluation import speed

    monkeypatch.setattr(speed, "_measured", lambda folder, numbers: speed.measure_here(folder, *numbers))


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, so that none runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let an idle process take tests from a busy one: tests differ by a factor of a thousand."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
