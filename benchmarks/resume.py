"""kill -9 at random moments: does every run end with the bits of one that was never stopped?

    python benchmarks/resume.py --out benchmarks/results/resume.json

A random Llama of 8 layers is pruned by the real command; the process is killed at a moment drawn from the length of a
whole run, resumed, killed again where the next moment falls into it, and so on until it ends; 20 kills in all.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import LENGTH, SAMPLES, WIDE, write_model

from secateur.export import environment

KILLS, LAYERS = 20, 8


def main() -> None:
    """Kill, resume, compare, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", LAYERS, WIDE)
        started = time.perf_counter()
        subprocess.run(command(model, folder / "reference"), check=True, capture_output=True)
        whole = time.perf_counter() - started
        kills: list[dict[str, Any]] = []
        rounds = 0
        while len(kills) < KILLS:
            kills += one_run(model, folder / "out", whole, KILLS - len(kills), chance)
            rounds += 1
            check_same(folder / "reference", folder / "out")
            leftovers = sorted(path.name for path in folder.iterdir() if path.name not in ("model", "reference", "out"))
            assert not leftovers, leftovers
            shutil.rmtree(folder / "out")
    result = {"layers": LAYERS, "kills": kills, "runs": rounds, "bit_identical": True, "seconds_uninterrupted": whole}
    arguments.out.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n")


def command(model: Path, out: Path) -> list[str]:
    """The real command."""
    given = [sys.executable, "-m", "secateur", "prune", str(model), str(out), "--resume"]
    return [*given, "--samples", str(SAMPLES), "--seq-len", str(LENGTH)]


def one_run(model: Path, out: Path, whole: float, most: int, chance: random.Random) -> list[dict[str, Any]]:
    """Kill and resume until the run ends, `most` times at most; what was finished at each kill."""
    kills: list[dict[str, Any]] = []
    while True:
        process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        after = whole * chance.random() if len(kills) < most else None
        try:
            _, errors = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            manifest = out / ".secateur" / "manifest.json"
            blocks = len(json.loads(manifest.read_text())["blocks"]) if manifest.exists() else 0
            kills.append({"after_seconds": after, "finished_blocks": blocks})
            print(kills[-1], flush=True)
            continue
        if process.returncode:
            raise RuntimeError(errors)
        return kills


def check_same(reference: Path, out: Path) -> None:
    """Raise AssertionError unless both folders hold the same files and bits."""
    assert sorted(path.name for path in reference.iterdir()) == sorted(path.name for path in out.iterdir())
    assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
