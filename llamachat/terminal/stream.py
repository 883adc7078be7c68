"""A reply on a terminal, as it comes: text on stdout, signs of life on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from llamachat import settings
from llamachat.chat.events import Done, Event, Prefill, Summarizing, Tails, Text, Trimmed
from llamachat.terminal.failure import say
from llamachat.terminal.progress import PrefillProgress
from llamachat.terminal.shades import Shading
from llamachat.terminal.tails import TextOverTails


class Writer(Protocol):
    """Writes a text as it comes, and open continuations below it."""

    def write(self, text: str, *, look: Callable[[str], str] = str) -> None:
        """The text goes on."""
        ...

    def show(self, tails: Tails) -> None:
        """Show these continuations until it does."""
        ...

    def end(self) -> None:
        """Nothing follows; the last line is ended."""
        ...


class ReplyView:
    """Shows the events of one reply; text is only ever appended, and the last line is ended.

    Args:
        shading: how tokens look whose probabilities are known.
        markdown: whether other replies are rendered, where the terminal can do that.
    """

    def __init__(self, shading: Shading, *, markdown: bool = False) -> None:
        self._progress = PrefillProgress()
        self._out: Writer | None = None
        self._shading = shading
        self._renders = markdown and sys.stdout.isatty() and not settings.terminal_is_dumb()

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Prefill):
            self._progress.show(event)
        elif isinstance(event, Text):
            self._writer(event).write(event.text, look=self._shading.look(event))
        elif isinstance(event, Tails):
            self._writer().show(event)
        elif isinstance(event, Summarizing | Trimmed):
            say(f"[{overflow_notice(event)}]")
        elif isinstance(event, Done):
            self._end()
            for line in _told(event):
                say(f"[{line}]")

    def __enter__(self) -> ReplyView:
        self._shading.begin()
        if self._renders:
            import llamachat.terminal.rendered  # noqa: F401  # before the first token, not after it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _writer(self, event: Text | None = None) -> Writer:
        """What writes this reply; the first event tells."""
        if self._out is None:
            raw = not self._renders or (event is not None and event.probabilities is not None)
            self._out = TextOverTails() if raw else _rendered()
        return self._out

    def _end(self) -> None:
        self._progress.clear()
        if self._out is not None:
            out, self._out = self._out, None
            out.end()


def _rendered() -> Writer:
    from llamachat.terminal.rendered import Rendered

    return Rendered()


def overflow_notice(event: Summarizing | Trimmed) -> str:
    """The line that says what the context had no room for."""
    one = event.turns == 1
    turns = "turn" if one else f"{event.turns} turns"
    if isinstance(event, Summarizing):
        return f"the context is full: summarizing the oldest {turns}"
    done = "left out" if event.note is None else "replaced by a summary"
    why = f" ({event.problem})" if event.problem else ""
    return f"the context is full: the oldest {turns} {'was' if one else 'were'} {done}{why}"


def _told(done: Done) -> Iterator[str]:
    """What a user should know about how a reply came and ended."""
    if done.finish_reason == "interrupted":
        as_it_was = "" if done.token_ids else ": the conversation is as it was"
        yield f"interrupted{f': {done.problem}' if done.problem else as_it_was}"
    elif done.finish_reason == "length":
        yield f"stopped after {done.completion_tokens} tokens"
    elif done.finish_reason == "loop":
        yield loop_notice(done)
    elif not done.token_ids:
        yield "nothing to add"
    if done.attempt and done.seed is None:
        yield "nothing was drawn: the same again"
    elif done.attempt:
        yield f"attempt {done.attempt} of seed {done.seed}"


def loop_notice(event: Done) -> str:
    """The line that says why a reply was ended."""
    return f"the reply repeats itself: stopped after {event.completion_tokens} tokens"
