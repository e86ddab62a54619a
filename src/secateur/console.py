"""What commands print: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from rich.table import Column, Table

if TYPE_CHECKING:
    from secateur.coverage import Coverage
    from secateur.inspection import Inspection
    from secateur.report import Report

stdout, stderr = Console(), Console(stderr=True)


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Any]:
    """A progress function that draws one bar a stage on stderr, with the time that remains, where they are shown."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=stderr, disable=not shown) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done == 1:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def print_json(value: dict[str, Any]) -> None:
    """JSON alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_notices(notices: list[str]) -> None:
    """What the user should know, on stderr."""
    for notice in notices:
        stderr.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def telling_of_unfinished(out: Path, speaks: bool = True) -> Iterator[None]:
    """Afterwards says how to go on with what an error or Ctrl-C left in a folder, where that is new."""
    from secateur.manifest import unfinished

    before = unfinished(out.expanduser())
    try:
        yield
    finally:
        if speaks and (kept := unfinished(out.expanduser())) and kept != before:
            stderr.print(f"{kept.progress}: --resume goes on from there", markup=False, highlight=False, soft_wrap=True)


def print_pairs(title: str, pairs: dict[str, Any]) -> None:
    """A table of names and values; nested ones are named by their path."""
    table = Table(title=title, show_header=False)
    for name, value in _flat(pairs):
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    stdout.print(table)


def _flat(pairs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in pairs.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def print_report(report: Report) -> None:
    """A run's table: one row for each kind of matrix, averaged over the blocks."""
    from secateur.recipe import in_words

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
    table.title = f"{report.recipe['pattern']} by {in_words(report.recipe)}"
    stdout.print(table)
    share = report.pruned_parameters / max(1, report.model_parameters)
    of_layers = report.pruned_parameters / max(1, report.layer_parameters)
    stdout.print(
        f"{len(report.matrices)} matrices, {of_layers:.1%} of the weights in the layers' matrices and {share:.1%} of "
        f"the model's; mean layer error "
        f"{report.mean_relative_error:.5f}; {len(report.dense)} matrices left dense; "
        f"{report.seconds:.0f} s; saved to {report.out}",
        markup=False,
        highlight=False,
    )
    if report.blocks:
        before = sum(block.held_out_before for block in report.blocks) / len(report.blocks)
        after = sum(block.held_out_after for block in report.blocks) / len(report.blocks)
        stdout.print(
            f"block refit: mean error of a block's output on held-out batches {before:.4f} -> {after:.4f}",
            highlight=False,
        )
    if any(matrix.solver.get("converged") is False for matrix in report.matrices):
        stderr.print("note: some refits stopped at --iterations before --tolerance; see secateur.json")
    if raised := [matrix.name for matrix in report.matrices if len(matrix.solver.get("damping", ())) > 1]:
        stderr.print(f"note: the damping was raised for {len(raised)} matrices ({raised[0]} ...); see secateur.json")


def print_inspection(inspection: Inspection) -> None:
    """Every matrix of a checkpoint."""
    table = Table(Column("matrix", overflow="fold"), "shape", "sparsity", "pattern", "", title=inspection.folder)
    for matrix in inspection.matrices:
        verdict = {True: "ok", False: "broken", None: inspection.dense.get(matrix.name, "")}[matrix.ok]
        shape = " x ".join(map(str, matrix.shape))
        table.add_row(matrix.name, shape, f"{matrix.sparsity:.2%}", matrix.pattern or "dense", verdict)
    stdout.print(table)


def print_coverage(coverage: Coverage) -> None:
    """Every kind of matrix of a model's layers, and what a run would do with it."""
    table = Table(Column("matrix", overflow="fold"), "number", "share of layers", "", Column("why", overflow="fold"))
    total = sum(matrix.weights for matrix in coverage.matrices)
    for (name, state, reason), matrices in coverage.by_kind().items():
        share = sum(matrix.weights for matrix in matrices) / max(1, total)
        table.add_row(name, str(len(matrices)), f"{share:.2%}", state, reason or "")
    stdout.print(table)
    shares = ", ".join(f"{coverage.share(state):.2%} {state}" for state in ("pruned", "dense", "missed"))
    stdout.print(
        f"of {total:,} weights in the matrices of the layers: {shares}; the model has {coverage.model_parameters:,}",
        highlight=False,
    )
    if coverage.whole:
        stderr.print(f"note: the model is pruned as one block: {coverage.whole}", markup=False)
