"""Files fetched whole or not at all: several at once, resumed, verified before they get their name.

A partial file lies beside the blob that it becomes and only ever grows by bytes in order, so its
length is all that there is to know about it, whatever ended the process that wrote it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias

from llamachat.errors import LlamachatError, TransferError
from llamachat.library import Notice, Progress

WORKERS = 4  # files at once
TRIES = 6  # that bring no byte, in a row
BACKOFF_S = 1.0  # before the second try; doubles with each
PATIENCE_S = 300.0  # with a server that asks to wait
_POLL_S = 0.1
_FAREWELL_S = 1.0  # for threads to finish the chunk at hand
_CHUNK_BYTES = 1 << 20
_SUFFIX = ".llamachat-partial"
_ROOM = "make room, or name another folder in HF_HUB_CACHE; what has arrived is kept"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that can be fetched.

    Attributes:
        path: in its repository.
        size_bytes: its length.
        digest: its sha256, or the sha1 that git gives a blob of this content; in hex.
    """

    path: str
    size_bytes: int
    digest: str

    def hasher(self) -> hashlib._Hash:
        """What comes to `digest` over the whole content."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        header = f"blob {self.size_bytes}\0".encode()  # git-scm.com/book, Git Objects
        return hashlib.sha1(header, usedforsecurity=False)


class Interrupted(Exception):
    """The network broke off: the same request may succeed later.

    Attributes:
        cause: what to raise if it does not.
        wait_s: how long the server asks to wait, if it does.
    """

    def __init__(self, cause: LlamachatError, wait_s: float | None = None) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.wait_s = wait_s


# Bytes of a file from an offset on, each chunk with its own offset: the one asked for, or 0 where
# the server knows no ranges. It may end early. Raises Interrupted, or what is final.
Read: TypeAlias = Callable[[RemoteFile, int], Generator[tuple[int, bytes], None, None]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where files go: `blobs` gets each under its digest; `locks` holds one lock for each.

    `has` says whether a file is there already, and good.
    """

    blobs: Path
    locks: Path
    has: Callable[[RemoteFile], bool]

    def blob(self, file: RemoteFile) -> Path:
        """The verified file."""
        return self.blobs / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """The file as far as it was fetched."""
        return self.blobs / f"{file.digest}{_SUFFIX}"

    def held_bytes(self, file: RemoteFile) -> int:
        """How much of a file is there."""
        if self.has(file):
            return file.size_bytes
        try:
            return min(self.partial(file).stat().st_size, file.size_bytes)
        except OSError:
            return 0


def missing_bytes(files: Sequence[RemoteFile], place: Place) -> int:
    """How much of `files` is not there."""
    return sum(file.size_bytes - place.held_bytes(file) for file in files)


def fetch(
    files: Sequence[RemoteFile],
    place: Place,
    read: Read,
    *,
    notice: Notice,
    progress: Progress | None,
) -> None:
    """Bring every file to `place`; what another process is fetching is waited for.

    Raises:
        TransferError: the disk is full or read-only, or the network failed for good; what arrived
            stays, for the next time.
        LlamachatError: whatever `read` raises.
    """
    files = sorted({file.digest: file for file in files}.values(), key=lambda file: file.size_bytes)
    try:
        place.blobs.mkdir(parents=True, exist_ok=True)
        place.locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _disk_failure(error, files, place) from error
    _require_space(files, place)
    total = sum(file.size_bytes for file in files)
    workers = _Workers(files, place, read)
    show = progress or (lambda _done, _total: None)
    show(workers.done_bytes(), total)
    with workers:
        for message in workers.messages():
            show(workers.done_bytes(), total)
            if message:
                notice(message)
    show(total, total)


