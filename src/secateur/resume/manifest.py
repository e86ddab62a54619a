"""The run's manifest; replaced atomically, validated on load."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from secateur.errors import SecateurError
from secateur.runtime import distributed
from secateur.runtime.atomic_files import atomic_write

FOLDER, MANIFEST = ".secateur", "manifest.json"
SAVED = "saved"  # instead of the digest of a block whose file is gone, since whole shards hold it
PLAIN_NAME = re.compile(r"(?!\.secateur$)[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*")


@dataclass(frozen=True)
class Manifest:
    """What has happened in a run.

    Args:
        identity: what a resumed run must share with the one that began, as nested plain data.
        blocks: SHA-256 of each finished block's file, or `SAVED`, by block; files are numbered in this order.
        seconds: of work so far, of every process that took part.
        replaces: files that OUT held when the run began.
        outcome: SHA-256 of the file with the report and the plan of shards; "" while there are blocks to prune.
        shards: SHA-256 of the finished model's weight files by name, shard by shard.
        files: the whole finished model's files: name in the journal -> name in OUT; empty until it is whole.
        notices: what the user should know of how the run was resumed.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    replaces: list[str] = field(default_factory=list)
    outcome: str = ""
    shards: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


class RunManifest:
    """The manifest of the run that this process takes part in.

    Attributes:
        folder: the journal.
        state: what has happened.
    """

    def __init__(self, folder: Path, state: Manifest) -> None:
        """Go on from a state; its seconds are those of earlier processes."""
        self.folder, self.state = folder, state
        self._before, self._started = state.seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of work so far, of every process that took part."""
        return self._before + time.perf_counter() - self._started

    def update(self, **changes: Any) -> None:
        """Record what has happened, and return when that is on the disk. Rank 0 only."""
        self.state = replace(self.state, **changes, seconds=self.seconds)
        atomic_write(self.folder / MANIFEST, json.dumps(asdict(self.state), indent=1) + "\n")

    def take_state_of_main(self) -> None:
        """Take rank 0's state."""
        self.state = distributed.broadcast_object(self.state)


def read_manifest(folder: Path) -> Manifest:
    """What an earlier process wrote; an empty manifest where none did.

    Raises:
        SecateurError: the manifest is damaged, or names files elsewhere.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return Manifest()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(
            identity=dict(found["identity"]),
            blocks={str(block): str(digest) for block, digest in found["blocks"].items()},
            seconds=float(found["seconds"]),
            replaces=[str(name) for name in found["replaces"]],
            outcome=str(found["outcome"]),
            shards=[{str(name): str(digest) for name, digest in shard.items()} for shard in found["shards"]],
            files={str(made): str(name) for made, name in found["files"].items()},
            notices=[str(notice) for notice in found["notices"]],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"{path} is damaged ({error}): start again with ‹overwrite›") from error
    names = [*manifest.replaces, *(name for shard in manifest.shards for name in shard)]
    names += [name for pair in manifest.files.items() for name in pair]
    if foreign := [name for name in names if not PLAIN_NAME.fullmatch(name)]:
        raise SecateurError(
            f"{path} names {foreign[0]!r}, which is not a plain file name: start again with ‹overwrite›"
        )
    return manifest


class Unfinished(NamedTuple):
    """How far a run has come, in words, and the files that it replaces or writes."""

    progress: str
    files: set[str]


def unfinished(out: Path) -> Unfinished | None:
    """The unfinished run in `out`, if there is one."""
    if not (out / FOLDER / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(out / FOLDER)
    except SecateurError:  # whoever resumes it is told why
        return Unfinished(f"a damaged journal is in {out / FOLDER}", set())
    done = f"{len(manifest.blocks)} finished blocks"
    if manifest.outcome:
        done = f"all blocks, some of them in {len(manifest.shards)} finished shards,"
    return Unfinished(f"{done} are in {out / FOLDER}", {*manifest.replaces, *manifest.files.values()})


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name was before, is now` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"
