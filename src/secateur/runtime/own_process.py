"""Run a function in a process that ends with this one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from secateur.errors import SecateurError


def run_in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns, run in a fresh process, which ends at once where this one is stopped or killed.

    A pipe instead of a pool: Ctrl-C can leave a lock of the pool taken, and the pool then never ends.

    Raises:
        SecateurError: the process died before the function ended.
        Exception: what the function raised. One that is no `SecateurError` has the traceback there as a note, and one
            of a library comes as an `OSError`, `MemoryError` or `RuntimeError`.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process, others = context.Process(target=_send_outcome, args=(sender, function, arguments)), active_children()
    try:
        with _safe_path():
            process.start()
        sender.close()  # the process holds the only one, so its death ends the wait below
        error, result = receiver.recv()
    except EOFError:
        process.join()
        raise SecateurError(
            f"its process died (exit code {process.exitcode}): unless it printed why, it was killed or out of memory"
        ) from None
    except (KeyboardInterrupt, SystemExit):
        for child in active_children():  # `process` may be half started
            if child not in others:
                child.terminate()
        raise
    process.join()
    if error is not None:
        raise error
    return result


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let a new process import no Python file of the current folder in place of a library."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _send_outcome(sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome = None, function(*arguments)
    except SecateurError as error:
        outcome = error, None
    except Exception as error:
        plain = _plain(error)
        plain.add_note(f"In the process that ran it:\n{traceback.format_exc()}")
        outcome = plain, None
    sender.send(outcome)


def _plain(error: Exception) -> Exception:
    """An error that can be sent: one of a library may take arguments that do not travel."""
    if type(error).__module__ in ("builtins", "torch"):
        return error
    kind = next((each for each in (OSError, MemoryError) if isinstance(error, each)), RuntimeError)
    return kind(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
