"""Progress functions: what long work calls, and bars for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # stage, done, total


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""


class ProgressBars:
    """A progress function for `progress=`: one bar a stage, in a terminal or a notebook, by tqdm."""

    def __init__(self) -> None:
        """No bar until the first stage begins."""
        self._bar: Any = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        from tqdm.auto import tqdm

        if stage != self._stage:
            self.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, initial=done - 1)
        self._bar.n = done
        self._bar.refresh()
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""
