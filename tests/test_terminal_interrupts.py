"""Ctrl-C at every point of a reply: it ends with what there was, and with Done."""

from __future__ import annotations

import signal
from collections.abc import Generator

import pytest

from llamachat.terminal.interrupts import interruptible

Pieces = Generator[str, None, None]


def reply(n: int, interrupted_before: int | None = None) -> Pieces:
    """Counts to n, as a session's reply ends: an interrupt inside becomes its last words."""
    said = []
    try:
        for i in range(n):
            if i == interrupted_before:
                signal.raise_signal(signal.SIGINT)
            said.append(str(i))
            yield said[-1]
    except KeyboardInterrupt:
        yield "interrupted"
    yield f"done {len(said)}"


def test_a_reply_that_nobody_interrupts_is_passed_on() -> None:
    assert list(interruptible(reply(3))) == ["0", "1", "2", "done 3"]  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupt_while_computing_ends_the_reply_there(at: int) -> None:
    events = list(interruptible(reply(3, interrupted_before=at)))  # type: ignore[arg-type]
    assert events == [*map(str, range(at)), "interrupted", f"done {at}"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupt_while_an_event_is_shown_loses_nothing(at: int) -> None:
    events = []
    for event in interruptible(reply(5)):  # type: ignore[arg-type]
        events.append(event)
        if event == str(at):
            signal.raise_signal(signal.SIGINT)
    assert events == [*map(str, range(at + 1)), "interrupted", f"done {at + 1}"]


def test_afterwards_ctrl_c_means_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    list(interruptible(reply(1)))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is before
