"""What is fuzzed: every file that secateur reads, by the command that reads it, with hypothesis.

A command must end with an exit code that is documented, without a traceback, in time, and in little memory. Valid files
are mutated: bytes of all, and values in the tree of JSON files. `corpus/` holds inputs that once broke a promise.
"""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
SECONDS, MEMORY = 10, 500_000_000
TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 60
ODD = [
    None, True, -1, 0, 2, 10**7, 10**30, 1.5, -0.0, 1e308, "", "x", "../x", "/etc/passwd", "a\x00b", "\x1b[31m",
    "[red]", "x" * 300, [], {}, [[]], [5], {"": 5}, {"a": {"a": {}}}, "\ud800",
]  # fmt: skip
TOKENS = [
    b"", b"\x00", b"\xff" * 8, b"\x00" * 8, b"{", b"}", b"[" * 2000, b'"', b"1e400", b"NaN", b"-1", b"\\ud800", b"\n",
    b"\xff\xff\xff\x7f", b"\x01\x00\x00\x00\x00\x00\x00\x80", b": ", b"- ", b"&a *a",
    b"!!python/object:os.system x", b"\t",
]  # fmt: skip


class BrokenPromiseError(AssertionError):
    """A command did what none may do."""


@dataclass(frozen=True)
class Target:
    """A file that a command reads.

    Args:
        name: of the target, and of its folder in the corpus.
        seed: a valid file's content.
        place: where the content is written.
        command: arguments of the command that reads it.
        codes: exit codes that it may have.
        is_json: whether its tree is mutated too.
        repair: makes the checksums of a mutated file right, as a forger would.
        reset: undoes what an accepted input changed.
    """

    name: str
    seed: bytes
    place: Path
    command: tuple[str, ...]
    codes: tuple[int, ...] = (0, 2)
    is_json: bool = False
    repair: Callable[[bytes], bytes] | None = None
    reset: Callable[[], None] = lambda: None

    def check(self, content: bytes) -> int:
        """Run the command on an input; its exit code.

        Raises:
            BrokenPromiseError: it breaks a promise.
        """
        self.reset()
        self.place.write_bytes(content)
        with limits(len(content)):
            code, printed = run(self.command)
        if code not in self.codes or "Traceback" in printed or "\x1b" in printed:
            raise BrokenPromiseError(f"{self.name}: exit code {code}: {printed[-800:]}")
        return code

    def inputs(self) -> st.SearchStrategy[bytes]:
        """Mutated files."""
        changed = st.lists(
            st.tuples(st.floats(0, 1), st.sampled_from(("put", "cut", "replace")), tokens()), min_size=1, max_size=4
        )
        by_bytes = changed.map(lambda edits: edit_bytes(self.seed, edits))
        if self.repair is not None:
            return by_bytes | by_bytes.map(self.repair)
        if not self.is_json:
            return by_bytes
        places = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ODD)), min_size=1, max_size=3)
        return by_bytes | places.map(lambda edits: edit_tree(json.loads(self.seed), edits))


def tokens() -> st.SearchStrategy[bytes]:
    return st.sampled_from(TOKENS) | st.binary(max_size=8)


