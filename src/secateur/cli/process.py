"""The process of a command: its settings, its signals, and what its errors become."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable

from secateur.cli.console import note
from secateur.errors import SecateurError

_received: list[int] = []  # signals that asked this process to stop


def prepare_process() -> None:
    """Settings of the process that have to be there before torch is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers; ours show the same work
    # OpenMP threads that wait by spinning make a run many times slower on a busy machine (docs/performance.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is a background job, which ignores it
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, _frame: object) -> None:
    """End in order at Ctrl-C or SIGTERM: every context is left, and the command says how to resume."""
    _received.append(number)
    note("stopped" if number == signal.SIGINT else "stopped by SIGTERM")
    sys.exit(128 + number)


def run_explained(command: Callable[[], object]) -> None:
    """Run a command. What a user can mend prints a message and exits with 2; a bug leaves a file, and exits with 70."""
    try:
        _run_until_stopped(command)
    except SecateurError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" in process {rank}"
        note(f"error{where}: {error.for_command_line()}")
        sys.exit(2)
    except MemoryError as error:
        sys.exit(_out_of_memory(error))
    except OSError as error:  # a disk that fails, or a file that went away
        note(f"error: {error}: the machine could not do this. {_kept_traceback(error)}")
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for --help
            sys.exit(_out_of_memory(error))
        note(f"error: {type(error).__name__}: {error}")
        note(f"This is a bug in secateur. {_kept_traceback(error)}: please report it, with what you ran.")
        sys.exit(70)


def _run_until_stopped(command: Callable[[], object]) -> None:
    """Run a command. After a signal, it ends by that signal, whatever error it ends with."""
    try:
        command()
    finally:
        # Compiled code that calls Python can turn the SystemExit of `_stop` into an error: torch raises a ValueError.
        if _received:
            sys.exit(128 + _received[0])


def _out_of_memory(error: Exception) -> int:
    advice = "use a shorter --seq-len, a larger device, or --device cpu; prune also has --max-memory"
    note(f"error: out of memory ({error}): {advice}")
    return 2


def _kept_traceback(error: Exception) -> str:
    """Where the traceback of an error is."""
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="secateur-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:  # no disk to write to: the terminal has to do
        note(text)
        return "The traceback is above"
    return f"The traceback is in {path}"
