"""kill -9 at random moments: does every run end with the bits of one that was never stopped?

    python benchmarks/resume.py --out benchmarks/results/resume.json

A random Llama of 8 layers is pruned by the real command; the process is killed at a moment drawn from the length of a
whole run, resumed, killed again where the next moment falls into it, and so on until it ends; 20 kills in all. Every
third waits for the saving to begin, which is short, and comes at a moment drawn from that.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments_of, write_result
from memory import LENGTH, WIDE, Case, write_model

KILLS, LAYERS, SAMPLES, SHARD = 20, 8, 4, "20MB"
SAVING_SECONDS = 0.25  # about


def main() -> None:
    """Kill, resume, compare, and write one JSON."""
    arguments = arguments_of(__doc__)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", Case("resumed", LAYERS, WIDE))
        started = time.perf_counter()
        subprocess.run(command(model, folder / "reference"), check=True, capture_output=True)
        whole = time.perf_counter() - started
        kills: list[dict[str, Any]] = []
        rounds = 0
        while len(kills) < KILLS:
            kills += one_run(model, folder / "out", whole, len(kills), chance)
            rounds += 1
            check_same(folder / "reference", folder / "out")
            leftovers = sorted(path.name for path in folder.iterdir() if path.name not in ("model", "reference", "out"))
            assert not leftovers, leftovers
            shutil.rmtree(folder / "out")
    result = {"layers": LAYERS, "kills": kills, "runs": rounds, "bit_identical": True, "seconds_uninterrupted": whole}
    write_result(arguments.out, result)


def command(model: Path, out: Path) -> list[str]:
    """The real command."""
    given = [sys.executable, "-m", "secateur", "prune", str(model), str(out), "--resume"]
    return [*given, "--samples", str(SAMPLES), "--seq-len", str(LENGTH), "--max-shard-size", SHARD]


def one_run(model: Path, out: Path, whole: float, before: int, chance: random.Random) -> list[dict[str, Any]]:
    """Kill and resume until the run ends, or there were enough kills with those before; what each found done."""
    kills: list[dict[str, Any]] = []
    while True:
        process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        number = before + len(kills)
        after = whole * chance.random() if number < KILLS else None
        if number < KILLS and number % 3 == 2:
            while process.poll() is None and not manifest_of(out).get("outcome"):
                time.sleep(0.002)
            after = SAVING_SECONDS * chance.random()
        try:
            _, errors = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            manifest = manifest_of(out)
            kills.append(
                {
                    "after_seconds": after,
                    "finished_blocks": len(manifest.get("blocks", ())),
                    "whole_shards": len(manifest["shards"]) if manifest.get("outcome") else None,
                    "published": (out / "config.json").exists(),
                }
            )
            print(kills[-1], flush=True)
            continue
        if process.returncode:
            raise RuntimeError(errors)
        return kills


def manifest_of(out: Path) -> dict[str, Any]:
    """What the journal says; nothing where there is none."""
    try:
        return json.loads((out.parent / f".{out.name}.secateur" / "manifest.json").read_text())
    except OSError:
        return {}


def check_same(reference: Path, out: Path) -> None:
    """Raise AssertionError unless both folders hold the same files and bits of weights."""
    names = sorted(path.name for path in reference.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert all((out / name).read_bytes() == (reference / name).read_bytes() for name in weights)


if __name__ == "__main__":
    main()
