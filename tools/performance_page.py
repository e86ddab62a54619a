"""docs/performance.md and its pictures from benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import DOCS, RESULTS, Picture, read_result, table
from scale_page import scale_table

# A recipe of llm-compressor, and ours to compare with it.
PEERS = (
    ("llmcompressor-sparsegpt", ("sparsegpt", "fast+shrinkage=0")),
    ("llmcompressor-wanda", ("wanda",)),
)


def memory_table() -> str:
    """Kinds of runs x layers, in MB of anonymous memory, with the ratio of the last column to the first."""
    runs = read_result("memory")["runs"]
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
    runs, lines = read_result("memory")["runs"], []
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
    run = read_result("memory")["runs"]["sparsegpt, 64 layers"]
    where = run["environment"]
    return (
        f"Random Llamas, and Mixtrals where there are experts (each a tensor in the files, fused as they are loaded), in "
        f"bf16, {run['widths']['hidden_size']} wide, {run['samples']} x {run['seq_len']} calibration tokens; "
        f"torch {where['torch']}, transformers {where['transformers']}."
    )


def kills_line() -> str:
    resume = read_result("resume")
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
    cells = read_result("compare/peers/compare")["cells"]
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
    runs = read_result("parts")["runs"]
    names = list(next(iter(runs.values()))["parts"])
    rows = [
        [method, *(f"{run['parts'][name]:.1f}" for name in names), f"{run['whole']:.1f}", f"{run['ratio']:.2f}"]
        for method, run in runs.items()
    ]
    return table(["seconds", *names, "whole run", "whole / sum"], rows)


def sizes_table() -> str:
    if not (RESULTS / "sizes.json").is_file():
        return "Not measured."
    rows, sizes = [], read_result("sizes")["rows"]
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
    return table(["matrix, 50%", "solver", "seconds", "time / sparsegpt", "error / sparsegpt", "of the peak"], rows)


def sizes_picture() -> str:
    return "![time of a solver](solvers.svg)\n\n" if (RESULTS / "sizes.json").is_file() else ""


def reference_table() -> str:
    if not (RESULTS / "reference.json").is_file():
        return "Not measured."
    found = read_result("reference")
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
    head = [f"{size} x {size}", "solver", "seconds", "time / reference", "error / reference", "operations", "reads"]
    return f"{table(head, rows)}\n\ntorch {where['torch']}, {where['device']}, {where['threads']} threads."


def processes_table() -> str:
    if not (RESULTS / "processes.json").is_file():
        return "Not measured."
    found = read_result("processes")
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
    head = ["recipe", "processes", "tokens of each", "CPU seconds, busiest", "of 1 process", "wall seconds"]
    return table([*head, "layer error change"], rows)


def busy_table() -> str:
    """Demos x quiet and busy, in seconds."""
    found = read_result("busy")
    rows = []
    for name in dict.fromkeys(cell.rsplit(", ", 1)[0] for cell in found["seconds"]):
        quiet, busy = (found["seconds"].get(f"{name}, {state}") for state in ("quiet", "busy"))
        shown = [f"{seconds:.0f}" if seconds else "" for seconds in (quiet, busy)]
        rows.append([name, *shown, f"{busy / quiet:.2f}" if quiet and busy else ""])
    return f"{table(['demo, wait policy', 'quiet, s', 'busy, s', 'busy / quiet'], rows)}\n\n{found['cores']} cores."


def page() -> str:
    """docs/performance.md."""
    return f"""# Performance

Written by `python tools/make_pages.py` from `benchmarks/results/*.json`; do not edit.

## What a run takes

{scale_table()}

    python benchmarks/scale.py --out benchmarks/results/scale.json

## Memory against the number of layers

`secateur prune MODEL OUT` in a separate process. Peak of anonymous memory (`RssAnon`), which the system can't drop; pages of
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

## Busy machines

`secateur demo` on a quiet machine, and next to a process on each core that never pauses. Short = fewer tokens. OpenMP threads
that spin while they wait (ACTIVE) take the cores from the threads that they wait for, so the command sets
`OMP_WAIT_POLICY=PASSIVE` where the variable is not set. `import secateur` sets nothing: set it yourself in a script.

{busy_table()}

    python benchmarks/busy.py --out benchmarks/results/busy.json

## End to end against llm-compressor

