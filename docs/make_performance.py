"""Write docs/performance.md and its pictures from benchmarks/results; or `--check` that the page is current.

    python docs/make_performance.py

No number is typed by hand: each comes from a JSON that a script in benchmarks/ wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import picture, table, write_or_check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
MEMORY, PROCESSES, SOLVERS = (ROOT / "docs" / f"{name}.svg" for name in ("memory", "processes", "solvers"))
# A recipe of llm-compressor's, and ours that are held against it.
PEERS = (
    ("llmcompressor-sparsegpt", ("sparsegpt", "fast")),
    ("llmcompressor-wanda", ("wanda",)),
)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).with_suffix(".json").read_text(encoding="utf-8"))


def memory_table() -> str:
    """Kinds of runs x layers, in MB of anonymous memory, with the ratio of the last column to the first."""
    runs = read("memory")["runs"]
    layers = sorted({int(name.rsplit(", ", 1)[1].split()[0]) for name in runs if name.endswith("layers")})
    kinds = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in runs if name.endswith("layers")))
    rows = []
    for kind in kinds:
        peaks, sizes = (
            [runs[f"{kind}, {n} layers"][f"{what}_bytes"] for n in layers] for what in ("peak_anonymous", "model")
        )
        files = f"{sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f}"
        rows.append([kind, files, *(f"{peak / 1e6:.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.2f}"])
    return table(["peak MB", "model files, MB", *(f"{n} layers" for n in layers), "ratio"], rows)


def large_lines() -> str:
    """The model of 4 GB, as it is and in a process that may hold less."""
    runs, lines = read("memory")["runs"], []
    for name, where in (
        ("sparsegpt, 4 GB", ""),
        ("sparsegpt, capped, 4 GB", " in a memory cgroup of {limit:.1f} GB, pages of files included"),
    ):
        if run := runs.get(name):
            where = where.format(limit=run.get("limit_bytes", 0) / 1e9)
            size, peak = (run[f"{what}_bytes"] / 1e9 for what in ("model", "peak_anonymous"))
            lines.append(f"A model of {size:.1f} GB on disk{where}, by `sparsegpt`: peak {peak:.2f} GB.")
    if run := runs.get("magnitude of q_proj, capped, 2 GB, 6 batches"):
        size, read_bytes = (run[f"{what}_bytes"] / 1e9 for what in ("model", "read"))
        lines.append(
            f"\nA model of {size:.1f} GB in the same cgroup, on 6 batches of 2048 tokens, `q_proj` alone and by "
            f"`magnitude`: {read_bytes:.0f} GB were read from the disk, {read_bytes / size:.1f} times the model. The dense "
            f"pass alone would read it 6 times if each batch went through the model on its own."
        )
    return "\n".join(lines)


def memory_settings() -> str:
    run = read("memory")["runs"]["sparsegpt, 64 layers"]
    where = run["environment"]
    return (
        f"Random Llamas, and Mixtrals where there are experts (each a tensor in the files, fused as they are loaded), in "
        f"bf16, {run['widths']['hidden_size']} wide, {run['samples']} x {run['seq_len']} calibration tokens; "
        f"torch {where['torch']}, transformers {where['transformers']}."
    )


def kills_line() -> str:
    resume = read("resume")
    pruning, saving, ending = [], [], []
    for kill in resume["kills"]:
        (saving if kill["whole_shards"] is not None else ending if kill["published"] else pruning).append(kill)
    return (
        f"{len(resume['kills'])} kills in {resume['runs']} runs of a model with {resume['layers']} blocks: {len(pruning)} "
        f"while it was loaded and pruned ({_counts(pruning, 'finished_blocks')} finished blocks), {len(saving)} while it "
        f"was saved ({_counts(saving, 'whole_shards')} whole shards), {len(ending)} when it was in its place. Every run "
        f"ended with the bits of one that was never stopped, and left no file behind."
    )


def _counts(kills: list[dict[str, Any]], what: str) -> str:
    found = [kill[what] for kill in kills]
    return ", ".join(f"{found.count(number)} after {number}" for number in sorted(set(found)))


def peer_table() -> str:
    """Seconds and memory of a run against llm-compressor's, from the comparison that was timed."""
    cells = read("compare/peers/compare.json")["cells"]
    by_name = {key.rsplit(" ", 2)[0]: cell for key, cell in cells.items() if key.endswith(" 50% 0")}
    rows = []
    for peer, ours in PEERS:
        if peer not in by_name:
            return "Not measured."
        for name in (peer, *ours):
            cell, base = by_name[name], by_name[peer]
            rows.append(
                [
                    name,
                    f"{cell['seconds']:.0f}",
                    f"{cell['seconds'] / base['seconds']:.2f}",
                    f"{cell['peak_memory'] / 1e9:.2f}",
                    f"{cell['perplexity']['wikitext2-test.txt']:.2f}",
                ]
            )
    return table(["50%", "seconds", "time / peer's", "peak GB", "perplexity"], rows)


