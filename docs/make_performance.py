"""Write docs/performance.md from benchmarks/results; or `--check` that it is current.

    python docs/make_performance.py

No number is typed by hand: each comes from a JSON that a script in benchmarks/ wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import table, write_or_check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def memory_table() -> str:
    """Runs x layers, in MB of anonymous memory, with the ratio of the last column to the first."""
    runs = read("memory")["runs"]
    layers = sorted({int(name.rsplit(", ", 1)[1].split()[0]) for name in runs if name.endswith("layers")})
    kinds = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in runs if name.endswith("layers")))
    rows = [["MB of model files", *(f"{runs[f'{kinds[0]}, {n} layers']['model_bytes'] / 1e6:.0f}" for n in layers), ""]]
    for kind in kinds:
        peaks = [runs[f"{kind}, {n} layers"]["peak_anonymous_bytes"] for n in layers]
        rows.append([kind, *(f"{peak / 1e6:.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.2f}"])
    return table(["peak MB", *(f"{n} layers" for n in layers), "ratio"], rows)


def large_line() -> str:
    run = read("memory")["runs"].get("sparsegpt, 4 GB")
    if run is None:
        return "A model of 4 GB: not measured (`--large`)."
    return (
        f"A model of {run['model_bytes'] / 1e9:.1f} GB on disk: peak {run['peak_anonymous_bytes'] / 1e9:.2f} GB, "
        f"`sparsegpt`."
    )


def memory_settings() -> str:
    s, where = read("memory")["settings"], read("memory")["environment"]
    return (
        f"Random Llamas in bf16, {s['wide']['hidden_size']} wide, {s['samples']} x {s['seq_len']} calibration tokens; "
        f"torch {where['torch']}, transformers {where['transformers']}, {where['platform']}."
    )


def kills_line() -> str:
    if not (RESULTS / "resume.json").is_file():
        return (
            "Twenty kills at random moments: not measured yet. `tests/test_store.py` kills the real command four times."
        )
    resume = read("resume")
    blocks = [kill["finished_blocks"] for kill in resume["kills"]]
    counts = ", ".join(f"{blocks.count(number)} after {number}" for number in sorted(set(blocks)))
    return (
        f"{len(blocks)} kills in {resume['runs']} runs of a model with {resume['layers']} blocks ({counts} finished blocks): "
        f"every run ended with the bits of one that was never stopped, and left no file behind."
    )


def page() -> str:
    """docs/performance.md."""
    return f"""# Performance

Written by `python docs/make_performance.py` from `benchmarks/results/*.json`; do not edit.

## Memory against the number of layers

`secateur prune MODEL OUT` in a process of its own. Peak of anonymous memory (`RssAnon`), which the system can't drop; pages of
the model's mapped files are not in it, the imports of torch and transformers are.

{memory_settings()}

{memory_table()}

`balanced` keeps one sequence's activations of all layers while it allocates.

{large_line()}

    python benchmarks/memory.py --large --out benchmarks/results/memory.json

## Runs that survive

kill -9 at random moments, and `--resume`:

{kills_line()}

    python benchmarks/resume.py --out benchmarks/results/resume.json

## Not measured yet

End to end against llm-compressor; solver time against matrix size beyond [results.md](results.md#solver-time); several processes;
any GPU.
"""


if __name__ == "__main__":
    write_or_check({PAGE: page()})
