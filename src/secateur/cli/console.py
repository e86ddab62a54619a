"""What commands print: results on stdout, notes on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from secateur.runtime.messages import duration, visible

if TYPE_CHECKING:
    from secateur.calibration.coverage import Coverage
    from secateur.checkpoints.inspection import Inspection
    from secateur.pruning.dry_run import DryRun
    from secateur.reporting.figures import Speed
    from secateur.reporting.report import Report

FIGURES = {  # as a table names them
    "loss": "loss (nats a token)",
    "against perplexity": "perplexity of the dense model",
    "against kl": "KL divergence from the dense model (nats)",
    "against top1_agreement": "same likeliest token as the dense model",
}
WIDE = 160  # columns of a pipe or a file, where no terminal says how wide it is

_stdout, stderr = Console(), Console(stderr=True)


def show(line: object) -> None:
    """Print text on stdout as it is: it may come from a file, so nothing in it is markup or control."""
    _stdout.print(Text(visible(line)), soft_wrap=True)


def note(line: object) -> None:
    """Print text on stderr as it is, each line whole."""
    stderr.print(Text(visible(line)), soft_wrap=True)


def show_table(
    columns: Sequence[str | Column], rows: Iterable[Sequence[object]], title: str = "", **options: Any
) -> None:
    """Print a table on stdout, its cells as they are."""
    whole = [each if isinstance(each, Column) else Column(each, overflow="fold") for each in columns]
    table = Table(*whole, title=Text(visible(title), style="table.title") if title else None, **options)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    if not _stdout.is_terminal and "COLUMNS" not in os.environ:
        _stdout.width = max(WIDE, _stdout.width)
    _stdout.print(table)


def print_json(value: dict[str, Any]) -> None:
    """Print JSON alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_notices(notices: list[str]) -> None:
    """Print what the user should know, on stderr."""
    for notice in notices:
        note(f"note: {notice}")


@contextmanager
def resume_hint(out: Path, shown: bool = True) -> Iterator[None]:
    """Afterwards say how to resume what an error, Ctrl-C or SIGTERM left in a folder."""
    from secateur.resume.manifest import unfinished
    from secateur.storage.paths import real_path, user_path

    place = real_path(user_path(out))
    before = unfinished(place)
    try:
        yield
    finally:
        if shown and (kept := unfinished(place)) and kept != before:
            note(f"{kept.progress}: --resume continues from there")


def print_pairs(title: str, pairs: dict[str, Any]) -> None:
    """Print a table of names and values; nested ones are named by their path."""
    rows = [
        (FIGURES.get(name, name), f"{value:.4f}" if isinstance(value, float) else value) for name, value in _flat(pairs)
    ]
    show_table(("", ""), rows, title, show_header=False)


