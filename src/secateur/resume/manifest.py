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
from secateur.storage.file_records import FileRecord, read_records
from secateur.storage.held_folder import HeldFolder
from secateur.storage.json_files import is_sealed, read_json, sealed

MANIFEST = "manifest.json"
SAVED = "saved"  # instead of the digest of a block whose file is gone, since whole shards hold it
_DIGEST = re.compile(r"[0-9a-f]{64}")


def journal_of(out: Path) -> Path:
    """The journal of runs to a folder. It lies next to the folder, which stays as it is until the model is finished."""
    return out.parent / f".{out.name}.secateur"


@dataclass(frozen=True)
class Manifest:
    """What has happened in a run.

    Args:
        identity: what a resumed run must share with the one that began, as nested plain data.
        blocks: SHA-256 of each finished block's file, or `SAVED`, by block; files are numbered in this order.
        seconds: of work so far, of every process that took part.
        replaces: the files of OUT that the run may replace, as they were when it began.
        outcome: SHA-256 of the file with the report and the plan of shards; "" while there are blocks to prune.
        shards: the finished model's weight files under the names that they have in the journal, shard by shard.
        files: every file of the finished model under its final name; empty until it is whole.
        notices: what the user should know of how the run was resumed.
        own_words: SHA-256 of the file with what the model wrote to be calibrated on; "" where there is none.
        channel_order: SHA-256 of the file with the order of the model's channels; "" where it is their own.
        allocation: SHA-256 of the file with the patterns of a chain of blocks, by the chain's first block; files are
            numbered in this order.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    replaces: dict[str, FileRecord] = field(default_factory=dict)
    outcome: str = ""
    shards: list[dict[str, FileRecord]] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    own_words: str = ""
    channel_order: str = ""
    allocation: dict[str, str] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """Whether a run has recorded anything: what it may replace comes first, then what it is a run of."""
        return bool(self.identity or self.replaces)


class RunManifest:
    """The manifest of the run that this process takes part in.

    Attributes:
        folder: the journal.
        state: what has happened.
    """

    def __init__(self, folder: Path, state: Manifest, held: HeldFolder | None = None) -> None:
        """Go on from a state; its seconds are those of earlier processes. `held` is the journal on rank 0."""
        self.folder, self.state, self._held = folder, state, held
        self._before, self._started = state.seconds, time.perf_counter()

    @property
    def held(self) -> HeldFolder:
        """The journal to write to. Rank 0 only."""
        assert self._held is not None
        return self._held

    @property
    def seconds(self) -> float:
        """Seconds of work so far, of every process that took part."""
        return self._before + time.perf_counter() - self._started

    def update(self, **changes: Any) -> None:
        """Record what has happened, and return when that is on the disk. Rank 0 only."""
        self.state = replace(self.state, **changes, seconds=self.seconds)
        self.held.write(MANIFEST, json.dumps(sealed(asdict(self.state)), indent=1) + "\n")

    def take_state_of_main(self) -> None:
        """Take rank 0's state."""
        self.state = distributed.broadcast_object(self.state)


def damaged(path: Path, why: object) -> SecateurError:
    """The error of a damaged journal, or of a damaged file in it."""
    return SecateurError(f"{path} is damaged ({why}): start again with ‹overwrite›")


def read_manifest(folder: Path) -> Manifest:
    """What an earlier process wrote; an empty manifest where none did.

    Raises:
        SecateurError: the manifest is damaged, or names files elsewhere.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return Manifest()
    try:
        if path.is_symlink() or not path.is_file():
            raise SecateurError("it is not a regular file")
        found = read_json(path)
        if not is_sealed(found):
            raise SecateurError("its content does not match its digest")
        return _checked(found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(path, error) from error


def _checked(found: dict[str, Any]) -> Manifest:
    """The manifest of plain data.

    Raises:
        SecateurError, KeyError, TypeError, AttributeError: data of another form.
    """
    blocks = {str(block): str(digest) for block, digest in found["blocks"].items()}
    outcome, own_words, channel_order = (str(found[name]) for name in ("outcome", "own_words", "channel_order"))
    allocation = {str(chain): str(digest) for chain, digest in found["allocation"].items()}
    if wrong := [digest for digest in blocks.values() if digest != SAVED and not _DIGEST.fullmatch(digest)]:
        raise SecateurError(f"{wrong[0]!r} is not a SHA-256")
    for digest in (outcome, own_words, channel_order, *allocation.values()):
        if digest and not _DIGEST.fullmatch(digest):
            raise SecateurError(f"{digest!r} is not a SHA-256")
    for part in ("environment", "calibration"):
        if not isinstance(found["identity"].get(part, {}), dict):
            raise SecateurError(f"its {part} is not a mapping")
    if not isinstance(found["identity"].get("calibration", {}).get("own_words", 0), int):
        raise SecateurError("its number of sequences that the model writes is not a number")
    shards = [read_records(shard) for shard in found["shards"]]
    files = read_records(found["files"])
    if (shards or files) and not outcome:
        raise SecateurError("it has shards of a model whose blocks are not finished")
    return Manifest(
        identity=dict(found["identity"]),
        blocks=blocks,
        seconds=float(found["seconds"]),
        replaces=read_records(found["replaces"]),
        outcome=outcome,
        shards=shards,
        files=files,
        notices=[str(notice) for notice in found["notices"]],
        own_words=own_words,
        channel_order=channel_order,
        allocation=allocation,
    )


class Unfinished(NamedTuple):
    """How far a run has come, in words, and what it is a run of."""

    progress: str
    identity: dict[str, Any]


def unfinished(out: Path) -> Unfinished | None:
    """The unfinished run to `out`, if there is one."""
    journal = journal_of(out)
    try:
        manifest = read_manifest(journal)
    except SecateurError:  # whoever resumes it is told why
        return Unfinished(f"a damaged journal is in {journal}", {})
    return Unfinished(progress_of(manifest, out), manifest.identity) if manifest.has_begun else None


def progress_of(manifest: Manifest, out: Path) -> str:
    """How far the run to `out` has come, in words."""
    done = f"{len(manifest.blocks)} finished blocks"
    if manifest.outcome:
        done = f"all blocks, some of them in {len(manifest.shards)} finished shards,"
    return f"{done} are in {journal_of(out)}"


def check_no_unfinished(out: Path) -> None:
    """Check that no run to `out` waits to be resumed.

    Raises:
        SecateurError: one does.
    """
    if (begun := unfinished(out)) is not None:
        raise unfinished_error(out, begun.progress)


def unfinished_error(out: Path, progress: str) -> SecateurError:
    """The error of a run that waits to be resumed."""
    return SecateurError(
        f"{out} has an unfinished run ({progress}): go on with ‹resume›, or start again with ‹overwrite›"
    )


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name was before, is now` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {_shown(before)}, is {_shown(now)}"


def _shown(value: Any) -> Any:
    """A value as a message shows it: the first digits of a digest."""
    return f"{value[:12]}..." if isinstance(value, str) and _DIGEST.fullmatch(value) else value
