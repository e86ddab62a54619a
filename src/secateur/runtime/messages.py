"""Messages for the person at the terminal; stdout is left to results."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print a message on stderr."""
    print(visible(message), file=sys.stderr, flush=True)


def visible(text: object) -> str:
    """Text that may come from a file, as a terminal can show it: control characters are spelled out, lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _spelled(letter) for letter in str(text))


def one_line(text: object) -> str:
    """The same in one line."""
    return visible(text).replace("\n", "\\n")


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _spelled(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
