"""Disks as a power cut may leave them: what was not flushed is lost, kept, or kept in another order.

A file's content is safe after fsync of the file, a folder's entries after fsync of the folder. A rename is one step, as
in every journalling file system.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class File:
    """A file: what is on the disk, and what programs see."""

    safe: bytes = b""
    seen: bytes = b""


@dataclass(eq=False)
class Folder:
    """A folder: its entries on the disk, and those that programs see."""

    safe: dict[str, File | Folder] = field(default_factory=dict)
    seen: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Change:
    """A change of entries that is not flushed. `other` is what was exchanged for `node`."""

    source: Folder | None
    source_name: str
    target: Folder | None
    target_name: str
    node: File | Folder
    other: File | Folder | None = None

    def apply(self) -> None:
        """Make it safe. A name that was never safe where it comes from is safe where it goes."""
        if self.source is not None:
            if self.source.safe.get(self.source_name) is self.node:
                del self.source.safe[self.source_name]
            if self.other is not None:
                self.source.safe[self.source_name] = self.other
        if self.target is not None:
            self.target.safe[self.target_name] = self.node


class Disk:
    """A disk on which recorded calls happen one by one."""

    def __init__(self, root: Path, base: Path) -> None:
        """Begin with a folder's content, all of it safe. `root` is where it lay when the calls were recorded."""
        self.root, self.top, self.pending = root, _loaded(base), []

    def _at(self, path: str) -> tuple[Folder, str]:
        parts = Path(path).relative_to(self.root).parts
        folder = self.top
        for part in parts[:-1]:
            found = folder.seen[part]
            assert isinstance(found, Folder)
            folder = found
        return folder, parts[-1] if parts else ""

    def happen(self, kind: str, first: str, second: str, data: bytes) -> None:
        """Let a recorded call happen."""
        if first.endswith(" (deleted)"):
            return
        folder, name = self._at(first)
        if name and name not in folder.seen and kind in "WSR":
            self._rename_of_safetensors(folder, name)
        node = self.top if name == "" else folder.seen.get(name)
        if kind in "OT" and node is None:
            self._change(Change(None, "", folder, name, File()))
        elif kind == "T":
            node.seen = b""
        elif kind == "W":
            node.seen += data
        elif kind == "S" and isinstance(node, File):
            node.safe = node.seen
        elif kind == "S":
            self._flush(node)
        elif kind == "M":
            self._change(Change(None, "", folder, name, Folder()))
        elif kind == "U":
            self._change(Change(folder, name, None, "", node))
        elif kind in "RX":
            target, new = self._at(second)
            self._change(Change(folder, name, target, new, node, target.seen[new] if kind == "X" else None))

    def _rename_of_safetensors(self, folder: Folder, name: str) -> None:
        """Safetensors writes to `.tmp...` and renames by a direct system call, which no preloaded library sees."""
        (made,) = [other for other in folder.seen if other.startswith(".tmp")]
        self._change(Change(folder, made, folder, name, folder.seen[made]))

    def _change(self, change: Change) -> None:
        if change.source is not None:
            del change.source.seen[change.source_name]
            if change.other is not None:
                change.source.seen[change.source_name] = change.other
        if change.target is not None:
            change.target.seen[change.target_name] = change.node
        self.pending.append(change)

    def _flush(self, folder: Folder) -> None:
        for change in [change for change in self.pending if folder in (change.source, change.target)]:
            change.apply()
            self.pending.remove(change)


def cut(disk: Disk, target: Path, how: str, chance: random.Random) -> None:
    """Write what is left of a disk: `lost` (all that is not flushed), `entries` (without content) or `mixed`.

    The disk is of no use afterwards.
    """
    for change in disk.pending:
        if how == "entries" or (how == "mixed" and chance.random() < 0.5):
            change.apply()
    _write(disk.top, target, how, chance)


def _write(folder: Folder, target: Path, how: str, chance: random.Random) -> None:
    target.mkdir(exist_ok=True)
    for name, node in folder.safe.items():
        if isinstance(node, Folder):
            _write(node, target / name, how, chance)
            continue
        content = node.safe
        if how == "mixed" and node.seen != node.safe:
            half = len(node.seen) // 2
            choices = (node.safe, node.seen, node.seen[:half], node.seen[:half] + bytes(len(node.seen) - half))
            content = chance.choice(choices)
        (target / name).write_bytes(content)


def _loaded(path: Path) -> Folder:
    folder = Folder()
    for entry in path.iterdir():
        node = _loaded(entry) if entry.is_dir() else File(entry.read_bytes(), entry.read_bytes())
        folder.safe[entry.name] = folder.seen[entry.name] = node
    return folder


def records(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """The calls that `shim.c` wrote to a file: kind, path, other path, data."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        kind = chr(content[at])
        sizes = struct.unpack_from("=3I", content, at + 1)
        at += 13
        parts = []
        for size in sizes:
            parts.append(content[at : at + size])
            at += size
        yield kind, parts[0].decode(), parts[1].decode(), parts[2]
