"""One run by 1, 2 and 4 processes: the time each works, and how far the results lie apart.

    python benchmarks/processes.py --out benchmarks/results/processes.json

A random Llama is pruned by `secateur prune` in processes of one thread, started as torchrun starts them. Where the
machine has fewer cores than that, the wall time can't fall: the CPU time of the busiest process, less that of a start
with all imports, says how the work is divided.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments_of, write_result
from memory import WIDE, Case, write_model

from secateur.calibration.batches import BATCH_TOKENS

LAYERS, SAMPLES, LENGTH = 4, 64, 256
NUMBERS = (1, 2, 4)
RECIPES = {"sparsegpt": ("--solver", "sparsegpt"), "balanced": ("--recipe", "balanced")}
IMPORTS = (
    "import secateur.cli.app, secateur.api.pruning; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
)


def main() -> None:
    """Measure every number of processes and write one JSON."""
    arguments = arguments_of(__doc__)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", Case("divided", LAYERS, WIDE))
        start = min(cpu_seconds([[sys.executable, "-c", IMPORTS]])[0] for _ in range(3))
        for name, flags in RECIPES.items():
            errors: dict[int, list[float]] = {}
            for number in NUMBERS:
                out = Path(scratch) / f"{name}-{number}"
                began = time.perf_counter()
                seconds = [used - start for used in cpu_seconds([command(model, out, flags)] * number)]
                report = json.loads((out / "secateur.json").read_text(encoding="utf-8"))
                errors[number] = [matrix["relative_error"] for matrix in report["matrices"]]
                apart = [abs(a - b) / b for a, b in zip(errors[number], errors[1], strict=True)]
                runs[f"{name}, {number}"] = {
                    "wall_seconds": time.perf_counter() - began,
                    "cpu_seconds": seconds,
                    "tokens": [LENGTH * windows for windows in shares(report, number)],
                    "largest_difference_of_a_layer_error": max(apart),
                }
                print(name, number, runs[f"{name}, {number}"], flush=True)
    settings = {"layers": LAYERS, "samples": SAMPLES, "seq_len": LENGTH, "cores": os.cpu_count(), "start": start}
    write_result(arguments.out, {"settings": settings, "runs": runs})


def command(model: Path, out: Path, flags: tuple[str, ...]) -> list[str]:
    given = [sys.executable, "-m", "secateur", "prune", str(model), str(out), *flags]
    return [*given, "--samples", str(SAMPLES), "--seq-len", str(LENGTH)]


def shares(report: dict[str, Any], number: int) -> list[int]:
    """How many calibration windows each process had."""
    refit = report["recipe"]["refit"]
    size = (BATCH_TOKENS if refit is None else refit["step_tokens"]) // LENGTH
    return [size * len(range(rank, SAMPLES // size, number)) for rank in range(number)]


def cpu_seconds(commands: list[list[str]]) -> list[float]:
    """Run the commands together as the ranks of one group; the CPU time that each took."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank, command in enumerate(commands)
    ]
    seconds = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
        seconds.append(used(usage))
    return seconds


def used(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
