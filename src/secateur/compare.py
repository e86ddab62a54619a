"""Methods x patterns x seeds on one model, in the table that papers print; resumed cell by cell.

A *recipe* is what a cell runs: an effort (`best`), a method (`sparsegpt`), or `llmcompressor-sparsegpt` and
`llmcompressor-wanda`, with settings behind plus signs: `admm+refit=block+refit_passes=2`. Each cell is a process of its
own, so that its peak memory is its own and a crash costs one cell. Every cell that ends is written at once, with the
environment it ran in. The same command run twice shares the cells, on two GPUs or two halves of a machine: a lock on
each cell says who runs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock, Timeout

from secateur.api import evaluate, prune
from secateur.calibration import calibrate
from secateur.checkpoint import Checkpoint, default_device, load, read_json
from secateur.durable import write_whole
from secateur.export import environment
from secateur.pattern import parse_pattern
from secateur.peer_llmcompressor import peak_of_process
from secateur.peers import prune_by_llmcompressor
from secateur.recipe import EFFORTS, make_plan, read_value
from secateur.tasks import check_tasks, run_tasks

RESULTS = "compare.json"
DENSE = "dense"
PEERS = ("llmcompressor-sparsegpt", "llmcompressor-wanda")


@dataclass(frozen=True)
class Settings:
    """What every cell of a table shares. A file of results holds one such set.

    Args:
        model: folder, GGUF file, hub name or `smollm2`.
        calibration: text source, or None for the shipped text.
        texts: evaluation texts, each a column; empty = the shipped one.
        tasks: lm-evaluation-harness tasks, each a column.
        device, trust_remote_code, allow_pickle: as for `prune`.
    """

    model: str
    calibration: str | None = None
    samples: int = 128
    seq_len: int | None = None
    texts: tuple[str, ...] = ()
    eval_seq_len: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    task_limit: int | None = None
    device: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def identity(self) -> dict[str, Any]:
        """What must agree for cells to stand in one table.

        Texts count by their file names; tasks, whose figures are kept by name, the device and how files may be read
        don't count; a limit of documents counts where there are tasks.
        """
        values = asdict(self) | {
            "calibration": _short(self.calibration),
            "texts": [_short(text) for text in self.texts],
        }
        apart = {"task_dir", "device", "tasks", "trust_remote_code", "allow_pickle"}
        apart |= set() if self.tasks else {"task_limit"}
        return {name: values[name] for name in values if name not in apart}


@dataclass(frozen=True)
class Cell:
    """One run: a recipe at a pattern with a seed. The dense model has neither."""

    recipe: str
    pattern: str | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        return " ".join(str(part) for part in (self.recipe, self.pattern, self.seed) if part is not None)


@dataclass
class Comparison:
    """A table's settings, environment and cells, as `compare.json` holds them."""

    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(
    settings: Settings,
    recipes: Sequence[str],
    patterns: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    peer_python: Path | None = None,
    tasks_for_seeds: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run every cell that `out` doesn't hold yet; returns the whole table.

    Args:
        out: folder of `compare.json`, which is rewritten after each cell.
        peer_python: the interpreter of an environment with llm-compressor, for its recipes.
        tasks_for_seeds: seeds whose cells also run the tasks; None = all.
        say: told of each cell, before and after.

    Raises:
        ValueError: a recipe, pattern or setting that is wrong, several processes of torchrun, results in `out` made
            with other settings, or a cell that failed; the cells before it are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "torchrun or accelerate started several processes, and a comparison runs its cells in one each: start it "
            "without them. The same command run twice shares the cells"
        )
    names = [str(parse_pattern(pattern)) for pattern in patterns]
    for recipe in recipes:
        for name in names:
            check_recipe(recipe, name, peer_python)
    check_tasks(settings.tasks, settings.task_dir, settings.task_limit)
    shorts = [_short(text) for text in settings.texts]
    if twice := [short for short in shorts if shorts.count(short) > 1]:
        raise ValueError(f"two texts are called {twice[0]}: columns go by the file's name, so rename one")
    wanted = [Cell(DENSE)] + [Cell(recipe, pattern, seed) for seed in seeds for pattern in names for recipe in recipes]
    _open(out, settings)
    for number, cell in enumerate(wanted, 1):
        with_tasks = tasks_for_seeds is None or cell.seed is None or cell.seed in tasks_for_seeds
        asked = settings.tasks if with_tasks else ()
        with _claimed(out, cell) as claimed:
            tasks = _missing(_open(out, settings), cell, asked)
            if tasks is None:
                continue
            if not claimed:
                say(f"cell {number} of {len(wanted)}: {cell.key} is run by another process")
                continue
            say(f"cell {number} of {len(wanted)}: {cell.key}")
            result = _in_own_process(settings, cell, tasks, peer_python)
            _add(out, settings, cell, result)
            say(f"  {_summary(result)}")
    return _open(out, settings)


