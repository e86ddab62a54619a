"""Messages for the person at the terminal; stdout is left to results."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)