def parts_table() -> str:
    if not (RESULTS / "parts.json").is_file():
        return "Not measured."
    runs = read("parts")["runs"]
    names = list(next(iter(runs.values()))["parts"])
    rows = [
        [method, *(f"{run['parts'][name]:.1f}" for name in names), f"{run['whole']:.1f}", f"{run['ratio']:.2f}"]
        for method, run in runs.items()
    ]
    return table(["seconds", *names, "whole run", "whole / sum"], rows)


def sizes_table() -> str:
    if not (RESULTS / "sizes.json").is_file():
        return "Not measured."
    rows, sizes = [], read("sizes")["rows"]
    peak = max(row["flops_of_one_product"] / row["seconds_of_one_product"] for row in sizes)
    for row in sizes:
        for method, case in row["cases"].items():
            share = f"{case['flops'] / case['seconds'] / peak:.0%}" if case["flops"] else ""
            rows.append(
                [
                    f"{row['rows']} x {row['columns']}",
                    method,
                    f"{case['seconds']:.2f}",
                    f"{case['time_to_sparsegpt']:.2f}",
                    f"{case['error_to_sparsegpt']:.3f}",
                    share,
                ]
            )
    return table(["matrix, 50%", "method", "seconds", "time / sparsegpt", "error / sparsegpt", "of the peak"], rows)


def sizes_picture() -> str:
    return "![time of a solver](solvers.svg)\n\n" if (RESULTS / "sizes.json").is_file() else ""


def reference_table() -> str:
    if not (RESULTS / "reference.json").is_file():
        return "Not measured."
    found = read("reference")
    rows = [
        [
            row["pattern"],
            name,
            f"{case['seconds']:.1f}",
            f"{case['time_to_reference']:.2f}",
            f"{case['error_to_reference']:.3f}",
            f"{case['operations']:,}",
            f"{case['reads']:,}",
        ]
        for row in found["rows"]
        for name, case in row["cases"].items()
    ]
    size, where = found["size"], found["environment"]
    head = [f"{size} x {size}", "method", "seconds", "time / reference", "error / reference", "operations", "reads"]
    return f"{table(head, rows)}\n\ntorch {where['torch']}, {where['device']}, {where['threads']} threads."


def processes_table() -> str:
    if not (RESULTS / "processes.json").is_file():
        return "Not measured."
    found = read("processes")
    rows = []
    for name, run in found["runs"].items():
        recipe, number = name.rsplit(", ", 1)
        alone = max(found["runs"][f"{recipe}, 1"]["cpu_seconds"])
        rows.append(
            [
                recipe,
                number,
                " + ".join(map(str, run["tokens"])),
                f"{max(run['cpu_seconds']):.0f}",
                f"{max(run['cpu_seconds']) / alone:.2f}",
                f"{run['wall_seconds']:.0f}",
                f"{run['largest_difference_of_a_layer_error']:.0e}",
            ]
        )
    head = ["recipe", "processes", "tokens of each", "CPU seconds of the busiest", "of one alone", "wall seconds"]
    return table([*head, "layer errors apart"], rows)


