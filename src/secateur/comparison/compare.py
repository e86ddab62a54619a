"""Methods x patterns x seeds on one model, in the table that papers print; resumed where it was stopped.

A cell runs a preset (`best`), a solver alone (`sparsegpt`), or `llmcompressor-sparsegpt` and `llmcompressor-wanda`,
with settings behind plus signs: `admm+refit.epochs=2`. Each cell runs in a process, so that peak memory is measured for
it alone. A cell that ends is written at once, with its environment; one that is stopped keeps its finished blocks. The
same command run twice shares the cells, on two GPUs or two halves of a machine: a lock on each cell says who runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock, Timeout

from secateur.api.models import evaluate
from secateur.api.pruning import prune
from secateur.calibration.batches import calibration_batches
from secateur.calibration.documents import OWN_WORDS, is_own_words, text_of
from secateur.checkpoints.load import Checkpoint, load
from secateur.comparison.peers import prune_by_llmcompressor
from secateur.comparison.results import DENSE, RESULTS, Comparison, read_results, write_results
from secateur.errors import SecateurError, errors_within
from secateur.evaluation.tasks import check_tasks, run_tasks
from secateur.recipe.patterns import parse_pattern
from secateur.recipe.presets import PRESETS
from secateur.recipe.recipe import CalibrationText
from secateur.recipe.resolve import resolve_recipe
from secateur.recipe.settings import parse_settings
from secateur.runtime.environment import default_device, environment, environment_number
from secateur.runtime.memory import peak_resident_bytes
from secateur.storage.file_records import sha256
from secateur.storage.held_folder import make_folders

DEFAULT_SAMPLES = 128
DIGEST = " sha256:"
PEERS = ("llmcompressor-sparsegpt", "llmcompressor-wanda")


@dataclass(frozen=True)
class ComparisonSettings:
    """What every cell of a table shares.

    Args:
        model: folder, GGUF file, hub name or `smollm2`.
        calibration: text source, or None for the shipped text.
        samples, seq_len: calibration sequences and their tokens.
        texts: evaluation texts, each a column; empty = the shipped one.
        eval_seq_len, max_tokens: tokens a window, and cap on the evaluated tokens.
        tasks: lm-evaluation-harness tasks, each a column.
        task_dir, task_limit: folder of local tasks, and documents of each.
        device, trust_remote_code, allow_pickle: as for `prune`.
    """

    model: str
    calibration: str | None = None
    samples: int = DEFAULT_SAMPLES
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

        Texts count by name and content digest. Tasks, whose figures are kept by name, the device, and how files may be
        read do not count; a limit of documents counts where there are tasks.
        """
        values = asdict(self) | {
            "calibration": _content(self.calibration),
            "texts": [_content(text) for text in self.texts],
        }
        apart = {"task_dir", "device", "tasks", "trust_remote_code", "allow_pickle"}
        apart |= set() if self.tasks else {"task_limit"}
        return {name: values[name] for name in values if name not in apart}


@dataclass(frozen=True)
class Cell:
    """One run: a recipe at a pattern with a seed; the dense model has none of them."""

    recipe: str
    pattern: str | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        """Name of the cell in the file of results."""
        return " ".join(str(part) for part in (self.recipe, self.pattern, self.seed) if part is not None)


