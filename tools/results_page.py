"""docs/results.md from benchmarks/results."""

from __future__ import annotations

from pathlib import Path

from pages import DOCS, read_result, table


def pages() -> dict[Path, str]:
    """The page."""
    return {DOCS / "results.md": page()}


def golden_table() -> str:
    golden = read_result("golden")
    columns = list(dict.fromkeys(key for cell in golden.values() for key in cell))
    rows = []
    for name, cell in golden.items():
        unit = cell["reference sparsegpt"]
        rows.append([name, *(f"{cell[key] / unit:.4f}" if key in cell else "" for key in columns)])
    return table(["matrix", *columns], rows)


def solver_table() -> str:
    rows = []
    for row in read_result("solvers")["rows"]:
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
        ["matrix", "pattern", "solver", "seconds", "time / sparsegpt", "error / sparsegpt", "iterations"], rows
    )


def refit_table() -> str:
    rows = []
    for name, ways in read_result("refit").items():
        for way, gaps in ways.items():
            rows.append([name, way, *("more than 80" if count is None else str(count) for count in gaps.values())])
    gaps = list(next(iter(next(iter(read_result("refit").values())).values())))
    return table(["matrix", "conjugate gradients", *(f"gap {gap}" for gap in gaps)], rows)


def demo_lines() -> str:
    demo = read_result("demo")
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

Written by `python tools/make_pages.py` from `benchmarks/results/*.json`; do not edit. `GOLDEN` is a folder with the golden
matrices. Perplexities are in [benchmarks.md](benchmarks.md).

## Solver time

{read_result("solvers")["environment"]["threads"]} CPU threads, factorisation of the Hessian included, median of three runs in turn.

{solver_table()}

    python benchmarks/solvers.py --out benchmarks/results/solvers.json

On a GPU: not measured (`--device cuda` runs it there).

## Layer error on real matrices

Relative layer error over that of the SparseGPT authors' code. `reference sparsegpt_mask_refit` is that mask with all kept
weights refit by direct solves; `reference alps` the ALPS authors' code.

{golden_table()}

    python benchmarks/golden.py --golden GOLDEN --out benchmarks/results/golden.json

## Iterations of the full-row refit

First iteration within each gap of the optimal loss (float64, against direct solves); each iteration is one product of the size of W H.

{refit_table()}

    python benchmarks/refit.py --golden GOLDEN --out benchmarks/results/refit.json

## The demo

{demo_lines()}

    secateur demo --json > benchmarks/results/demo.json
"""
