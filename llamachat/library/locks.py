"""One process at a time makes what others wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamachat.errors import TransferError
from llamachat.library import Notice


@contextmanager
def locked(path: Path, notice: Notice, waiting: str) -> Iterator[bool]:
    """Hold the lock that is the file `path`; yields whether another process had to be waited for.

    Args:
        path: made if it is not there.
        notice: told what is waited for.
        waiting: the words for it.

    Raises:
        TransferError: the file cannot be made.
    """
    from filelock import FileLock, Timeout

    has_waited = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            has_waited = True
            notice(waiting)
            lock.acquire()
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
    try:
        yield has_waited
    finally:
        lock.release()