def _missing(table: Comparison, cell: Cell, asked: Sequence[str]) -> list[str] | None:
    """The tasks to run the cell with: those asked for and those it had; None where nothing is missing."""
    done = table.cells.get(cell.key)
    had = [] if done is None else done.get("tasks_asked", sorted(done.get("tasks", {})))
    tasks = sorted({*had, *asked})
    return None if done is not None and tasks == sorted(had) else tasks


@contextmanager
def _claimed(out: Path, cell: Cell) -> Iterator[bool]:
    """Whether the cell is ours to run, until this ends. A process that dies gives its claim back."""
    try:
        with FileLock(_locks(out) / f"{cell.key.replace('/', '_')}.lock", blocking=False):
            yield True
    except Timeout:
        yield False


def _locks(out: Path) -> Path:
    """The folder of the lock files, which stay: one that is removed while it is waited for locks nothing."""
    folder = out / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add(out: Path, settings: Settings, cell: Cell, result: dict[str, Any]) -> None:
    """Add a cell to the file, with what other processes have written since."""
    with FileLock(_locks(out) / "table.lock"):
        table = _open(out, settings)
        table.cells[cell.key] = result
        table.environment, table.command = environment(), " ".join(["secateur", *sys.argv[1:]])
        write_whole(out / RESULTS, json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n")


def parse_recipe(recipe: str) -> dict[str, Any]:
    """`best+refit_passes=4` -> the keyword arguments of `prune`; values that read as JSON are that."""
    head, *parts = recipe.split("+")
    arguments: dict[str, Any] = {"effort" if head in EFFORTS else "method": head}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"recipe {recipe!r}: {part!r} is no NAME=VALUE")
        if name in ("effort", "method"):
            raise ValueError(f"recipe {recipe!r}: the {name} comes first, before any plus")
        arguments[name] = read_value(value)
    return arguments


def check_recipe(recipe: str, pattern: str, peer_python: Path | None) -> None:
    """Raise ValueError for a recipe that can't be run at a pattern, before anything is."""
    if recipe in PEERS:
        if peer_python is None:
            raise ValueError(
                f"{recipe} runs in an environment of its own: python -m venv PEER; PEER/bin/pip install llmcompressor; "
                f"then pass --peer-python PEER/bin/python"
            )
        return
    arguments = parse_recipe(recipe)
    sequential = {name: arguments.pop(name) for name in ("true_sequential",) if name in arguments}
    try:
        make_plan(parse_pattern(pattern), arguments.pop("effort", None), arguments, **sequential)
    except (ValueError, TypeError) as error:  # TypeError: text where an option is a number
        raise ValueError(f"{recipe} at {pattern}: {error}") from error


