"""A folder that is held by its descriptor: everything is written whole, flushed, and never through a link.

What happens to the folder's path meanwhile changes nothing for what is held. New content goes to a random name that
did not exist, and takes its place by an atomic rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path

from secateur.storage.file_records import FileRecord, record_of
from secateur.storage.paths import real_path

PARTIAL = ".partial-"  # begins the name of what is being written; what a killed process left is known by it
_OF_LIBRARIES = re.compile(r"\.?tmp\w{6,8}")  # what safetensors and tempfile call theirs
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NOT_OFFERED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_RENAME_EXCHANGE = 2  # renameat2's, and RENAME_SWAP of macOS's renameatx_np


class HeldFolder:
    """An existing folder, until `close`.

    Attributes:
        path: where it was when it was opened.
    """

    def __init__(self, path: Path, within: HeldFolder | None = None) -> None:
        """Hold a folder.

        Args:
            path: of the folder; the name of a subfolder with `within`.
            within: the folder that it is in.

        Raises:
            OSError: there is none, it can't be read, or it is a link.
        """
        self.path = path if within is None else within.path / path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within and within._fd)

    def __enter__(self) -> HeldFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def is_still_there(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Names of what it holds, sorted."""
        return sorted(os.listdir(self._fd))  # noqa: PTH208 - by descriptor

    def is_file(self, name: str) -> bool:
        """Whether it holds a regular file of a name."""
        return stat.S_ISREG(self._mode(name))

    def is_folder(self, name: str) -> bool:
        """Whether it holds a folder of a name."""
        return stat.S_ISDIR(self._mode(name))

    def _mode(self, name: str) -> int:
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0

    def record(self, name: str) -> FileRecord:
        """The record of a regular file. Cost: one read of it.

        Raises:
            OSError: it is gone, can't be read, or is something else.
        """
        return record_of(name, self._fd)

    def subfolder(self, name: str) -> HeldFolder:
        """Hold a folder in this one; made where there is none.

        Raises:
            OSError: it can't be made, or is something else.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self._fd)
        return HeldFolder(Path(name), self)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all, and return when it is on the disk.

        Raises:
            OSError: the disk is full or not writable; nothing is left of the attempt.
        """
        partial = self.new_name()
        try:
            _write_all(os.open(partial, _NEW, 0o666, dir_fd=self._fd), content)
            self.rename(partial, name)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one that explains
                self.remove(partial)
            raise
        self.flush()

    def new_name(self) -> str:
        """A name that nothing has, for a file or folder that gets its own by `rename` when it is whole."""
        return f"{PARTIAL}{secrets.token_hex(8)}"

    def rename(self, name: str, new: str, target: HeldFolder | None = None) -> None:
        """Rename a file or folder, in place of a file or an empty folder there, into another folder where one is given.

        Durable after `flush` of the folders.
        """
        os.replace(name, new, src_dir_fd=self._fd, dst_dir_fd=(target or self)._fd)

    def exchange(self, name: str, other: HeldFolder, other_name: str) -> bool:
        """Exchange two folders in one step; False where the system can't."""
        return _exchange(self._fd, name, other._fd, other_name)

    def lock(self, name: str, wait: bool = False) -> int:
        """Lock a file in the folder, made where there is none; returns its descriptor, which holds the lock.

        Raises:
            BlockingIOError: another process holds it, and is not waited for.
            OSError: it can't be made, or is a link.
        """
        while True:
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=self._fd)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(handle), os.stat(name, dir_fd=self._fd, follow_symlinks=False)):
                    return handle
            except FileNotFoundError:  # its owner removed it, and was done
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def remove_folder(self, name: str) -> None:
        """Remove a folder with all that is in it, or a link itself, where there is one."""
        if self.is_folder(name):
            shutil.rmtree(name, dir_fd=self._fd)
        else:
            self.remove(name)

    def remove_empty_folder(self, name: str) -> bool:
        """Remove a folder unless it holds something; whether it is gone."""
        try:
            os.rmdir(name, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def remove_partial(self) -> None:
        """Remove what a killed process was writing."""
        for name in self.names():
            if name.startswith(PARTIAL) or _OF_LIBRARIES.fullmatch(name):
                self.remove_folder(name)

    def flush_file(self, name: str) -> None:
        """Flush a file's content to the disk."""
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._fd)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def flush(self) -> None:
        """Flush the folder's entries to the disk."""
        os.fsync(self._fd)


def _write_all(handle: int, content: str | bytes) -> None:
    """Write, flush and close. An error of closing does not hide one of writing."""
    left = memoryview(content.encode() if isinstance(content, str) else content)
    try:
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(handle)
        raise
    os.close(handle)


def _exchange(from_fd: int, name: str, to_fd: int, other: str) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if call is None:
        return False
    if call(from_fd, os.fsencode(name), to_fd, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_OFFERED:
        return False
    raise OSError(number, os.strerror(number), other)


def make_folders(path: Path) -> list[Path]:
    """Make a folder with its parents, durably; returns those that were made, the innermost first.

    Raises:
        OSError: it can't be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        with HeldFolder(folder.parent) as parent:
            parent.flush()
    return missing


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and return when it is on the disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    with HeldFolder(real_path(path.parent)) as folder:
        folder.write(path.name, content)
