"""Locks between processes that leave no file behind.

The kernel releases a lock of `flock` when its process ends, however it ends. The file is deleted by
whoever holds the lock. So after acquiring a lock, a process compares the file it has locked with
the file that has the name now, and tries again if they differ: the first one was deleted meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes; yield False if another process holds it and `wait` is False.

    Args:
        file: lock file; created together with its directory, and deleted afterwards.
        wait: wait for the lock, which is then always acquired.

    Raises:
        NotADirectoryError: if a file is in the place of the directory.
    """
    held = _acquire(file, wait)
    if held is None:
        yield False
        return
    with held:
        try:
            yield True
        finally:
            with suppress(FileNotFoundError):  # deleted by hand, or together with its directory
                file.unlink()


def _acquire(file: Path, wait: bool) -> ExitStack | None:
    while True:
        if file.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(file.parent))
        # Both errors mean that the directory was deleted or created at this moment.
        with ExitStack() as attempt, suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = attempt.enter_context(open(file, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
                return attempt.pop_all()
