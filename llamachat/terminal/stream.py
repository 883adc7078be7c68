"""A reply on a terminal, as it comes: text on stdout, signs of life on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from llamachat.chat.events import Done, Event, Prefill, Tails, Text, Trimmed
from llamachat.terminal.failure import say
from llamachat.terminal.progress import PrefillProgress
from llamachat.terminal.shades import Shading
from llamachat.terminal.tails import TextOverTails


class ReplyView:
    """Shows the events of one reply; text is only ever appended, and the last line is ended."""

    def __init__(self, shading: Shading) -> None:
        self._progress = PrefillProgress()
        self._out = TextOverTails()
        self._shading = shading
        self._at_line_start = True

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Prefill):
            self._progress.show(event)
        elif isinstance(event, Text):
            self._out.write(event.text, look=self._shading.look(event))
            self._at_line_start = event.text.endswith("\n") if event.text else self._at_line_start
        elif isinstance(event, Tails):
            self._out.show(event)
        elif isinstance(event, Trimmed):
            say(f"[{trimmed_notice(event)}]")
        elif isinstance(event, Done):
            self._end_line()
            for line in _told(event):
                say(f"[{line}]")

    def __enter__(self) -> ReplyView:
        self._shading.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_line()

    def _end_line(self) -> None:
        self._progress.clear()
        self._out.clear()
        if not self._at_line_start:
            self._at_line_start = True
            self._out.write("\n")


def trimmed_notice(event: Trimmed) -> str:
    """The line that says what the context had no room for."""
    turns = "turn was" if event.turns == 1 else f"{event.turns} turns were"
    return f"the context is full: the oldest {turns} left out"


def _told(done: Done) -> Iterator[str]:
    """What a user should know about how a reply came and ended."""
    if done.finish_reason == "interrupted":
        yield "interrupted" if done.token_ids else "interrupted: the conversation is as it was"
    elif done.finish_reason == "length":
        yield f"stopped after {len(done.token_ids)} tokens"
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
    return f"the reply repeats itself: stopped after {len(event.token_ids)} tokens"
