"""Ctrl-C: where it lands, and that nothing is lost by it."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import NoReturn, TypeVar

from llamachat.terminal.progress import on_terminal

E = TypeVar("E")


@contextmanager
def left_at_once() -> Iterator[None]:
    """A signal inside ends the process: C extensions may swallow exceptions."""
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, _leave) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def interruptible(reply: Generator[E, None, None]) -> Generator[E, None, None]:
    """The events of a reply, to its end; Ctrl-C makes that come early.

    It is raised where the reply is being computed; if it comes while an event is shown, then with
    the next one. Either way the reply still yields its last text and `Done`.
    """
    pending = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal pending
        if inspect.getgeneratorstate(reply) == inspect.GEN_RUNNING:
            raise KeyboardInterrupt
        pending = True

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        event = next(reply)
        while True:
            yield event
            if pending:
                pending = False
                event = reply.throw(KeyboardInterrupt())
            else:
                event = next(reply)
    except StopIteration:
        return
    finally:
        signal.signal(signal.SIGINT, previous)
        reply.close()  # where nobody listens on, it ends with what there is


@lru_cache(maxsize=1)
def ending() -> Callable[[str], NoReturn]:
    """What any thread can call to end the process: a line, a terminal as it is now, exit code 1."""
    if not sys.stdin.isatty() or os.name != "posix":
        from llamachat.loading.ranks import end

        return end
    import termios

    before = termios.tcgetattr(sys.stdin)

    def restored(message: str) -> NoReturn:
        from llamachat.loading.ranks import end

        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\033[?25h\033[?2004l\n" if on_terminal() else b"\n")
        end(message)

    return restored


def _leave(number: int, _frame: FrameType | None) -> None:
    if sys.stderr.isatty():  # below what is said there, with the cursor that bars hide
        os.write(sys.stderr.fileno(), b"\033[?25h\n" if on_terminal() else b"\n")
    os._exit(128 + number)