SmolLM2-135M, the same 32 x 512 tokens, 2 threads, one run at a time in one session. The peer runs in a separate environment
([how](benchmarks.md#other-libraries)); its time is that of `oneshot`, ours that of the whole run.

{peer_table()}

## A run against its parts

SmolLM2-135M at 50%, 32 x 512 tokens: three forward passes of every block and the Hessian updates, each timed alone in the
process of the run, and the run's own solver calls, with what writing back and measuring their weights takes.

{parts_table()}

    python benchmarks/parts.py --text TEXT --out benchmarks/results/parts.json

## Solvers against the size of the matrix

Factorisation of the Hessian included. *Of the peak* is flops a second over the rate of the fastest product of the run; flops
are counted up to 4096 columns. Square matrices up to 4096, and Llama-2-7B's widest one.

{sizes_table()}

{sizes_picture()}    python benchmarks/solvers.py --sizes --patterns 50% --out benchmarks/results/sizes.json

## Solvers against the SparseGPT authors' code

Their `fasterprune` on the same weights and Hessian, in the same run.

{reference_table()}

    git clone https://github.com/IST-DASLab/sparsegpt CLONE
    python benchmarks/reference.py --sparsegpt CLONE --out benchmarks/results/reference.json

## On a GPU

Not measured. `python tests/simulated_gpu/simulated_gpu.py` runs `tests/test_gpu.py` on a simulated GPU, which says nothing about
time. The columns *operations* and *reads* above do: each operation starts at least one kernel, and at each read of a single number
the CPU waits for the GPU. `python benchmarks/solvers.py --device cuda`, with `--sizes` too, and
`python benchmarks/reference.py --device cuda` run the solvers there, and
`python benchmarks/memory.py --cases llama-7b --device cuda` streams a random model of Llama-2-7B's shape through one.
"""


def pages() -> dict[Path, str]:
    """The page."""
    return {DOCS / "performance.md": page()}


def pictures() -> list[Picture]:
    """Memory, processes and solvers."""
    memory: dict[str, list[tuple[int, float]]] = {}
    for name, run in read_result("memory")["runs"].items():
        recipe, size = name.rsplit(", ", 1)
        if size.endswith(" layers"):
            memory.setdefault(recipe, []).append((int(size.split()[0]), run["peak_anonymous_bytes"] / 1e6))
    processes: dict[str, list[tuple[int, float]]] = {}
    for name, run in read_result("processes")["runs"].items():
        recipe, number = name.rsplit(", ", 1)
        processes.setdefault(recipe, []).append((int(number), max(run["cpu_seconds"])))
    rows = read_result("sizes")["rows"]
    sizes = {name: [(row["columns"], row["cases"][name]["seconds"]) for row in rows] for name in rows[0]["cases"]}
    return [
        Picture(DOCS / "memory.svg", memory, draw_memory),
        Picture(DOCS / "processes.svg", processes, draw_processes),
        Picture(DOCS / "solvers.svg", sizes, draw_sizes),
    ]


def draw_memory(axes: Any, data: dict[str, list[tuple[int, float]]]) -> None:
    """Peak memory against the number of layers."""
    for recipe, line in data.items():
        axes.plot(*zip(*line, strict=True), marker="o", label=recipe)
    axes.set(xlabel="layers", ylabel="peak MB", xscale="log")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    layers = [number for number, _ in next(iter(data.values()))]
    axes.set_xticks(layers, map(str, layers))
    axes.minorticks_off()
    axes.legend(frameon=False)


def draw_processes(axes: Any, data: dict[str, list[tuple[int, float]]]) -> None:
    """CPU time of the busiest process against their number, as a share of one alone."""
    for recipe, line in data.items():
        numbers, seconds = zip(*line, strict=True)
        axes.plot(numbers, [each / seconds[0] for each in seconds], marker="o", label=recipe)
        axes.set_xticks(numbers)
    axes.set(xlabel="processes", ylabel="CPU time, of one alone", ylim=(0, 1.1))
    axes.legend(frameon=False)


def draw_sizes(axes: Any, data: dict[str, list[tuple[int, float]]]) -> None:
    """Seconds of every solver against the columns of the matrix."""
    for solver, line in data.items():
        axes.plot(*zip(*line, strict=True), marker="o", label=solver)
    columns = [number for number, _ in next(iter(data.values()))]
    axes.set(xlabel="columns", ylabel="seconds", xscale="log", yscale="log")
    axes.set_xticks(columns, map(str, columns))
    axes.minorticks_off()
    axes.legend(frameon=False)
