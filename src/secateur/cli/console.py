"""What commands print: results on stdout, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from secateur.calibration.coverage import Coverage
    from secateur.checkpoints.inspection import Inspection
    from secateur.pruning.dry_run import DryRun
    from secateur.pruning.report import Report

stdout, stderr = Console(), Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """Print JSON alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_notices(notices: list[str]) -> None:
    """Print what the user should know, on stderr."""
    for notice in notices:
        stderr.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def resume_hint(out: Path, shown: bool = True) -> Iterator[None]:
    """Afterwards say how to resume what an error, Ctrl-C or SIGTERM left in a folder."""
    from secateur.resume.manifest import unfinished

    before = unfinished(out.expanduser())
    try:
        yield
    finally:
        if shown and (kept := unfinished(out.expanduser())) and kept != before:
            stderr.print(
                f"{kept.progress}: --resume continues from there", markup=False, highlight=False, soft_wrap=True
            )


def print_pairs(title: str, pairs: dict[str, Any]) -> None:
    """Print a table of names and values; nested ones are named by their path."""
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
    """Print a run's table: one row for each kind of matrix, averaged over the blocks."""
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
    table.title = f"{report.the_recipe.pattern} by {report.the_recipe.summary()}"
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
        before = sum(block.val_loss_before for block in report.blocks) / len(report.blocks)
        after = sum(block.val_loss_after for block in report.blocks) / len(report.blocks)
        stdout.print(
            f"block refit: mean validation loss of a block {before:.4f} -> {after:.4f}",
            highlight=False,
        )
    if any(matrix.figures.get("converged") is False for matrix in report.matrices):
        stderr.print("note: some full-row refits stopped at max_iterations before tolerance; see secateur.json")
    if raised := [matrix.name for matrix in report.matrices if len(matrix.figures.get("damping", ())) > 1]:
        stderr.print(f"note: the damping was raised for {len(raised)} matrices ({raised[0]} ...); see secateur.json")


def print_inspection(inspection: Inspection) -> None:
    """Print every matrix of a checkpoint."""
    table = Table(Column("matrix", overflow="fold"), "shape", "sparsity", "pattern", "", title=inspection.folder)
    for matrix in inspection.matrices:
        verdict = {True: "ok", False: "broken", None: inspection.dense.get(matrix.name, "")}[matrix.ok]
        shape = " x ".join(map(str, matrix.shape))
        table.add_row(matrix.name, shape, f"{matrix.sparsity:.2%}", matrix.pattern or "dense", verdict)
    stdout.print(table)


def print_coverage(coverage: Coverage) -> None:
    """Print every kind of matrix of a model's layers, and what a run would do with it."""
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


def print_dry_run(found: DryRun) -> None:
    """Print what a run would do, and what it would take."""
    print_coverage(found.coverage)
    table = Table("", "estimate", show_header=False)
    rows = {
        "calibration": f"{found.num_tokens:,} tokens in {found.num_batches} batches",
        "time": f"{_minutes(found.seconds)} (from one timed block of {found.num_blocks})",
        "memory": f"{found.memory_bytes / 1e9:.2f} GB of this process, besides the mapped files of the model",
        "disk": f"{found.disk_bytes / 1e9:.2f} GB in OUT",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    stdout.print(table)


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
