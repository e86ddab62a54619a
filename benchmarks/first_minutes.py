"""From `pip install` to the first own pruned model, evaluated, packed and seen: the minutes of each step.

    python benchmarks/first_minutes.py --model FOLDER --out benchmarks/results/first_minutes.json

Makes a new virtual environment, installs this checkout, and runs the commands of the README on a model folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from common import arguments_of, write_result

ROOT = Path(__file__).parents[1]
FEW = ("--samples", "8", "--seq-len", "512")


def main() -> None:
    """Time every step."""
    args = arguments_of(__doc__, model="")
    rows = []
    with TemporaryDirectory() as scratch:
        python = Path(scratch) / "venv" / "bin" / "python"
        secateur = str(python.with_name("secateur"))
        pruned, packed = Path(scratch) / "pruned", Path(scratch) / "packed"
        steps: dict[str, list[str]] = {
            "install": [sys.executable, "-m", "venv", str(python.parents[1])],
            "install, pip": [str(python), "-m", "pip", "install", "-q", str(ROOT)],
            "prune": [secateur, "prune", args.model, str(pruned), *FEW],
            "eval": [secateur, "eval", str(pruned), "--against", args.model, "--max-tokens", "4096", "--record"],
            "pack": [secateur, "pack", str(pruned), str(packed)],
        }
        for name, command in steps.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment())
            rows.append({"step": name, "seconds": time.perf_counter() - started})
            print(rows[-1], flush=True)
        assert (pruned / "report.html").is_file()
    total = sum(row["seconds"] for row in rows)
    write_result(args.out, {"model": Path(args.model).name, "steps": rows, "minutes": total / 60})


def environment() -> dict[str, str]:
    """The environment without what points to this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


if __name__ == "__main__":
    main()
