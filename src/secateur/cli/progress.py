"""Progress on stderr: bars on a terminal, a line every 30 seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import rich.progress
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secateur.cli.console import stderr
from secateur.runtime.messages import say
from secateur.runtime.progress import Progress, no_progress

SECONDS_A_LINE = 30.0


@contextmanager
def progress_shown(shown: bool = True) -> Iterator[Progress]:
    """A progress function (stage, done, total) that shows where the run is."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not shown:
        yield no_progress
    elif stderr.is_terminal:
        with _bars() as show:
            yield show
    else:
        yield LogLines()


@contextmanager
def _bars() -> Iterator[Progress]:
    """One bar a stage, with the time left. A stage that begins again gets another."""
    columns = (
        TextColumn("{task.description:12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=stderr) as bars:
        tasks: dict[str, TaskID] = {}
        last: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if done <= last.get(stage, done):
                tasks[stage] = bars.add_task(stage, total=total, completed=done - 1)
            bars.update(tasks[stage], completed=done, total=total)
            last[stage] = done

        yield show


@dataclass(eq=False)
class LogLines:
    """A line for the start and the end of each stage, and every 30 seconds between: stage, how far, time left.

    Args:
        clock: seconds that only rise.
        write: takes a line.
    """

    clock: Callable[[], float] = time.monotonic
    write: Callable[[str], object] = field(default=say)
    _stage: str = ""
    _first: int = 0
    _done: int = 0
    _started: float = 0.0
    _written: float = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of progress."""
        now = self.clock()
        if stage != self._stage or done <= self._done:  # it begins, or begins again
            self._stage, self._started, self._written, self._first = stage, now, float("-inf"), done
        self._done = done
        if done < total and now - self._written < SECONDS_A_LINE:
            return
        self._written = now
        passed = now - self._started
        timed = done - self._first
        left = "" if timed < 1 or done >= total else f", {_duration(passed / timed * (total - done))} left"
        self.write(f"{stage}: {done} of {total}{left}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