def page() -> str:
    """docs/performance.md."""
    return f"""# Performance

Written by `python docs/make_performance.py` from `benchmarks/results/*.json`; do not edit.

## Memory against the number of layers

`secateur prune MODEL OUT` in a process of its own. Peak of anonymous memory (`RssAnon`), which the system can't drop; pages of
the model's mapped files are not in it, the imports of torch and transformers are.

{memory_settings()}

{memory_table()}

![peak memory](memory.svg)

{large_lines()}

    python benchmarks/memory.py --cases layers experts large --out benchmarks/results/memory.json
    python benchmarks/memory.py --cases large reads --cgroup FOLDER --out benchmarks/results/memory.json

## Runs that survive

kill -9 at random moments, and `--resume`:

{kills_line()}

    python benchmarks/resume.py --out benchmarks/results/resume.json

## Several processes

`torchrun --nproc-per-node N -m secateur prune ...` deals the calibration batches and the matrices of a block out to N processes.
Here each has one thread, on a machine of two cores: with four the wall time can't fall, the CPU time of each can. What every
process does for itself stays (loading, the steps of the refit, rounding what it was sent).

{processes_table()}

![CPU time of a process](processes.svg)

    python benchmarks/processes.py --out benchmarks/results/processes.json

## End to end against llm-compressor

SmolLM2-135M, the same 32 x 512 tokens, 2 threads, one run at a time in one session. The peer runs in an environment of its own
([how](benchmarks.md#peers)); its time is that of `oneshot`, ours that of the whole run.

{peer_table()}

## A run against its parts

SmolLM2-135M at 50%, 32 x 512 tokens: three forward passes of every block, the Gram updates, and the solver calls, each timed
alone in the process of the run.

{parts_table()}

    python benchmarks/parts.py --text TEXT --out benchmarks/results/parts.json

## Solvers against the size of the matrix

Factorisation of the Gram matrix included. *Of the peak* is flops a second over the rate of the fastest product of the run; flops
are counted up to 4096 columns. Square matrices up to 4096, and Llama-2-7B's widest one.

{sizes_table()}

{sizes_picture()}    python benchmarks/solvers.py --sizes --patterns 50% --out benchmarks/results/sizes.json

## Solvers against the SparseGPT authors' code

Their `fasterprune` on the same weights and Gram matrix, in the same run.

{reference_table()}

    git clone https://github.com/IST-DASLab/sparsegpt CLONE
    python benchmarks/reference.py --sparsegpt CLONE --out benchmarks/results/reference.json

## On a GPU

Not measured. `tests/test_gpu.py` runs the code on a pretended one, which says nothing of time; what can be said of that
without one are the last columns of the table above: operations, of which each starts a kernel at least, and reads of single
numbers, at which the CPU waits for the GPU. `python benchmarks/solvers.py --device cuda`, with `--sizes` too, and
`python benchmarks/reference.py --device cuda` run the solvers there, and
`python benchmarks/memory.py --cases llama-7b --device cuda` streams a random model of Llama-2-7B's shape through one.
"""


def draw_memory() -> None:
    """Peak memory against the number of layers."""
    with picture(MEMORY) as axes:
        points: dict[str, list[tuple[int, float]]] = {}
        for name, run in read("memory")["runs"].items():
            recipe, size = name.rsplit(", ", 1)
            if size.endswith(" layers"):
                points.setdefault(recipe, []).append((int(size.split()[0]), run["peak_anonymous_bytes"] / 1e6))
        for recipe, line in points.items():
            axes.plot(*zip(*line, strict=True), marker="o", label=recipe)
        axes.set(xlabel="layers", ylabel="peak MB", xscale="log")
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
        layers = [number for number, _ in next(iter(points.values()))]
        axes.set_xticks(layers, map(str, layers))
        axes.minorticks_off()
        axes.legend(frameon=False)


def draw_processes() -> None:
    """CPU time of the busiest process against their number, as a share of one alone."""
    with picture(PROCESSES) as axes:
        points: dict[str, list[tuple[int, float]]] = {}
        for name, run in read("processes")["runs"].items():
            recipe, number = name.rsplit(", ", 1)
            points.setdefault(recipe, []).append((int(number), max(run["cpu_seconds"])))
        for recipe, line in points.items():
            numbers, seconds = zip(*line, strict=True)
            axes.plot(numbers, [each / seconds[0] for each in seconds], marker="o", label=recipe)
            axes.set_xticks(numbers)
        axes.set(xlabel="processes", ylabel="CPU time, of one alone", ylim=(0, 1.1))
        axes.legend(frameon=False)


def draw_sizes() -> None:
    """Seconds of every solver against the columns of the matrix."""
    with picture(SOLVERS) as axes:
        rows = read("sizes")["rows"]
        for method in rows[0]["cases"]:
            columns, seconds = [row["columns"] for row in rows], [row["cases"][method]["seconds"] for row in rows]
            axes.plot(columns, seconds, marker="o", label=method)
        axes.set(xlabel="columns", ylabel="seconds", xscale="log", yscale="log")
        axes.set_xticks(columns, map(str, columns))
        axes.minorticks_off()
        axes.legend(frameon=False)


if __name__ == "__main__":
    write_or_check({PAGE: page()})
    draw_memory()
    draw_processes()
    if (RESULTS / "sizes.json").is_file():
        draw_sizes()
