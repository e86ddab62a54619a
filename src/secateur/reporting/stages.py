"""Time and memory of each stage of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from secateur.reporting.figures import StageReport
from secateur.runtime.memory import peak_resident_bytes
from secateur.runtime.progress import Progress


@dataclass(eq=False)
class StageClock:
    """A progress function that hands on what it gets, and takes note of the time.

    Args:
        show: the function to hand on to.
        clock: seconds that only rise.
    """

    show: Progress
    clock: Callable[[], float] = time.monotonic
    _seconds: dict[str, float] = field(default_factory=dict)
    _memory: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start."""
        self._last = self.clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Add what has passed since the last call to the stage."""
        now = self.clock()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._memory[stage] = peak_resident_bytes()
        self._last = now
        self.show(stage, done, total)

    def stages(self) -> list[StageReport]:
        """What each stage took until now, in order."""
        return [StageReport(name, seconds, self._memory[name]) for name, seconds in self._seconds.items()]