def compare(
    settings: ComparisonSettings,
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
        settings: what all cells share.
        recipes: presets and solvers, with settings behind plus signs.
        patterns: as `prune` takes them.
        seeds: of the calibration draw.
        out: folder of `compare.json`, which is rewritten after each cell.
        peer_python: Python of an environment with llm-compressor, for its recipes.
        tasks_for_seeds: seeds whose cells also run the tasks; None = all.
        say: called with a line for each cell, before and after.

    Raises:
        SecateurError: a recipe, pattern or setting that is wrong, several processes of torchrun, results in `out` made
            with other settings, or a cell that failed; the cells before it are kept.
    """
    if environment_number("WORLD_SIZE", 1) > 1:
        raise SecateurError(
            "torchrun or accelerate started several processes, and a comparison runs one process a cell: start it "
            "without them. The same command run twice shares the cells"
        )
    names = [str(parse_pattern(pattern)) for pattern in patterns]
    for recipe in recipes:
        for name in names:
            for seed in seeds:
                check_recipe(recipe, name, peer_python, samples=settings.samples, seq_len=settings.seq_len, seed=seed)
    check_tasks(settings.tasks, settings.task_dir, settings.task_limit)
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
            folder = out / f".{_file_name(cell)}"
            result = _in_own_process(settings, cell, tasks, folder, peer_python)
            _add(out, settings, cell, result)
            shutil.rmtree(folder, ignore_errors=True)
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
        with FileLock(_locks(out) / f"{_file_name(cell)}.lock", blocking=False):
            yield True
    except Timeout:
        yield False


def _file_name(cell: Cell) -> str:
    return cell.key.replace("/", "_")


def _locks(out: Path) -> Path:
    """The folder of the lock files, which stay: one that is removed while it is waited for locks nothing."""
    folder = out / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add(out: Path, settings: ComparisonSettings, cell: Cell, result: dict[str, Any]) -> None:
    """Add a cell to the file, with what other processes have written since."""
    with FileLock(_locks(out) / "table.lock"):
        table = _open(out, settings)
        table.cells[cell.key] = result
        table.environment, table.command = environment(), " ".join(["secateur", *sys.argv[1:]])
        write_results(table, out)


def parse_recipe(recipe: str) -> dict[str, Any]:
    """`best+refit.epochs=4` -> the keyword arguments of `prune`.

    Raises:
        SecateurError: what follows a plus is not NAME=VALUE.
    """
    head, *parts = recipe.split("+")
    arguments: dict[str, Any] = {"recipe" if head in PRESETS else "solver": head}
    return arguments | ({"settings": parse_settings(parts)} if parts else {})


def check_recipe(recipe: str, pattern: str, peer_python: Path | None, **shortcuts: Any) -> None:
    """Check that a recipe can be run at a pattern, with samples, seq_len and seed, before anything is.

    Raises:
        SecateurError: it can't.
    """
    if recipe in PEERS:
        if peer_python is None:
            raise SecateurError(
                f"{recipe} runs in another environment: python -m venv PEER; PEER/bin/pip install llmcompressor; "
                f"then pass ‹peer_python=PEER/bin/python›"
            )
        return
    with errors_within(f"{recipe} at {pattern}"):
        resolve_recipe(pattern=pattern, **shortcuts, **parse_recipe(recipe))


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
    settings: ComparisonSettings, cell: Cell, tasks: Sequence[str], folder: Path, peer_python: Path | None
) -> dict[str, Any]:
    with own_process() as pool:
        try:
            return pool.submit(run_cell, settings, cell, tuple(tasks), folder, peer_python).result()
        except SecateurError as error:
            raise error.within(f"cell {cell.key}") from error
        except BrokenProcessPool as error:
            raise SecateurError(f"cell {cell.key}: its process died; it may have run out of memory") from error


@contextmanager
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A pool of one process, which ends at once where this one is stopped (Ctrl-C, SIGTERM) or killed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield pool
        except (KeyboardInterrupt, SystemExit):
            for child in active_children():  # the pool would wait for it
                child.terminate()
            raise


def end_with_parent() -> None:
    """Let this process end when the one that started it does: a cell of a comparison that was killed is of no use."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_cell(
    settings: ComparisonSettings, cell: Cell, tasks: Sequence[str], folder: Path, peer_python: Path | None = None
) -> dict[str, Any]:
    """Prune the model into a folder, as far as an earlier process has not, and evaluate it.

    Returns:
        `perplexity` by text, `tasks` by name and metric, and for pruned cells `layer_error`, `sparsity`, `seconds` (of
        pruning alone), with `peak_memory` (bytes) of pruning and `eval_seconds`.
    """
    device = settings.device or default_device()
    reading = {"device": device, "trust_remote_code": settings.trust_remote_code, "allow_pickle": settings.allow_pickle}
    runs_here = cell.recipe != DENSE and cell.recipe not in PEERS
    found = _pruned(folder, settings, cell, reading) if runs_here else {}
    checkpoint = load(str(folder) if runs_here else settings.model, **reading)
    if cell.recipe in PEERS:
        found = _pruned_by_peer(checkpoint, settings, cell, peer_python)
    started = time.perf_counter()
    found["perplexity"] = {
        _column(settings, text): evaluate(
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


def _pruned(folder: Path, settings: ComparisonSettings, cell: Cell, reading: dict[str, Any]) -> dict[str, Any]:
    """Prune the model into a folder; returns the figures of it."""
    report = prune(
        settings.model,
        folder,
        pattern=str(cell.pattern),
        calibration=settings.calibration,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=cell.seed or 0,
        resume=True,
        **reading,
        **parse_recipe(cell.recipe),
    )
    return {
        "recipe": report.recipe,
        "layer_error": report.mean_relative_error,
        "sparsity": report.sparsity,
        "seconds": report.seconds,
        "peak_memory": _peak_memory(reading["device"]),
        "environment": report.environment,
    }


def _pruned_by_peer(
    checkpoint: Checkpoint, settings: ComparisonSettings, cell: Cell, peer_python: Path | None
) -> dict[str, Any]:
    """Let llm-compressor prune a loaded model; returns the figures of it."""
    assert peer_python is not None
    text = CalibrationText(source=settings.calibration, samples=settings.samples, seq_len=settings.seq_len)
    data = calibration_batches(
        settings.calibration, checkpoint.tokenizer, checkpoint.model.config, text, cell.seed or 0
    )
    if data.to_write is not None:
        raise SecateurError(f"{cell.recipe} can't be calibrated on text that the model writes: name a text")
    method = cell.recipe.removeprefix("llmcompressor-")
    return prune_by_llmcompressor(checkpoint, data.batches, method, str(cell.pattern), peer_python)


def _peak_memory(device: str) -> int:
    """Bytes: of the GPU where that is the device, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def _summary(cell: dict[str, Any]) -> str:
    parts = [f"{text} {value:.2f}" for text, value in cell["perplexity"].items()]
    if "seconds" in cell:
        parts.append(f"pruned in {cell['seconds']:.0f} s")
    return ", ".join([*parts, f"evaluated in {cell['eval_seconds']:.0f} s"])


def _column(settings: ComparisonSettings, text: str | None) -> str:
    """What a text's column is called: its file name, or its path where another text has the same name."""
    if text is None:
        return "shipped text"
    name = Path(text).name
    return name if [Path(each).name for each in settings.texts].count(name) < 2 else str(text)


def _content(text: str | None) -> str:
    """Name of a text, with the digest of a file's content; of prompts too, where the model writes the text."""
    if is_own_words(text) and (prompts := text_of(text)) is not None:
        return f"{OWN_WORDS}:{_content(str(prompts))}"
    if text is None or not Path(text).is_file():
        return "shipped text" if text is None else text
    return f"{Path(text).name}{DIGEST}{sha256(Path(text))[:16]}"