class _Workers:
    """Threads that fetch files, the largest first. All that they say comes out of `messages`."""

    def __init__(self, files: Sequence[RemoteFile], place: Place, read: Read) -> None:
        self._place, self._read, self._files = place, read, files
        self._waiting = list(files)
        self._held = {file.digest: place.held_bytes(file) for file in files}
        self._said: SimpleQueue[str | Exception | None] = SimpleQueue()
        self._stop = threading.Event()
        # Daemons: Ctrl-C does not wait for a network that is silent.
        self._threads = [
            threading.Thread(target=self._work, name="download", daemon=True)
            for _ in range(min(WORKERS, len(files)))
        ]

    def __enter__(self) -> _Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        deadline = time.monotonic() + _FAREWELL_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def done_bytes(self) -> int:
        """Of all files together."""
        return sum(self._held.values())

    def messages(self) -> Iterator[str]:
        """What people should know, until all is fetched; often just "", to look at the progress.

        Raises:
            LlamachatError: the first failure of any.
        """
        working = len(self._threads)
        while working:
            try:
                said = self._said.get(timeout=_POLL_S)
            except Empty:
                said = ""
            if isinstance(said, Exception):
                raise said
            if said is None:
                working -= 1
            else:
                yield said

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                file = self._waiting.pop()
            except IndexError:
                break
            try:
                self._fetch(file)
            except OSError as error:
                failure = _disk_failure(error, self._files, self._place)
                failure.__cause__ = error
                self._said.put(failure)
            except Exception as error:  # noqa: BLE001  # raised again where it is heard
                self._said.put(error)
        self._said.put(None)

    def _fetch(self, file: RemoteFile) -> None:
        with self._locked(file) as turn:
            if not turn:
                return
            if self._place.has(file):
                self._held[file.digest] = file.size_bytes
                return
            for _ in range(2):
                with _Partial(file, self._place.partial(file)) as partial:
                    self._fill(partial)
                    if self._stop.is_set():
                        return
                    if partial.is_right():
                        partial.keep_as(self._place.blob(file))
                        return
                    found = partial.hexdigest()
                    partial.restart()
        raise TransferError(
            f"{file.path}: its hash is {found}, expected {file.digest}, twice",
            hint="the network or a proxy changes what it carries; try another network",
        )

    @contextmanager
    def _locked(self, file: RemoteFile) -> Iterator[bool]:
        """Be the only one to write a file; False if all ended while waiting for that."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._place.locks / f"{file.digest}.lock")
        announced = False
        while not self._stop.is_set():
            try:
                lock.acquire(timeout=_POLL_S)
            except Timeout:
                self._held[file.digest] = self._place.held_bytes(file)
                if not announced:
                    self._said.put(f"another process is fetching {file.path}; waiting for it")
                announced = True
                continue
            try:
                yield True
            finally:
                lock.release()
            return
        yield False

    def _fill(self, partial: _Partial) -> None:
        """Fetch what is missing. Tries that bring something are not counted."""
        tries = 0
        while partial.length < partial.file.size_bytes and not self._stop.is_set():
            before, wait_s = partial.length, 0.0
            try:
                self._append(partial)
                if partial.length == before and not self._stop.is_set():
                    raise Interrupted(TransferError(f"{partial.file.path}: an empty answer"))
            except Interrupted as broken:
                tries = 1 if partial.length > before else tries + 1
                if tries == TRIES or (broken.wait_s or 0) > PATIENCE_S:
                    raise broken.cause from None
                wait_s = broken.wait_s or BACKOFF_S * 2 ** (tries - 1)
                if broken.wait_s:
                    self._said.put(f"{broken.cause.message}; waiting {wait_s:.0f} s")
            self._stop.wait(wait_s)

    def _append(self, partial: _Partial) -> None:
        with closing(self._read(partial.file, partial.length)) as chunks:
            for offset, chunk in chunks:
                if offset != partial.length:
                    partial.restart()
                partial.append(chunk)
                self._held[partial.file.digest] = partial.length
                if self._stop.is_set():
                    return


class _Partial:
    """A file as far as it was fetched, and the hash of that."""

    def __init__(self, file: RemoteFile, path: Path) -> None:
        self.file, self._path = file, path
        self._stream: FileIO = path.open("a+b", buffering=0)
        self._hash = file.hasher()
        self.length = 0
        self._stream.seek(0)
        while chunk := self._stream.read(_CHUNK_BYTES):
            self._hash.update(chunk)
            self.length += len(chunk)
        if self.length > file.size_bytes:
            self.restart()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, chunk: bytes) -> None:
        """Write it whole, or raise OSError.

        Raises:
            TransferError: the file would become longer than it is.
        """
        if self.length + len(chunk) > self.file.size_bytes:
            raise TransferError(
                f"{self.file.path}: more than its {self.file.size_bytes:,} bytes arrived",
                hint="a proxy or a login page may answer instead; try another network",
            )
        left = memoryview(chunk)
        while left:
            written = self._stream.write(left)
            self._hash.update(left[:written])
            self.length += written
            left = left[written:]

    def restart(self) -> None:
        """Forget what there is."""
        self._stream.truncate(0)
        self._hash = self.file.hasher()
        self.length = 0

    def hexdigest(self) -> str:
        """Of what there is."""
        return self._hash.hexdigest()

    def is_right(self) -> bool:
        """Whether it is all there, and nothing else."""
        return self.length == self.file.size_bytes and self.hexdigest() == self.file.digest

    def keep_as(self, path: Path) -> None:
        """Give it its name."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._path.replace(path)


def _require_space(files: Sequence[RemoteFile], place: Place) -> None:
    needed, free = missing_bytes(files, place), _free_bytes(place.blobs)
    if needed > free:
        raise TransferError(
            f"{place.blobs}: {free:,} bytes are free, {needed:,} are needed", hint=_ROOM
        )


def _free_bytes(folder: Path) -> int:
    existing = next(it for it in (folder, *folder.parents) if it.exists())
    return shutil.disk_usage(existing).free


def _disk_failure(error: OSError, files: Sequence[RemoteFile], place: Place) -> TransferError:
    return TransferError(
        f"{place.blobs}: {error.strerror or error}; {_free_bytes(place.blobs):,} bytes are free,"
        f" {missing_bytes(files, place):,} more are needed",
        hint=_ROOM,
    )