def edit_bytes(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Put in, overwrite, or cut off."""
    for where, how, token in edits:
        at = int(where * len(content))
        if how == "cut":
            content = content[:at]
        else:
            content = content[:at] + token + content[at + (len(token) if how == "replace" else 0) :]
    return content


def edit_tree(tree: Any, edits: list[tuple[int, Any]]) -> bytes:
    """Put odd values at places of a JSON tree. What has a seal gets a new one, as a forger would."""
    from secateur.storage.json_files import SEAL, sealed

    had_seal = isinstance(tree, dict) and tree.pop(SEAL, None)
    for number, value in edits:
        places = list(_places(tree))
        if places:
            holder, key = places[number % len(places)]
            holder[key] = copy.deepcopy(value)
    if had_seal:
        with suppress(TypeError, ValueError):
            tree = sealed(tree)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def repair_packed(content: bytes) -> bytes:
    """Put the right checksums into every packed tensor of a file that still has a header."""
    from secateur.packed.encoding import HEADER, MAGIC, sealed_header

    found, at = bytearray(content), content.find(MAGIC)
    while at >= 0 and at + HEADER.size <= len(found):
        *fields, stored, _, _ = HEADER.unpack_from(found, at)
        body = found[at + HEADER.size : at + HEADER.size + stored]
        found[at : at + HEADER.size] = sealed_header((*fields, stored, zlib.crc32(body)))
        at = content.find(MAGIC, at + 8)
    return bytes(found)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


@contextmanager
def limits(size: int) -> Iterator[None]:
    """Seconds, and memory above what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * size + MEMORY, before[1]))

    def late(*_: Any) -> None:
        raise BrokenPromiseError(f"more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(command: tuple[str, ...]) -> tuple[int, str]:
    """Run a command in this process; its exit code and all that it printed."""
    from secateur.cli import app
    from secateur.comparison import compare

    printed = io.StringIO()
    arguments, sys.argv = sys.argv, ["secateur", *command]
    run_cell, compare._in_own_process = compare._in_own_process, _run_no_cell
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            app.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = arguments
        compare._in_own_process = run_cell
    return code, printed.getvalue()


def targets(folder: Path) -> dict[str, Target]:
    """Every target, with its valid files in a folder."""
    from models import save_checkpoint, save_gguf

    import secateur
    from secateur.resume.manifest import journal_of

    model, text, pruned, out = folder / "model", folder / "text.txt", folder / "pruned", folder / "out"
    save_checkpoint(model, num_hidden_layers=1, attention_bias=True, mlp_bias=True)  # kernels read biases
    text.write_text(TEXT)
    arguments: dict[str, Any] = {"pattern": "50%", "solver": "magnitude", "samples": 4, "seq_len": 32}
    secateur.prune(model, pruned, calibration=text, **arguments)
    save_gguf(folder / "model.gguf", layers=1)
    os.environ["SECATEUR_CACHE"] = str(folder / "cache")
    prune = ("prune", str(model), str(out), "--calibration", str(text), "--pattern", "50%", "--solver", "magnitude",
             "--samples", "4", "--seq-len", "32", "--resume")  # fmt: skip
    short = ("--max-tokens", "64", "--seq-len", "32")
    shorter = ("--max-tokens", "64", "--seq-len", "8")  # the kernels' own products are for small batches
    journal, manifest = journal_of(out), _unfinished(folder, prune)
    (folder / "compare").mkdir()
    cell = {"perplexity": {"a": 1.5}, "eval_seconds": 1.0, "seconds": 2.0, "tasks": {"t": {"acc,none": 0.5}}}
    comparison = {"settings": {}, "cells": {"dense": cell, "magnitude 50% 0": cell}, "command": "x"}
    recipe = secateur.Recipe().save
    recipe(folder / "recipe.yaml")

    def journalled() -> None:
        for path in (out, journal):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "journal", journal)

    def copied(name: str) -> Callable[[], None]:
        def reset() -> None:
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(model, folder / name)

        return reset

    for name in ("damaged", "configured"):
        copied(name)()
    for compression in ("zstd", "none"):
        secateur.pack(pruned, folder / f"packed-{compression}", compression=compression)
    secateur.pack(pruned, folder / "packed-int8", values="int8")
    found = [
        Target(
            "gguf", (folder / "model.gguf").read_bytes(), folder / "fuzzed.gguf",
            ("eval", str(folder / "fuzzed.gguf"), *short),
        ),
        Target(
            "safetensors", (model / "model.safetensors").read_bytes(), folder / "damaged" / "model.safetensors",
            ("eval", str(folder / "damaged"), "--text", str(text), *short), reset=copied("damaged"),
        ),
        Target(
            "config", (model / "config.json").read_bytes(), folder / "configured" / "config.json",
            ("eval", str(folder / "configured"), "--text", str(text), *short), is_json=True,
        ),
        Target("manifest", manifest, journal / "manifest.json", prune, is_json=True, reset=journalled),
        Target(
            "metadata", (pruned / "secateur.json").read_bytes(), pruned / "secateur.json", ("inspect", str(pruned)),
            (0, 1, 2), is_json=True,
        ),
        Target(
            "comparison", json.dumps(comparison).encode(), folder / "compare" / "compare.json",
            ("compare", str(model), "--out", str(folder / "compare"), "--recipes", "magnitude", "--patterns", "50%"),
            is_json=True,
        ),
        Target(
            "recipe", (folder / "recipe.yaml").read_bytes(), folder / "fuzzed.yaml",
            ("recipe", str(folder / "fuzzed.yaml")),
        ),
        Target(
            "jsonl", b'{"text": "some words"}\n{"messages": [{"role": "user", "content": "more"}]}\n' * 4,
            folder / "fuzzed.jsonl", ("eval", str(model), "--text", str(folder / "fuzzed.jsonl"), *short),
        ),
        *[
            Target(
                f"packed {kind}", (folder / f"packed-{kind}" / "packed.safetensors").read_bytes(),
                folder / f"packed-{kind}" / "packed.safetensors",
                ("eval", str(folder / f"packed-{kind}"), "--text", str(text), *shorter), repair=repair_packed,
            )
            for kind in ("zstd", "none", "int8")
        ],
    ]  # fmt: skip
    return {target.name: target for target in found}


def _run_no_cell(*_: Any, **__: Any) -> None:
    """Stand for a cell that an input lacks: to prune for it is not what is fuzzed."""
    from secateur.errors import SecateurError

    raise SecateurError("a cell is missing")


def _unfinished(folder: Path, prune: tuple[str, ...]) -> bytes:
    """Leave a journal with every block finished in `journal`; its manifest."""
    from secateur.resume import publish
    from secateur.resume.manifest import MANIFEST, journal_of

    put_in_place = publish.put_in_place

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    publish.put_in_place = stop
    try:
        run(prune)
    finally:
        publish.put_in_place = put_in_place
    shutil.move(journal_of(folder / "out"), folder / "journal")
    return (folder / "journal" / MANIFEST).read_bytes()


def corpus_of(name: str) -> list[bytes]:
    """Inputs that once broke a promise."""
    folder = CORPUS / name
    return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []
