"""Errors for users. A message may name an option, which is then spelled as an argument or as a flag."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from difflib import get_close_matches

_OPTION = re.compile(r"‹([\w.]+)(?:=([^›]*))?›")


class SecateurError(ValueError):
    """Something that a user can fix: a request, a model, a text, a file or the machine.

    A message names an option as `‹max_memory›` or `‹exclude='*.gate'›`, and an option of a recipe as `‹refit.rate›` or
    `‹settings.damping›`. `str(error)` spells them as Python arguments, `error.for_command_line()` as flags.
    """

    @property
    def raw(self) -> str:
        """The message with options as `‹name›`, to build another message from."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return _OPTION.sub(lambda found: _as_argument(found[1], found[2]), self.raw)

    def for_command_line(self) -> str:
        """The message with options as flags; those of a recipe's sections as `--set`."""
        return _OPTION.sub(lambda found: _as_flag(found[1], found[2]), self.raw)

    def within(self, place: str) -> SecateurError:
        """The same error, with the place where it happened in front of its message."""
        made = copy(self)
        made.args = (f"{place}: {self.raw}",)
        return made


@contextmanager
def errors_within(place: str) -> Iterator[None]:
    """Within this context an error's message begins with the place where it happened."""
    try:
        yield
    except SecateurError as error:
        raise error.within(place) from error


class UnsupportedModelError(SecateurError):
    """The model can't be pruned as it is; the message says what was found and what to do."""


def _as_argument(name: str, value: str | None) -> str:
    if "." in name:
        setting = name.removeprefix("settings.")
        return f"settings={{{setting!r}: {_literal(value)}}}"
    return name if value is None else f"{name}={_literal(value)}"


def _literal(value: str | None) -> str:
    """A value as Python writes it."""
    if value is None:
        return "..."
    if value in ("none", "true", "false"):
        return value.capitalize()
    is_literal = value[:1] in "'\"[{(" or value.replace(".", "", 1).isdigit()
    return value if is_literal else repr(value)


def _as_flag(name: str, value: str | None) -> str:
    if "." in name:
        return f"--set {name.removeprefix('settings.')}={value or '...'}"
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {value}"


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'rate'?` where a known name is near a misspelt one, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
