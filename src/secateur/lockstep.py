"""Forward passes of one model side by side, so that a layer that has to be brought in serves them all.

Each pass is a coroutine on this thread. In front of such a layer it gives way, until all the others are there too, or
in front of another. What a pass sets for the length of several layers, other than context variables, the others see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context

from greenlet import getcurrent, greenlet


class Lockstep:
    """How many passes go side by side, and their turns.

    Args:
        room: bytes that the hidden states of all of them may take; 0 = passes go one after another.

    Attributes:
        passes: how many go side by side now.
    """

    def __init__(self, room: int = 0) -> None:
        self.room, self.passes = room, 1
        self._scheduler: greenlet | None = None

    def width(self, hidden: int) -> int:
        """How many passes may go side by side, where the hidden states of each take so many bytes.

        A pass that waits holds two sets of them: those in front of the layer, and its embeddings.
        """
        return max(1, self.room // (2 * max(1, hidden)))

    def run(self, passes: Sequence[Callable[[], None]]) -> None:
        """Run passes side by side, in their order where all meet the same layers. An error of one ends all."""
        if len(passes) == 1:
            passes[0]()
            return
        self._scheduler, self.passes = getcurrent(), len(passes)
        running = [greenlet(each) for each in passes]
        for each in running:
            each.gr_context = copy_context()
        try:
            while running:
                for each in running:
                    each.switch()
                running = [each for each in running if not each.dead]
        finally:
            self.passes = 1
            for each in running:
                if not each.dead:
                    each.throw()

    def give_way(self) -> None:
        """Let the other passes come as far as this one."""
        if self.passes > 1 and self._scheduler is not None:
            self._scheduler.switch()