def _open(out: Path, settings: Settings) -> Comparison:
    if out.is_file():
        raise ValueError(f"{out} is a file: give a folder for the results")
    path = out / RESULTS
    identity = json.loads(json.dumps(settings.identity()))
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        return Comparison(identity)
    found = read_json(path, "")
    known = found.get("settings", {})
    if differs := sorted(name for name in identity if known.get(name, identity[name]) != identity[name]):
        raise ValueError(
            f"{path} was made with other settings ({', '.join(differs)}): cells of one table must share them. Choose "
            f"another --out, or the same settings"
        )
    return Comparison(**found | {"settings": known | identity})


def _in_own_process(settings: Settings, cell: Cell, tasks: Sequence[str], peer_python: Path | None) -> dict[str, Any]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(run_cell, settings, cell, tuple(tasks), peer_python).result()
        except ValueError as error:
            raise ValueError(f"cell {cell.key}: {error}") from error
        except BrokenProcessPool as error:
            raise ValueError(f"cell {cell.key}: its process died; it may have run out of memory") from error


def end_with_parent() -> None:
    """Let this process end when the one that started it does: a cell of a comparison that was killed is of no use."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_cell(settings: Settings, cell: Cell, tasks: Sequence[str], peer_python: Path | None = None) -> dict[str, Any]:
    """Prune a fresh copy of the model in memory, and evaluate it.

    Returns:
        `perplexity` by text, `tasks` by name and metric, and for pruned cells `layer_error`, `sparsity`, `seconds` (of
        pruning alone), with `peak_memory` (bytes) of pruning and `eval_seconds`.
    """
    device = settings.device or default_device()
    checkpoint = load(settings.model, device, settings.trust_remote_code, settings.allow_pickle)
    found = {} if cell.recipe == DENSE else _pruned(checkpoint, settings, cell, peer_python, device)
    started = time.perf_counter()
    found["perplexity"] = {
        _short(text): evaluate(
            checkpoint.model,
            text,
            seq_len=settings.eval_seq_len,
            max_tokens=settings.max_tokens,
            tokenizer=checkpoint.tokenizer,
        )["perplexity"]
        for text in (settings.texts or (None,))
    }
    if tasks:
        by_name = run_tasks(checkpoint.model, checkpoint.tokenizer, tasks, settings.task_dir, settings.task_limit)
        found |= {"tasks": by_name, "tasks_asked": sorted(tasks)}
    return {"environment": environment()} | found | {"eval_seconds": time.perf_counter() - started}


def _pruned(
    checkpoint: Checkpoint, settings: Settings, cell: Cell, peer_python: Path | None, device: str
) -> dict[str, Any]:
    """The figures of pruning a loaded model in place."""
    texts: dict[str, Any] = {"samples": settings.samples, "seq_len": settings.seq_len, "seed": cell.seed or 0}
    if cell.recipe in PEERS:
        assert peer_python is not None
        data = calibrate(settings.calibration, checkpoint.tokenizer, checkpoint.model.config, **texts)
        method = cell.recipe.removeprefix("llmcompressor-")
        return prune_by_llmcompressor(checkpoint, data.batches, method, str(cell.pattern), peer_python)
    report = prune(
        checkpoint,
        pattern=str(cell.pattern),
        calibration=settings.calibration,
        **texts,
        **parse_recipe(cell.recipe),
    )
    return {
        "recipe": report.recipe,
        "layer_error": report.mean_relative_error,
        "sparsity": report.sparsity,
        "seconds": report.seconds,
        "peak_memory": _peak_memory(device),
        "environment": report.environment,
    }


def _peak_memory(device: str) -> int:
    """Bytes: of the GPU where that is the device, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process()


def _summary(cell: dict[str, Any]) -> str:
    parts = [f"{text} {value:.2f}" for text, value in cell["perplexity"].items()]
    if "seconds" in cell:
        parts.append(f"pruned in {cell['seconds']:.0f} s")
    return ", ".join([*parts, f"evaluated in {cell['eval_seconds']:.0f} s"])


def _short(text: str | None) -> str:
    return "shipped text" if text is None else Path(text).name
