"""Write docs/results.md from benchmarks/results; or `--check` that it is current.

    python docs/make_results.py

No number is typed by hand: each comes from a JSON that a script in benchmarks/ (or `secateur demo --json`) wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import table, write_or_check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
METHODS = ("magnitude", "wanda", "sparsegpt", "mrp")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def perplexity_table() -> str:
    """Methods x patterns, the dense model in the first row."""
    results = read("perplexity-smollm2")
    cells = results["cells"]
    patterns = sorted({name.split()[1] for name in cells if " " in name}, key=lambda text: (":" in text, text))
    rows = [["dense", *[f"{cells['dense']['perplexity']:.2f}"] * len(patterns)]]
    rows += [
        [method, *(f"{cells[f'{method} {pattern}']['perplexity']:.2f}" for pattern in patterns)] for method in METHODS
    ]
    return table(["perplexity", *patterns], rows)


def perplexity_settings() -> str:
    settings, where = read("perplexity-smollm2")["settings"], read("perplexity-smollm2")["environment"]
    return (
        f"SmolLM2-135M-Instruct, {settings['samples']} x {settings['seq_len']} calibration tokens of "
        f"{settings['calibration']}, evaluated on {settings['max_tokens']} tokens of {settings['text']} in windows of 1024, "
        f"seed {settings['seed']}, one run; torch {where['torch']}, transformers {where['transformers']}, "
        f"{where['threads']} threads."
    )


def time_table() -> str:
    cells = read("perplexity-smollm2")["cells"]
    rows = [
        [name, f"{cell['mean_layer_error']:.5f}", f"{cell['seconds']:.0f}"]
        for name, cell in sorted(cells.items())
        if "seconds" in cell
    ]
    return table(["run", "mean relative layer error", "seconds"], rows)


def golden_table() -> str:
    golden = read("golden")
    columns = list(dict.fromkeys(key for cell in golden.values() for key in cell))
    rows = []
    for name, cell in golden.items():
        unit = cell["reference sparsegpt"]
        rows.append([name, *(f"{cell[key] / unit:.4f}" if key in cell else "" for key in columns)])
    return table(["matrix", *columns], rows)


def solver_table() -> str:
    rows = []
    for row in read("solvers")["rows"]:
        for name, case in row["cases"].items():
            rows.append(
                [
                    f"{row['rows']} x {row['columns']}",
                    row["pattern"],
                    name,
                    f"{case['seconds']:.3f}",
                    f"{case['time_to_sparsegpt']:.2f}",
                    f"{case['error_to_sparsegpt']:.3f}",
                    str(case["iterations"] or ""),
                ]
            )
    return table(
        ["matrix", "pattern", "method", "seconds", "time / sparsegpt", "error / sparsegpt", "iterations"], rows
    )


def refit_table() -> str:
    rows = []
    for name, ways in read("refit").items():
        for way, gaps in ways.items():
            rows.append([name, way, *("more than 80" if count is None else str(count) for count in gaps.values())])
    gaps = list(next(iter(next(iter(read("refit").values())).values())))
    return table(["matrix", "conjugate gradients", *(f"gap {gap}" for gap in gaps)], rows)


def demo_lines() -> str:
    demo = read("demo")
    models, summary = demo["models"], demo["report"]["summary"]
    rows = [
        [name, f"{figures['perplexity']:.2f}", figures["continuation"].replace("\n", " ").replace("|", "\\|")]
        for name, figures in models.items()
    ]
    return (
        table(["model", "perplexity", "continuation"], rows)
        + f"\n\n{summary['pruned_matrices']} matrices, {summary['share_of_parameters']:.1%} of the model's weights, pruned in "
        f"{summary['seconds']:.0f} s."
    )


def page() -> str:
    """docs/results.md."""
    return f"""# Results

Written by `python docs/make_results.py` from `benchmarks/results/*.json`; do not edit. `TEXTS` below is a folder with
`wikitext2-valid.txt` and `wikitext2-test.txt` (WikiText-2, detokenised), `GOLDEN` one with the golden matrices.

## Perplexity of single methods

No refit of blocks, no allocation; [benchmarks.md](benchmarks.md) has the presets.

{perplexity_settings()}

{perplexity_table()}

{time_table()}

    python benchmarks/perplexity.py --calibration TEXTS/wikitext2-valid.txt --text TEXTS/wikitext2-test.txt --out benchmarks/results/perplexity-smollm2.json

The seconds are of a machine that did other work beside; compare solvers by the table below.

## Solver time

{read("solvers")["environment"]["threads"]} CPU threads, factorisation of the Gram matrix included, median of three runs in turn.

{solver_table()}

    python benchmarks/solvers.py --out benchmarks/results/solvers.json

On a GPU: not measured (`--device cuda` runs it there).

## Layer error on real matrices

Relative layer error over that of the SparseGPT authors' code. `reference sparsegpt_mask_refit` is that mask with all kept
weights refit by direct solves; `reference alps` the ALPS authors' code.

{golden_table()}

    python benchmarks/golden.py --golden GOLDEN --out benchmarks/results/golden.json

## Iterations of the full-row refit

First iteration within each gap of the optimal loss (float64, against direct solves); one product of the size of W H each.

{refit_table()}

    python benchmarks/refit.py --golden GOLDEN --out benchmarks/results/refit.json

## The demo

{demo_lines()}

    secateur demo --effort best --json > benchmarks/results/demo.json
"""


if __name__ == "__main__":
    write_or_check({PAGE: page()})
