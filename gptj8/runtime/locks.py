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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

_MOST_FAILURES = 1000


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes; yield False if another process holds it and `wait` is False.

    Args:
        file: lock file; created together with its directory, and deleted afterwards.
        wait: wait for the lock, which is then always acquired.

    Raises:
        OSError: if the file cannot be created, for example because another file is in the place of
            its directory.
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
    failures = 0
    while True:
        if file.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(file.parent))
        with ExitStack() as attempt, _passing(failures >= _MOST_FAILURES):
            failures += 1
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = attempt.enter_context(open(file, "w"))
            failures = 0
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
                return attempt.pop_all()


def _passing(is_last: bool) -> AbstractContextManager[None]:
    """Suppress errors that mean that the directory was deleted or created at this moment.

    A link to nowhere in the place of the directory, and /proc, cause them each time.
    """
    return nullcontext() if is_last else suppress(FileNotFoundError, FileExistsError)
