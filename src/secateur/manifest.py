"""What the journal of a run says is so. It is replaced whole, and read with suspicion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from secateur.durable import write_whole

FOLDER, MANIFEST = ".secateur", "manifest.json"
SAVED = "saved"  # in place of the digest of a block whose file is gone, since whole shards hold it
PLAIN = re.compile(r"(?!\.secateur$)[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*")


@dataclass
class Manifest:
    """What it doesn't name never happened.

    Args:
        identity: what a run that goes on must share with the one that began, as nested plain data.
        blocks: SHA-256 of each finished block's file, or `SAVED`, by its name; the files are numbered in this order.
        seconds: of work so far, of every process that took part.
        replaces: the files that `OUT` held when the run began.
        outcome: SHA-256 of the file that says what the run found, and how the model is saved; "" while there are
            blocks to prune.
        shards: SHA-256 of the whole files of the finished model by name, shard by shard.
        files: those of the whole finished model, as they are called in the journal and in `OUT`; once it is whole.
        notices: what the user should know of how the run went on.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    replaces: list[str] = field(default_factory=list)
    outcome: str = ""
    shards: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest, and wait until that is on the disk."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """What an earlier process wrote, if it wrote anything.

    Raises:
        ValueError: a damaged manifest, or one that names what lies elsewhere.
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
        raise ValueError(f"{path} is damaged ({error}): start again with --overwrite") from error
    names = [*manifest.replaces, *(name for shard in manifest.shards for name in shard)]
    names += [name for pair in manifest.files.items() for name in pair]
    if foreign := [name for name in names if not PLAIN.fullmatch(name)]:
        raise ValueError(f"{path} names {foreign[0]!r}, which is no plain file name: start again with --overwrite")
    return manifest


class Unfinished(NamedTuple):
    """How far a run has come, in words, and the files that it replaces or writes."""

    progress: str
    files: set[str]


def unfinished(out: Path) -> Unfinished | None:
    """The unfinished run that `out` holds, if it holds one."""
    if not (out / FOLDER / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(out / FOLDER)
    except ValueError:  # whoever goes on with it is told why
        return Unfinished(f"a damaged journal is in {out / FOLDER}", set())
    done = f"{len(manifest.blocks)} finished blocks"
    if manifest.outcome:
        done = f"all blocks, some of them in {len(manifest.shards)} finished shards,"
    return Unfinished(f"{done} are in {out / FOLDER}", {*manifest.replaces, *manifest.files.values()})


def differences_of(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`name: before, now ...` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences_of(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"
