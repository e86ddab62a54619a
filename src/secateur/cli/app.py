"""The commands: parse, call the API, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from secateur.cli import deployment, flags
from secateur.cli.console import (
    note,
    print_coverage,
    print_dry_run,
    print_inspection,
    print_json,
    print_notices,
    print_pairs,
    print_report,
    print_speeds,
    resume_hint,
    show,
    show_table,
)
from secateur.cli.process import prepare_process, run_explained
from secateur.cli.progress import progress_shown
from secateur.errors import SecateurError
from secateur.storage.paths import user_path

MOST_THREADS = 8  # for each core; with many thousands, libraries crash

app = typer.Typer(
    name="secateur",
    help="Prune foundation models in one shot, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def secateur(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune foundation models in one shot, without retraining."""


@app.command()
def prune(
    model: flags.Model,
    out: flags.Out,
    recipe: flags.RecipeName = None,
    pattern: flags.PatternText = None,
    solver: flags.SolverName = None,
    settings: flags.Settings = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    calibration: flags.Calibration = None,
    text_field: flags.TextField = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    seed: flags.Seed = None,
    overwrite: flags.Overwrite = False,
    resume: flags.Resume = False,
    max_shard_size: flags.ShardSize = "5GB",
    push_to_hub: flags.PushToHub = False,
    dry_run: flags.DryRun = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    device: flags.Device = None,
    threads: flags.Threads = None,
    max_memory: flags.MaxMemory = None,
    offload_dir: flags.OffloadDir = None,
    trust_remote_code: flags.RemoteCode = False,
    allow_pickle: flags.Pickle = False,
) -> None:
    """Prune MODEL and save it to OUT. `secateur recipe` shows every other option."""
    _use_threads(threads)
    import secateur as api
    from secateur.checkpoints.hub import check_can_push
    from secateur.recipe.settings import parse_settings
    from secateur.runtime import distributed

    asked: dict[str, Any] = {
        "recipe": recipe, "pattern": pattern, "solver": solver, "settings": parse_settings(settings or []),
        "include": include or (), "exclude": exclude or (), "calibration": calibration, "text_field": text_field,
        "samples": samples, "seq_len": seq_len, "seed": seed, "max_memory": max_memory, "offload_dir": offload_dir,
        "device": device, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
    }  # fmt: skip
    asked |= {"overwrite": overwrite, "resume": resume, "max_shard_size": max_shard_size}
    if dry_run:
        if push_to_hub:
            check_can_push(out.name)
        with progress_shown(not quiet) as progress:
            found = api.dry_run(model, out, progress=progress, **asked)
        print_notices([] if quiet else found.notices)
        print_json(found.to_dict()) if as_json else print_dry_run(found)
        return
    with distributed.process_group(device):
        main_rank = distributed.is_main()
        with progress_shown(main_rank and not quiet) as progress, resume_hint(out, main_rank):
            report = api.prune(model, out, progress=progress, push_to_hub=push_to_hub, **asked)
    if not main_rank:
        return
    print_notices([] if quiet else report.notices)
    if as_json:
        print_json(report.to_dict())
    elif not quiet:
        print_report(report)


