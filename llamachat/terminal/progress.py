"""Signs of life on stderr: downloading, loading, a long prefill."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llamachat.terminal.failure import say

PLAIN_EVERY_S = 5.0
MB = 1e6


def on_terminal() -> bool:
    """Whether stderr is watched by a person."""
    return sys.stderr is not None and sys.stderr.isatty()


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
def loading(*, quiet: bool) -> Iterator[None]:
    """Say that a model is being loaded, on a terminal, and take it away again."""
    if quiet or not on_terminal():
        yield
        return
    sys.stderr.write("loading…")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A rich bar that appears with the first byte and stays when it is full."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("downloading", total=None, start=False)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            sys.stderr.write("\r\033[K")
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=done, total=total or None)

    try:
        yield show
    finally:
        bar.stop()


def _plain_lines() -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and (done == total or now - last >= PLAIN_EVERY_S):
            last = now
            rate = done / MB / max(now - began, 1e-9)
            say(f"llamachat: {done / MB:.0f} of {total / MB:.0f} MB, {rate:.0f} MB/s")

    return show
