"""Files that are there whole or not at all, in a directory that one process uses at a time."""

import contextlib
import os
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from tsq_layers.errors import StateError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".writing.tmp"
LOCK_FILE = "journal.lock"


def write(path: Path, content: bytes) -> None:
    """Write a file beside its place, wait until it is on the disk, and put it in its place at once.

    Whenever the process is killed or the power fails, ``path`` is as before or holds all of
    ``content``. The file beside it has a fixed name: only the holder of the lock writes.

    Raises:
        OSError: nothing was put in place, or it is not sure to survive a power cut.
    """
    temporary = path.parent / TEMPORARY
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """The right to use a directory. It ends with :meth:`release`, and with the process, however that ends.

    POSIX: a record lock, which the system takes back from a dead process and which a forked child (a
    worker of a data loader that outlives its parent, say) does not inherit. Such a lock does not
    hold against the process that has it, hence the table of this process's locks. Elsewhere:
    an open file, which the system lets nobody delete.

    Raises:
        StateError: another run uses the directory.
        OSError: the file system cannot lock, or cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        status = directory.stat()
        self._key = (status.st_dev, status.st_ino)
        self._path = directory / LOCK_FILE
        self._file: IO[str] | None = None
        if self._key in _held:
            raise _in_use(directory, "in this process")
        try:
            self._file = _locked(self._path)
        except BlockingIOError:
            raise _in_use(directory, _holder(self._path)) from None
        _held[self._key] = self
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")  # for the message that another run shows
        self._file.flush()

    def release(self) -> None:
        """Let others use the directory; nothing happens if that was done."""
        if self._file is None:
            return
        del _held[self._key]
        self._file.close()
        self._file = None


_held: WeakValueDictionary[tuple[int, int], Lock] = WeakValueDictionary()


def _locked(path: Path) -> IO[str]:
    """The lock file, open and locked; ``BlockingIOError`` if another process has it."""
    if fcntl is None:
        try:
            path.unlink(
                missing_ok=True
            )  # left by a dead process; not possible while a living one has it open
            return path.open("x", encoding="utf-8")
        except (PermissionError, FileExistsError) as error:
            raise BlockingIOError from error
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        file.close()
        if isinstance(error, PermissionError):  # some systems say EACCES where others say EAGAIN
            raise BlockingIOError from error
        raise
    return file


def _holder(path: Path) -> str:
    """The process that a lock file names."""
    try:
        return f"process {int(path.read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another process"


def _in_use(directory: Path, by: str) -> StateError:
    return StateError(
        f"another run uses {directory} ({by}): wait until it has ended, or give another checkpoint_dir"
    )