@app.command("eval")
def evaluate(
    model: flags.Model,
    text: flags.Text = None,
    text_field: flags.EvalTextField = None,
    seq_len: flags.EvalSeqLen = None,
    max_tokens: flags.MaxTokens = None,
    tasks: flags.Tasks = None,
    task_dir: flags.TaskDir = None,
    task_limit: flags.TaskLimit = None,
    against: flags.Against = None,
    record: flags.Record = False,
    as_json: flags.Json = False,
    device: flags.Device = None,
    threads: flags.Threads = None,
    trust_remote_code: flags.RemoteCode = False,
    allow_pickle: flags.Pickle = False,
) -> None:
    """Perplexity of MODEL on a text, in disjoint windows; divergence from a dense model; zero-shot tasks."""
    _use_threads(threads)
    import secateur as api

    with progress_shown() as progress:
        figures = api.evaluate(
            model,
            text,
            text_field=text_field,
            seq_len=seq_len,
            max_tokens=max_tokens,
            tasks=flags.split_list(tasks),
            task_dir=task_dir,
            task_limit=task_limit,
            against=against,
            record=record,
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
    model: flags.Model,
    recipes: Annotated[
        str,
        flags.flag(
            "Recipes, files, solvers, with commas; settings after a plus: best+refit.epochs=2.", flags.WHAT, "NAMES"
        ),
    ] = "sparsegpt,fast,balanced,best",
    patterns: Annotated[str, flags.flag("Patterns, with commas.", flags.WHAT, "PATTERNS")] = "50%,2:4",
    seeds: Annotated[str, flags.flag("Seeds, with commas.", flags.WHAT, "NUMBERS")] = "0",
    out: Annotated[
        Path, flags.flag("Folder of the results; cells in it are not run again.", flags.OUTPUT, "DIR")
    ] = Path("comparison"),
    overwrite: Annotated[
        bool, flags.flag("Begin a stopped cell again where it can't go on.", flags.OUTPUT, name="--overwrite")
    ] = False,
    calibration: flags.Calibration = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    text_field: flags.FieldOfTexts = None,
    text: flags.Texts = None,
    eval_seq_len: flags.EvalSeqLen = None,
    max_tokens: flags.MaxTokens = None,
    tasks: flags.Tasks = None,
    task_dir: flags.TaskDir = None,
    task_limit: flags.TaskLimit = None,
    divergence: flags.Divergence = False,
    task_seeds: Annotated[
        str | None, flags.flag("Seeds whose cells run the tasks (all).", flags.EVALUATION, "NUMBERS")
    ] = None,
    peer_python: Annotated[
        Path | None, flags.flag("Python with llmcompressor, for llmcompressor-sparsegpt.", flags.MACHINE, "FILE")
    ] = None,
    as_json: flags.Json = False,
    device: flags.Device = None,
    threads: flags.Threads = None,
    trust_remote_code: flags.RemoteCode = False,
    allow_pickle: flags.Pickle = False,
) -> None:
    """Prune MODEL by several recipes, and tabulate perplexity, tasks, layer error, time and memory.

    Writes compare.json (every cell), compare.csv and compare.html to --out. Run it again to go on where it stopped.
    """
    _use_threads(threads)
    out = user_path(out)
    from secateur.comparison.cell import DEFAULT_SAMPLES, ComparisonSettings
    from secateur.comparison.compare import compare as run
    from secateur.comparison.page import write_pages
    from secateur.comparison.table import tables

    settings = ComparisonSettings(
        model,
        calibration=calibration,
        samples=DEFAULT_SAMPLES if samples is None else samples,
        seq_len=seq_len,
        text_field=text_field,
        texts=tuple(text or ()),
        eval_seq_len=eval_seq_len,
        max_tokens=max_tokens,
        tasks=flags.split_list(tasks),
        task_dir=None if task_dir is None else str(task_dir),
        task_limit=task_limit,
        divergence=divergence,
        overwrite=overwrite,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    comparison = run(
        settings,
        flags.some(recipes, "recipes"),
        flags.some(patterns, "patterns"),
        flags.numbers(seeds, "seeds"),
        out,
        peer_python,
        None if task_seeds is None else flags.numbers(task_seeds, "task_seeds"),
        say=note,
        show=lambda table: write_pages(table, out),
        watched=progress_shown,
    )
    write_pages(comparison, out)
    if as_json:
        print_json(comparison.to_dict())
        return
    for pattern, rows in tables(comparison).items():
        show_table(rows[0], rows[1:], f"{model} at {pattern}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder; with --coverage any model.")],
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Run the model on a few tokens and list what would be pruned.")
    ] = False,
    matrices: Annotated[bool, typer.Option("--matrices", help="List every matrix, not only every kind.")] = False,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    as_json: flags.Json = False,
    device: flags.Device = None,
    trust_remote_code: flags.RemoteCode = False,
    allow_pickle: flags.Pickle = False,
) -> None:
    """Zeros of MODEL's matrices; exit code 1 if the checkpoint breaks its recorded patterns.

    With --coverage: every matrix of the layers, pruned, dense by a rule, or missed; exit code 1 if any is missed.
    """
    import secateur as api

    others = {"include": include, "exclude": exclude, "device": device, "trust_remote_code": trust_remote_code,
              "allow_pickle": allow_pickle}  # fmt: skip
    if not coverage and (given := [f"‹{name}›" for name, value in others.items() if value]):
        raise SecateurError(f"{', '.join(given)}: add --coverage, which runs the model")
    if not coverage:
        inspection = api.inspect(model)
        print_json(inspection.to_dict()) if as_json else print_inspection(inspection, matrices)
        raise typer.Exit(1 if inspection.problems else 0)
    found = api.coverage_of(
        model,
        include=include or (),
        exclude=exclude or (),
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    print_json(found.to_dict()) if as_json else print_coverage(found, every=matrices)
    raise typer.Exit(1 if found.share("missed") else 0)


@app.command()
def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE]", help="fast, balanced, best, or a recipe file (balanced).")
    ] = None,
    pattern: flags.PatternText = None,
    solver: flags.SolverName = None,
    settings: flags.Settings = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipe files.")] = False,
) -> None:
    """Print a whole recipe as YAML, with the help text of every option."""
    from secateur.recipe.files import to_yaml
    from secateur.recipe.recipe import recipe_schema
    from secateur.recipe.resolve import resolve_recipe
    from secateur.recipe.settings import parse_settings

    if schema:
        others = {"NAME": name, "‹pattern›": pattern, "‹solver›": solver, "‹set›": settings}
        if given := [flag for flag, value in others.items() if value]:
            raise SecateurError(f"{', '.join(given)}: leave out what changes a recipe, as the schema is that of all")
        print_json(recipe_schema())
        return
    found = resolve_recipe(name, parse_settings(settings or []), pattern=pattern, solver=solver)
    sys.stdout.write(to_yaml(found))


