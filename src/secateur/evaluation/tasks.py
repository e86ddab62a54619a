"""Zero-shot tasks by lm-evaluation-harness (the extra `eval`), on a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, nearest
from secateur.runtime.hub_errors import download_errors
from secateur.runtime.messages import first_line
from secateur.storage.paths import user_path

# The figure that papers quote, where a task has several.
PREFERRED = ("acc_norm,none", "acc,none", "exact_match,none")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    task_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """The harness's figures: task -> metric -> value, as `simple_evaluate` gives them, without its error estimates.

    Args:
        model: in memory.
        tokenizer: of the model.
        tasks: names that the harness knows, or that YAML files in `task_dir` define.
        task_dir: a folder of YAML tasks. The harness's own tasks stay available.
        limit: take the first documents of each task only.
        batch_size: documents at a time.

    Raises:
        SecateurError: the extra is missing, or a task is unknown.
    """
    check_tasks(tasks, task_dir, limit)
    harness, models = _harness(""), _harness(".models.huggingface")
    with _data_errors(tasks):
        done = harness.simple_evaluate(
            model=models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=_manager(task_dir),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
    named = {task: _figures(values) for task, values in done["results"].items()}
    return {task: figures for task, figures in named.items() if figures}


def check_tasks(tasks: Sequence[str], task_dir: str | Path | None, limit: int | None) -> None:
    """Check what `run_tasks` is asked for, before any work.

    Raises:
        SecateurError: the extra is missing, a task is unknown, or the limit or the folder is wrong or for no task.
    """
    if not tasks:
        for name, value in (("task_dir", task_dir), ("task_limit", limit)):
            if value is not None:
                raise SecateurError(f"‹{name}› is for ‹tasks›, and none is named")
        return
    if limit is not None and limit < 1:
        raise SecateurError(f"‹task_limit› is {limit}; it must be at least 1")
    if task_dir is not None and not user_path(task_dir).is_dir():
        raise SecateurError(
            f"‹task_dir› is {task_dir}, which is not a folder: give one that holds the YAML files of your tasks"
        )
    if unknown := [name for name in tasks if name not in _manager(task_dir).all_tasks]:
        where = f" and no YAML file in {task_dir} defines it" if task_dir else " (local ones: ‹task_dir›)"
        near = nearest(unknown[0], _manager(task_dir).all_tasks)
        raise SecateurError(f"task {unknown[0]!r} is not known to lm-evaluation-harness{where}{near}")


def load_tasks(tasks: Sequence[str], task_dir: str | Path | None) -> None:
    """Read the data of tasks, so that what is missing is said before other work. A run reads the cache on the disk.

    Raises:
        SecateurError: the data can't be read.
    """
    with _data_errors(tasks):
        _manager(task_dir).load(list(tasks))


@contextmanager
def _data_errors(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except download_errors() as error:
        reason = first_line(error)
        raise SecateurError(
            f"the data of {', '.join(tasks)} could not be read ({reason}): check the connection, or use local "
            f"tasks with ‹task_dir›"
        ) from error


def _manager(task_dir: str | Path | None) -> Any:
    """The harness's index of tasks. It takes seconds to read, so it is kept until a file of the folder changes."""
    if task_dir is None:
        return _read_index(None, ())
    folder = user_path(task_dir)
    return _read_index(folder, tuple(sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.yaml"))))


@lru_cache(maxsize=1)
def _read_index(folder: Path | None, _files: tuple[tuple[Path, int], ...]) -> Any:
    return _harness(".tasks").TaskManager(include_path=None if folder is None else str(folder))


def _harness(part: str) -> Any:
    try:
        return import_module(f"lm_eval{part}")
    except ImportError as error:
        raise SecateurError(f"tasks need secateur's `eval` extra, or `pip install lm-eval` ({error})") from error


def headline(figures: dict[str, float]) -> float:
    """The one figure of a task that tables show: normalised accuracy where there is one, else accuracy."""
    preferred = (name for name in PREFERRED if name in figures)
    return figures[next(preferred, next(iter(figures)))]


def _figures(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