def _flat(pairs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in pairs.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def print_report(report: Report) -> None:
    """Print a run's table: one row for each kind of matrix, averaged over the blocks."""
    kinds: dict[str, list[Any]] = {}
    for matrix in report.matrices:
        kinds.setdefault(_kind(matrix.name), []).append(matrix)
    rows = []
    for kind, matrices in kinds.items():
        weights = sum(matrix.rows * matrix.columns for matrix in matrices)
        error = sum(matrix.relative_error for matrix in matrices) / len(matrices)
        zeros = sum(matrix.zeros for matrix in matrices) / weights
        shape = f"{matrices[0].rows} x {matrices[0].columns}"
        seconds = sum(matrix.seconds for matrix in matrices)
        rows.append((kind, len(matrices), shape, f"{zeros:.2%}", f"{error:.5f}", f"{seconds:.1f}"))
    title = f"{report.recipe.pattern} by {report.recipe.summary()}"
    show_table(("matrix", "number", "shape", "zeros", "layer error", "seconds"), rows, title)
    share = report.pruned_parameters / max(1, report.model_parameters)
    of_layers = report.pruned_parameters / max(1, report.layer_parameters)
    show(
        f"{report.sparsity:.2%} zeros in {len(report.matrices)} matrices, which hold {of_layers:.1%} of the layers' "
        f"weights and {share:.1%} of the model's; mean layer error {report.mean_relative_error:.5f}; "
        f"{len(report.dense)} matrices left dense; {report.seconds:.0f} s; saved to {report.out}"
    )
    if report.out is not None:
        show(f"which layers lost most, and why: {Path(report.out) / 'report.html'}")
    for objective in dict.fromkeys(block.objective for block in report.blocks):
        blocks = [block for block in report.blocks if block.objective == objective]
        before = sum(block.val_loss_before for block in blocks) / len(blocks)
        after = sum(block.val_loss_after for block in blocks) / len(blocks)
        show(f"refit of {len(blocks)} blocks: mean {objective} on validation text {before:.4f} -> {after:.4f}")
    if any(matrix.figures.get("converged") is False for matrix in report.matrices):
        note("note: some full-row refits stopped at max_iterations before tolerance; see secateur.json")
    if raised := [matrix.name for matrix in report.matrices if len(matrix.figures.get("damping", ())) > 1]:
        note(f"note: the damping was raised for {len(raised)} matrices ({raised[0]} ...); see secateur.json")


def print_inspection(inspection: Inspection, is_whole: bool) -> None:
    """Print a checkpoint's kinds of matrices, or every matrix, and what is broken."""
    verdicts = {True: "ok", False: "broken", None: "dense"}
    if is_whole:
        rows = [
            (
                matrix.name,
                " x ".join(map(str, matrix.shape)),
                f"{matrix.sparsity:.2%}",
                matrix.pattern or "dense",
                inspection.dense.get(matrix.name, "") if matrix.ok is None else verdicts[matrix.ok],
            )
            for matrix in inspection.matrices
        ]
        show_table((Column("matrix", overflow="fold"), "shape", "zeros", "pattern", ""), rows, inspection.folder)
    else:
        kinds: dict[tuple[str, str], list[Any]] = {}
        for matrix in inspection.matrices:
            kinds.setdefault((_kind(matrix.name), verdicts[matrix.ok]), []).append(matrix)
        rows = [
            (
                kind,
                len(members),
                f"{sum(each.zeros for each in members) / max(1, sum(math.prod(each.shape) for each in members)):.2%}",
                f"{min(each.sparsity for each in members):.2%} to {max(each.sparsity for each in members):.2%}",
                verdict,
            )
            for (kind, verdict), members in kinds.items()
        ]
        columns = (Column("matrix", overflow="fold"), "number", "zeros", "from, to", "")
        show_table(columns, rows, inspection.folder)
    pruned = [matrix for matrix in inspection.matrices if matrix.ok is not None]
    weights = sum(math.prod(matrix.shape) for matrix in pruned)
    zeros = sum(matrix.zeros for matrix in pruned) / max(1, weights)
    recorded = f"{len(pruned)} pruned matrices with {zeros:.2%} zeros" if pruned else "nothing is recorded as pruned"
    show(f"{recorded}; {len(inspection.matrices) - len(pruned)} dense; {len(inspection.problems)} problems")
    if not is_whole:
        show("every matrix: --matrices")
    for problem in inspection.problems:
        note(f"broken: {problem}")


def _kind(name: str) -> str:
    """The last two parts of a matrix's name: what it has in common with those of other blocks."""
    of_expert = re.sub(r"\[\d+\]$", "", name)
    return ".".join([part for part in of_expert.split(".") if not part.isdigit()][-2:])


def print_speeds(speeds: Sequence[Speed]) -> None:
    """Print the figures of each model, with ratios to the first."""
    first = speeds[0]
    rows = [
        (
            each.model,
            f"{each.file_bytes / 1e6:.0f} MB ({each.file_bytes / max(1, first.file_bytes):.2f}x)",
            f"{each.memory_bytes / 1e6:.0f} MB ({each.memory_bytes / max(1, first.memory_bytes):.2f}x)",
            f"{each.load_seconds:.1f} s",
            f"{each.prefill_tokens_per_second:.0f}",
            f"{each.decode_tokens_per_second:.1f} "
            f"({each.decode_tokens_per_second / first.decode_tokens_per_second:.2f}x)",
        )
        for each in speeds
    ]
    columns = (Column("model", overflow="fold"), "files", "memory", "load", "prefill tokens/s", "decode tokens/s")
    show_table(columns, rows, f"batch 1, {first.threads} threads")


def print_coverage(coverage: Coverage, every: bool = False) -> None:
    """Print every kind of matrix of a model's layers, or every matrix, and what a run would do with it."""
    total, rows = sum(matrix.weights for matrix in coverage.matrices), []
    alone = {(matrix.name, matrix.state, matrix.reason): [matrix] for matrix in coverage.matrices}
    for (name, state, reason), matrices in (alone if every else coverage.by_kind()).items():
        share = sum(matrix.weights for matrix in matrices) / max(1, total)
        rows.append((name, len(matrices), f"{share:.2%}", state, reason or ""))
    columns = (Column("matrix", overflow="fold"), "number", "share of layers", "", Column("why", overflow="fold"))
    show_table(columns, rows)
    shares = ", ".join(f"{coverage.share(state):.2%} {state}" for state in ("pruned", "dense", "missed"))
    show(f"of {total:,} weights in the matrices of the layers: {shares}; the model has {coverage.model_parameters:,}")
    if coverage.whole:
        note(f"note: the model is pruned as one block: {coverage.whole}")


def print_dry_run(found: DryRun) -> None:
    """Print what a run would do, and what it would take."""
    print_coverage(found.coverage)
    rows = {
        "calibration": f"{found.num_tokens:,} tokens in {found.num_batches} batches",
        "time": f"{duration(found.seconds)} (from one timed block of {found.num_blocks})",
        "memory": f"{found.memory_bytes / 1e9:.2f} GB of this process, besides the mapped files of the model",
        "disk": f"{found.disk_bytes / 1e9:.2f} GB at the peak",
    }
    show_table(("", "estimate"), list(rows.items()), show_header=False)
