"""`secateur` in its own process, forked from one that has imported transformers: importing it takes ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # as the command does before it imports what the server has imported
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["secateur.run", "secateur.cli.app", "transformers.models.llama.modeling_llama"])
NO_LIMIT = resource.RLIM_INFINITY


class Done(NamedTuple):
    """What a command leaves that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """`secateur ARGUMENTS`, started; a file that it writes may hold `most_bytes`."""

    def __init__(self, *arguments: object, most_bytes: int = NO_LIMIT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        self._process = SERVER.Process(target=_main, args=([*map(str, arguments)], self._streams, most_bytes))
        self._process.start()

    def send(self, how: signal.Signals) -> None:
        assert self._process.pid
        os.kill(self._process.pid, how)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, or the command has ended."""
        while self._process.is_alive() and not condition():
            time.sleep(0.001)

    def wait(self, seconds: float = 300) -> Done:
        """Wait for its end."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it still runs after {seconds} s"
        with self._folder:
            return Done(self._process.exitcode, *(Path(path).read_text() for path in self._streams))


def command(*arguments: object, most_bytes: int = NO_LIMIT) -> Done:
    """Run `secateur ARGUMENTS`."""
    return Command(*arguments, most_bytes=most_bytes).wait()


def _main(arguments: list[str], streams: list[str], most_bytes: int) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    sys.argv = ["secateur", *arguments]
    from secateur.cli.app import main

    main()
