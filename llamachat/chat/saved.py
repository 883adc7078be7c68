"""Saved conversations: a folder of files, each of which one process at a time writes. Torch-free.

A file grows by lines as its conversation does. Where the conversation changed it is replaced in one
step. Either way it can be read after a crash, but for the line that was being written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat import settings
from llamachat.chat.templates import Message
from llamachat.chat.transcript import Transcript, Writer, parse
from llamachat.errors import DamagedFileError, TransferError, UsageError
from llamachat.files import write_atomically

if TYPE_CHECKING:
    from filelock import BaseFileLock

SUFFIX = ".jsonl"
MAX_FILE_BYTES = 256 << 20
_NAME = re.compile(r"[^\W.][\w. -]{0,99}")
_HEAD_BYTES = 2**16  # what `listed` reads of a file
_LOCKS = ".locks"


@dataclass(frozen=True, slots=True)
class Listed:
    """A conversation in the folder, as its first lines show it.

    Attributes:
        name: what `--session` takes.
        title: the first words of the first question.
        model: who answered first.
        changed: when it was last written, in seconds since 1970.
        size_bytes: of the file.
    """

    name: str
    title: str
    model: str
    changed: float
    size_bytes: int

    @property
    def when(self) -> str:
        """When it was last written, for people."""
        return datetime.fromtimestamp(self.changed).strftime("%Y-%m-%d %H:%M")


def folder() -> Path:
    """Where conversations are kept; only its owner may look into it.

    Raises:
        TransferError: it cannot be made.
    """
    path = settings.data_dir()[0] / "sessions"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
    return path


def path_of(name: str) -> Path:
    """Where a conversation is: by its name in the folder, or by a path.

    Raises:
        UsageError: it is neither.
    """
    if name.endswith(SUFFIX) or any(mark in name for mark in ("/", "\\")):
        return Path(name).expanduser().absolute()
    if not _NAME.fullmatch(name) or name != name.strip():
        raise UsageError(
            f"a session cannot be called {name!r}", hint="letters, digits, . _ - and spaces"
        )
    return folder() / f"{name}{SUFFIX}"


def new_name() -> str:
    """A name that is free, by date and time."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return free_name(stamp)


def free_name(name: str) -> str:
    """The name, with a number if it is taken."""
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(it for it in names if not (folder() / f"{it}{SUFFIX}").exists())


def saved() -> list[Path]:
    """Every file of the folder, the one that was written last first."""

    def changed(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    found = (p for p in folder().glob(f"*{SUFFIX}") if not p.name.startswith(".") and p.is_file())
    return sorted(found, key=lambda path: (changed(path), path.name), reverse=True)


def names() -> list[str]:
    """The name of every conversation of the folder, the one that was written last first."""
    return [path.stem for path in saved()]


def listed() -> list[Listed]:
    """Every conversation of the folder, the one that was written last first."""
    found = []
    for path in saved():
        with suppress(OSError), path.open("rb") as file:
            size, changed = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime
            head = parse(file.read(_HEAD_BYTES).splitlines())
            model = str((head.run or {}).get("model", ""))
            found.append(Listed(path.stem, head.title, model, changed, size))
    return found


def read(path: Path) -> Transcript:
    """What a file says.

    Raises:
        UsageError: there is none.
        DamagedFileError: it is no conversation, or longer than one can be.
        TransferError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise DamagedFileError(
                    f"{path}: {size:,} bytes, expected at most {MAX_FILE_BYTES:,}"
                )
            transcript = parse(file.read(MAX_FILE_BYTES).split(b"\n"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there is no such conversation", hint="llamachat sessions list"
        ) from None
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
    if size and not transcript.messages and transcript.problems:
        raise DamagedFileError(f"{path}: is no conversation: {transcript.problems[0]}")
    return transcript


def remove(path: Path) -> None:
    """Delete a conversation.

    Raises:
        UsageError: there is none, or it is in use.
        TransferError: it cannot be deleted.
    """
    lock = locked(path)
    if lock is None:
        raise UsageError(f"{path.stem} is open in another process")
    try:
        path.unlink()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such conversation") from None
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
    finally:
        lock.release()


def locked(path: Path) -> BaseFileLock | None:
    """The right to write a file, as long as this process runs; None: another one has it.

    Raises:
        TransferError: there is no place for locks.
    """
    import hashlib

    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    at = folder() / _LOCKS / f"{name}.lock"
    try:
        at.parent.mkdir(mode=0o700, exist_ok=True)
        lock = FileLock(at, mode=0o600)
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise TransferError(f"{at}: {error.strerror or error}") from error
    return lock


class SessionFile:
    """One file, which this process may write.

    Attributes:
        path: where it is, or will be once there is something to keep.
    """

    def __init__(self, path: Path, lock: BaseFileLock, found: Transcript | None = None) -> None:
        self.path = path
        self._lock = lock
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._created = found.created if found and found.created else now
        self._extra = found.extra if found else None
        self._messages: tuple[Message, ...] = ()
        self._writer: Writer | None = None  # None: what the file says is not what would be written
        self._size = 0

    def save(self, messages: Sequence[Message], run: Mapping[str, Any]) -> None:
        """Keep the conversation as it is now.

        Raises:
            OSError: it cannot be written; what the file said before is still there.
        """
        n = len(self._messages)
        if len(messages) >= n and all(map(_is, messages, self._messages)):
            if len(messages) == n:
                return
            if self._writer is not None and self._append(self._writer, messages[n:]):
                self._messages = tuple(messages)
                return
        self._replace(messages, run)
        self._messages = tuple(messages)

    def holds(self, messages: Sequence[Message]) -> None:
        """What it says is this conversation: there is nothing to write until that changes."""
        self._messages = tuple(messages)

    def close(self) -> None:
        """Let other processes write it."""
        self._lock.release()

    def _append(self, writer: Writer, messages: Sequence[Message]) -> bool:
        """Add lines; False: the file is not the one that was written last."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return False
        self._writer = None  # until it is known that all went well
        try:
            if os.fstat(file).st_size != self._size:
                return False
            lines = b"".join(map(writer.message, messages))
            try:
                _write(file, lines)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, self._size)
                raise
        finally:
            os.close(file)
        self._size += len(lines)
        self._writer = writer
        return True

    def _replace(self, messages: Sequence[Message], run: Mapping[str, Any]) -> None:
        """Write a new file and put it in the old one's place, in one step."""
        self._writer = None
        writer = Writer()
        made = (m.record.run for m in messages if m.record and m.record.run)
        lines = writer.header(self._created, next(made, run), self._extra)
        lines += b"".join(map(writer.message, messages))
        write_atomically(self.path, lines, mode=0o600)
        self._writer, self._size = writer, len(lines)


def _is(a: object, b: object) -> bool:
    return a is b


def _write(file: int, content: bytes) -> None:
    """Write all of it, and wait until the disk has it."""
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.fsync(file)