@app.command()
def demo(
    out: Annotated[Path, flags.flag("Folder for the pruned model.", flags.OUTPUT, "DIR")] = Path("smollm2-pruned"),
    recipe: flags.RecipeName = None,
    pattern: flags.PatternText = None,
    solver: flags.SolverName = None,
    samples: Annotated[int | None, flags.flag("Calibration sequences (default: 32).", flags.CALIBRATION, "N")] = None,
    seq_len: Annotated[int | None, flags.flag("Tokens per sequence (default: 512).", flags.CALIBRATION, "N")] = None,
    eval_tokens: Annotated[int, flags.flag("Tokens of the shipped text to evaluate.", flags.EVALUATION, "N")] = 20480,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    device: flags.Device = None,
    threads: flags.Threads = None,
) -> None:
    """Prune SmolLM2-135M-Instruct (93 MB, once), and compare quality, size, memory and speed with the dense model."""
    _use_threads(threads)
    from secateur.cli.demo import PACKED, dense_against_packed, run_demo

    out = user_path(out)
    asked = {"recipe": recipe, "pattern": pattern, "solver": solver, "samples": samples, "seq_len": seq_len}
    with progress_shown() as progress:
        models, report = run_demo(out, asked, eval_tokens, overwrite, device, progress)
        speeds = dense_against_packed(out, report, progress)
    if as_json:
        print_json({"models": models, "speed": [each.to_dict() for each in speeds], "report": report.to_dict()})
        return
    print_report(report)
    rows = [(name, f"{figures['perplexity']:.2f}", figures["continuation"]) for name, figures in models.items()]
    show_table(("model", "perplexity", "continuation"), rows, "before and after")
    show(
        f"perplexity on {models['dense']['targets']} tokens of the shipped evaluation text\n"
        f"the pruned model is in {out}: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    )
    print_speeds(speeds)
    dense, pruned = speeds
    if pruned.model == PACKED:
        is_faster = pruned.decode_tokens_per_second > dense.decode_tokens_per_second
        gain = "smaller and faster" if is_faster else "smaller, and not faster on this CPU (see `secateur env`)"
        show(f"{gain}: secateur pack {quote(f'{out}')} {quote(f'{out}-packed')}")


for command in (
    deployment.report,
    deployment.push,
    deployment.pack,
    deployment.unpack,
    deployment.bench,
    deployment.env,
):
    app.command()(command)


def _use_threads(threads: int | None) -> None:
    """Set the number of CPU threads.

    Raises:
        SecateurError: less than one, or more than libraries bear.
    """
    if threads is None:
        return
    most = MOST_THREADS * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise SecateurError(f"‹threads› is {threads}; it must be 1 to {most} ({MOST_THREADS} for each core)")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of libraries that are not torch
    import torch

    torch.set_num_threads(threads)


def main() -> None:
    """Run a command."""
    prepare_process()
    run_explained(app)
