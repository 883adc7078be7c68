"""Signs of life on stderr: downloading, loading, a long prefill."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from llamachat import settings
from llamachat.chat.events import Prefill
from llamachat.terminal.failure import Notices, say
from llamachat.terminal.output import size_of

PLAIN_EVERY_S = 5.0
PATIENCE_S = 1.0  # of prefill before it shows progress
MB = 1e6


class Show(Protocol):
    """Shows bytes done and in all, and what is being done to them."""

    def __call__(self, done: int, total: int, what: str = ...) -> None:
        """Show it."""
        ...


class Status:
    """One line on stderr that is replaced and taken away again; nothing where nobody watches."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._watched = not quiet and on_terminal()
        self._shown = False

    def show(self, text: str) -> None:
        """Replace what the line says."""
        if self._watched:
            width = size_of(sys.stderr).columns
            sys.stderr.write(f"\r\033[K{text[: max(0, width - 1)]}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._shown = False


class PrefillProgress:
    """How much of a prompt was read, once that has taken a while."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._began = time.monotonic()
        self._status = Status(quiet=quiet)

    def show(self, event: Prefill) -> None:
        """Show the progress, or take it away where there is no more to come."""
        if event.done == 0:
            self._began = time.monotonic()
        elapsed = time.monotonic() - self._began
        if event.done >= event.total:
            self._status.clear()
        elif event.done and elapsed >= PATIENCE_S:
            rate = event.done / elapsed
            left_s = (event.total - event.done) / rate
            self._status.show(
                f"reading {event.done:,} of {event.total:,} tokens, {rate:.0f} tok/s, "
                f"{left_s:.0f} s left (Ctrl-C stops)"
            )

    def clear(self) -> None:
        """Take it away."""
        self._status.clear()


def on_terminal() -> bool:
    """Whether a person watches stderr, on a terminal that can replace a line."""
    return sys.stderr.isatty() and not settings.terminal_is_dumb()


@contextmanager
def download_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callable that is told bytes done and in all: a bar on a terminal, else a line now and then.

    Yields None if quiet.
    """
    if quiet:
        yield None
    elif on_terminal():
        with _bar() as show:
            yield show
    else:
        yield _plain_lines()


@contextmanager
def quantizing_progress(
    *, quiet: bool, doing: str = "quantizing"
) -> Iterator[Callable[[str, int, int], None]]:
    """A callable that is told what is done, and bytes of the source done and in all."""
    if quiet:
        yield lambda what, done, total: None
    elif on_terminal():
        with _bar() as show:
            yield lambda what, done, total: show(done, total, f"{doing} {what}")
    else:
        lines = _plain_lines()
        yield lambda what, done, total: lines(done, total, f"{what}, ")


@contextmanager
def loading(notices: Notices) -> Iterator[Callable[[str], None]]:
    """Say that a model is being loaded, on a terminal, and take it away again.

    Yields what says something else meanwhile, on a line of its own.
    """
    status = Status(quiet=notices.quiet)

    def notice(line: str) -> None:
        status.clear()
        notices(line)
        status.show("loading…")

    status.show("loading…")
    try:
        yield notice
    finally:
        status.clear()


@contextmanager
def _bar() -> Iterator[Show]:
    """A rich bar that appears with the first byte and stays when it is full."""
    bar = task = None

    def show(done: int, total: int, what: str = "downloading") -> None:
        nonlocal bar, task
        if bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            task = bar.add_task(what, total=None, completed=done)  # what is there has no speed
            bar.start()
        assert task is not None
        bar.update(task, description=what, completed=done, total=total or None)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _plain_lines() -> Show:
    pace = Pace()
    last = time.monotonic()
    said: int | None = None

    def show(done: int, total: int, what: str = "") -> None:
        nonlocal last, said
        now = time.monotonic()
        text = pace.text(done, total)
        if said is None:
            said = done
        if done > said and (done == total or now - last >= PLAIN_EVERY_S):
            last, said = now, done
            say(f"llamachat: {what}{text}")

    return show


class Pace:
    """How fast bytes come, from when it is first told."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: int | None = None  # what was there before: it has no speed

    def text(self, done: int, total: int) -> str:
        """How many there are of how many, the speed, and the time left."""
        if self._first is None:
            self._first = done
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        return f"{done / MB:.0f} of {total / MB:.0f} MB, {rate / MB:.0f} MB/s{left}"
