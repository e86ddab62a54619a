"""Methods x patterns x seeds on one model, in the table that papers print; resumed where it was stopped.

Each cell runs in a process, so that peak memory is measured for it alone. A cell that ends is written at once, with its
environment; one that is stopped keeps its finished blocks. The same command run twice shares the cells, on two GPUs or
two halves of a machine: a lock on each cell says who runs it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from secateur.calibration.documents import has_fields
from secateur.comparison.cell import (
    DIGEST,
    PEERS,
    Cell,
    ComparisonSettings,
    Watched,
    label_of,
    parse_recipe,
    run_cell,
    unwatched,
)
from secateur.comparison.results import DENSE, RESULTS, Comparison, read_results, write_results
from secateur.errors import SecateurError, errors_within
from secateur.evaluation.tasks import check_tasks
from secateur.recipe.patterns import check_asked_pattern, parse_pattern
from secateur.recipe.resolve import resolve_recipe
from secateur.recipe.settings import value_at
from secateur.resume.manifest import journal_of
from secateur.resume.output_folder import check_outside_model
from secateur.runtime.environment import environment, environment_number
from secateur.runtime.own_process import run_in_own_process
from secateur.storage.held_folder import make_folders
from secateur.storage.paths import real_path, user_path

SHARED = {  # what all cells of a table or of a row have: the flag, and the option of a recipe
    "patterns": "pattern", "seeds": "seed", "samples": "calibration.samples", "seq_len": "calibration.seq_len",
}  # fmt: skip
LONGEST_NAME = 200  # bytes; a file system's limit is 255, with what is added to it


def compare(
    settings: ComparisonSettings,
    recipes: Sequence[str],
    patterns: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    peer_python: Path | None = None,
    tasks_for_seeds: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
    show: Callable[[Comparison], None] = lambda _table: None,
    watched: Watched = unwatched,
) -> Comparison:
    """Run every cell that `out` doesn't hold yet; returns the whole table.

    A cell that fails does not stop those after it.

    Args:
        settings: what all cells share.
        recipes: presets and solvers, with settings behind plus signs.
        patterns: as `prune` takes them.
        seeds: of the calibration draw.
        out: folder of `compare.json`, which is rewritten after each cell.
        peer_python: Python of an environment with llm-compressor, for its recipes.
        tasks_for_seeds: seeds whose cells also run the tasks; None = all.
        say: called with a line for each cell, before and after.
        show: called with the table after each cell.
        watched: a context that gives the progress function of a cell, in its process.

    Raises:
        SecateurError: a recipe, pattern or setting that is wrong, several processes of torchrun, results in `out` made
            with other settings, or cells that failed; the others are kept.
    """
    if environment_number("WORLD_SIZE", 1) > 1:
        raise SecateurError(
            "torchrun or accelerate started several processes, and a comparison runs one process a cell: start it "
            "without them. The same command run twice shares the cells"
        )
    out, peer_python = real_path(user_path(out)), None if peer_python is None else user_path(peer_python)
    check_outside_model(out, settings.model)
    _check_used(settings, recipes, seeds, peer_python, tasks_for_seeds)
    wanted = _cells(settings, recipes, patterns, seeds, peer_python)
    _open(out, settings)
    run = partial(_in_own_process, peer_python=peer_python, watched=watched)
    failed: list[Exception] = []
    for number, cell in enumerate(wanted, 1):
        with_tasks = tasks_for_seeds is None or cell.seed is None or cell.seed in tasks_for_seeds
        asked = settings.tasks if with_tasks else ()
        place = f"cell {number} of {len(wanted)}: {cell.key}"
        try:
            _run_missing(cell, replace(settings, tasks=tuple(asked)), out, run, place, say, show)
        except Exception as error:  # whatever a cell dies of, those after it run
            if cell.recipe == DENSE:  # no other would do better
                raise
            why = error.for_command_line() if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
            say(f"  failed: {why}")
            failed.append(error)
    if failed:
        raise _one_of(failed, len(wanted))
    return _open(out, settings)


def _one_of(failed: Sequence[Exception], number: int) -> Exception:
    """The error that tells of some failed cells, of a number: one that nobody expected, or the first."""
    if unexpected := [error for error in failed if not isinstance(error, SecateurError)]:
        return unexpected[0]
    first = failed[0]
    if len(failed) == 1 or not isinstance(first, SecateurError):
        return first
    return SecateurError(f"{len(failed)} of {number} cells failed, and the others are kept: {first.raw}")


def _check_used(
    settings: ComparisonSettings,
    recipes: Sequence[str],
    seeds: Sequence[int],
    peer_python: Path | None,
    tasks_for_seeds: Sequence[int] | None,
) -> None:
    """Check that no argument is given that nothing would use.

    Raises:
        SecateurError: one is.
    """
    if peer_python is not None and not {*recipes} & {*PEERS}:
        raise SecateurError(f"‹peer_python› is for {' and '.join(PEERS)}, and ‹recipes› names none of them")
    if settings.text_field is not None and not any(map(has_fields, (settings.calibration, *settings.texts))):
        raise SecateurError(f"‹text_field› is {settings.text_field!r}, and no text here has fields: leave it out")
    if tasks_for_seeds is not None and not settings.tasks:
        raise SecateurError("‹task_seeds› is for ‹tasks›, which are not named")
    if unknown := {*(tasks_for_seeds or ())} - {*seeds}:
        raise SecateurError(f"‹task_seeds› has {min(unknown)}, which is none of ‹seeds› ({', '.join(map(str, seeds))})")


def _run_missing(
    cell: Cell,
    settings: ComparisonSettings,
    out: Path,
    run: Callable[[ComparisonSettings, Cell, Path], dict[str, Any]],
    place: str,
    say: Callable[[str], None],
    show: Callable[[Comparison], None],
) -> None:
    """Run a cell that the table does not have, unless another process runs it.

    Raises:
        SecateurError: it failed; its finished blocks are kept.
    """
    with _claimed(out, cell) as claimed:
        to_run = _to_run(_open(out, settings), settings, cell)
        if not claimed:
            if to_run is not None:
                say(f"{place} is run by another process")
            return
        folder = out / f".{_file_name(cell)}"
        if to_run is not None:
            say(place)
            result = run(to_run, cell, folder)
            show(_add(out, settings, cell, result))
            say(f"  {_summary(result)}")
        for left in (folder, journal_of(folder)) if cell.is_ours else ():  # what a killed process left, too
            shutil.rmtree(left, ignore_errors=True)


def _cells(
    settings: ComparisonSettings,
    recipes: Sequence[str],
    patterns: Sequence[str],
    seeds: Sequence[int],
    peer_python: Path | None,
) -> list[Cell]:
    """The cells that are asked for, the dense model first.

    Raises:
        SecateurError: one that can't be run.
    """
    for pattern in patterns:
        check_asked_pattern(pattern)
    names = [str(parse_pattern(pattern)) for pattern in patterns]
    cells = [Cell(label_of(recipe), name, seed, recipe) for seed in seeds for name in names for recipe in recipes]
    for cell in cells:
        shortcuts = {"samples": settings.samples, "seq_len": settings.seq_len, "seed": cell.seed}
        check_recipe(cell.asked, str(cell.pattern), peer_python, **shortcuts)
    check_tasks(settings.tasks, settings.task_dir, settings.task_limit)
    return [Cell(DENSE), *cells]


def _to_run(table: Comparison, settings: ComparisonSettings, cell: Cell) -> ComparisonSettings | None:
    """The settings to run a cell with: what is asked for, and what it had; None where nothing is missing."""
    done = table.cells.get(cell.key)
    if done is None:
        return settings
    had, had_divergence = done.get("tasks_asked", sorted(done.get("tasks", {}))), "divergence" in done
    tasks, divergence = {*had, *settings.tasks}, had_divergence or (settings.divergence and cell.recipe != DENSE)
    if tasks == {*had} and divergence == had_divergence:
        return None
    return replace(settings, tasks=tuple(sorted(tasks)), divergence=divergence)


@contextmanager
def _claimed(out: Path, cell: Cell) -> Iterator[bool]:
    """Whether the cell is ours to run, until this ends. A process that dies gives its claim back."""
    try:
        with FileLock(_locks(out) / f"{_file_name(cell)}.lock", blocking=False):
            yield True
    except Timeout:
        yield False


def _file_name(cell: Cell) -> str:
    """The cell's key as a file name: where it can't be one, its beginning with a digest."""
    name = cell.key.replace("/", "_")
    if name == cell.key and len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[:40]} {sha256(cell.key.encode()).hexdigest()[:16]}"


def _locks(out: Path) -> Path:
    """The folder of the lock files, which stay: one that is removed while it is waited for locks nothing."""
    folder = out / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add(out: Path, settings: ComparisonSettings, cell: Cell, result: dict[str, Any]) -> Comparison:
    """Add a cell to the file, with what other processes have written since; the table."""
    with FileLock(_locks(out) / "table.lock"):
        table = _open(out, settings)
        table.cells[cell.key] = result
        table.environment, table.command = environment(), shlex.join(["secateur", *sys.argv[1:]])
        write_results(table, out)
    return table


def check_recipe(recipe: str, pattern: str, peer_python: Path | None, **shortcuts: Any) -> None:
    """Check that a recipe can be run at a pattern, with samples, seq_len and seed, before anything is.

    Raises:
        SecateurError: it can't.
    """
    if recipe in PEERS:
        if peer_python is None or not peer_python.is_file() or not os.access(peer_python, os.X_OK):
            found = "" if peer_python is None else f", and {peer_python} is not a program"
            raise SecateurError(
                f"{recipe} runs in another environment{found}: python -m venv PEER; PEER/bin/pip install "
                f"llmcompressor; then pass ‹peer_python=PEER/bin/python›"
            )
        return
    with errors_within(f"{recipe} at {pattern}"):
        found = resolve_recipe(pattern=pattern, **shortcuts, **parse_recipe(recipe))
        mine, shared = found.to_dict(), resolve_recipe(pattern=pattern, **shortcuts).to_dict()
        for flag, option in SHARED.items():
            if value_at(mine, option) != value_at(shared, option):
                raise SecateurError(f"it sets {option}, and all cells share one: leave it out, and pass ‹{flag}›")
        if found.format == "packed":
            raise SecateurError("format=packed changes no figure of a comparison: leave it out")
        if found.calibration.source is not None:
            raise SecateurError(
                f"it names a text, {found.calibration.source}, and all cells share one: leave it out, and pass "
                f"‹calibration›"
            )


def _open(out: Path, settings: ComparisonSettings) -> Comparison:
    if out.is_file():
        raise SecateurError(f"{out} is a file: give a folder for the results")
    path = out / RESULTS
    identity = json.loads(json.dumps(settings.identity()))
    found = read_results(out)
    if found is None:
        make_folders(out)
        return Comparison(identity)
    known = found.settings
    if differs := sorted(name for name in identity if not _agree(known.get(name, identity[name]), identity[name])):
        raise SecateurError(
            f"{path} was made with other settings ({', '.join(differs)}): cells of one table must share them. Choose "
            f"another ‹out›, or the same settings"
        )
    return replace(found, settings=known | identity)


def _agree(known: Any, now: Any) -> bool:
    """Whether a setting is the recorded one. A text that was recorded without a digest counts by its name."""
    if isinstance(known, list) and isinstance(now, list):
        return len(known) == len(now) and all(map(_agree, known, now))
    if isinstance(known, str) and isinstance(now, str) and DIGEST not in known:
        return known == now.partition(DIGEST)[0]
    return known == now


def _in_own_process(
    settings: ComparisonSettings, cell: Cell, folder: Path, peer_python: Path | None, watched: Watched
) -> dict[str, Any]:
    with errors_within(f"cell {cell.key}"):
        try:
            return run_in_own_process(run_cell, settings, cell, folder, peer_python, watched)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise SecateurError(f"{type(error).__name__}: {error}: the machine could not do this") from error


def _summary(cell: dict[str, Any]) -> str:
    parts = [f"{text} {value:.2f}" for text, value in cell["perplexity"].items()]
    if "seconds" in cell:
        parts.append(f"pruned in {cell['seconds']:.0f} s")
    return ", ".join([*parts, f"evaluated in {cell['eval_seconds']:.0f} s"])
