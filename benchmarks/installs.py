"""Install from an sdist, a wheel and an editable checkout, with and without a C compiler; which kernels are there.

    python benchmarks/installs.py --out benchmarks/results/installs.json

Works on a clone of the last commit. Dependencies come from this Python; secateur itself is installed without them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import arguments_of, write_result

ROOT = Path(__file__).parents[1]
ASK = "import secateur; from secateur.packed import kernels; print(secateur.__file__); print(kernels.description())"


def main() -> None:
    """Try every case, and write one JSON."""
    args = arguments_of(__doc__)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        without = environment_without_compiler(place / "bin")
        for compiler, environment in (("with a compiler", dict(os.environ)), ("without a compiler", without)):
            clone = place / compiler.replace(" ", "-")
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            built = clone / "dist"
            python("-m", "build", "--outdir", str(built), str(clone), environment=environment)
            (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
            found[f"wheel, {compiler}"] = {"file": wheel.name, **installed(str(wheel), clone / "wheel", environment)}
            found[f"sdist, {compiler}"] = installed(str(archive), clone / "sdist", environment)
            found[f"editable, {compiler}"] = editable(clone, environment)
            print(found, flush=True)
    write_result(args.out, {"installs": found})


def environment_without_compiler(folder: Path) -> dict[str, str]:
    """An environment whose PATH holds git alone, and no compiler."""
    folder.mkdir()
    (folder / "git").symlink_to("/usr/bin/git")
    return {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(folder)}


def python(*arguments: str, environment: dict[str, str]) -> str:
    """Run this Python; what it printed."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def installed(what: str, target: Path, environment: dict[str, str]) -> dict[str, str]:
    """Install to a folder, and ask which kernels are there."""
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(target), what, environment=environment)
    return answer(target, environment)


def editable(clone: Path, environment: dict[str, str]) -> dict[str, str]:
    """Install a checkout editable, in an environment that sees this Python's packages, and ask the same."""
    own = clone / "venv"
    python("-m", "venv", str(own), environment=environment)
    command = [str(own / "bin" / "pip"), "install", "-q", "--no-deps", "-e", str(clone)]
    subprocess.run(command, env=environment, check=True)
    return answer(clone / "src", environment)


def answer(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """What the secateur in a folder says of its kernels."""
    file, kernels = python("-c", ASK, environment=environment | {"PYTHONPATH": str(folder)}).splitlines()
    assert file.startswith(str(folder)), (file, folder)
    return {"kernels": kernels}


if __name__ == "__main__":
    main()
