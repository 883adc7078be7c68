"""A reply on a terminal, as it comes: text on stdout, signs of life on stderr."""

from __future__ import annotations

from types import TracebackType

from llamachat.chat.events import Done, Event, Prefill, Text, Trimmed
from llamachat.terminal.failure import say
from llamachat.terminal.output import write
from llamachat.terminal.progress import PrefillProgress


class ReplyView:
    """Shows the events of one reply; text is only ever appended, and the last line is ended."""

    def __init__(self) -> None:
        self._progress = PrefillProgress()
        self._at_line_start = True

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Prefill):
            self._progress.show(event)
        elif isinstance(event, Text):
            write(event.text)
            self._at_line_start = event.text.endswith("\n")
        elif isinstance(event, Trimmed):
            say(f"[{trimmed_notice(event)}]")
        elif isinstance(event, Done):
            self._end_line()
            if event.finish_reason == "interrupted":
                say("[interrupted]" if event.token_ids else "[interrupted: the question is gone]")
            elif event.finish_reason == "length":
                say(f"[stopped after {len(event.token_ids)} tokens]")

    def __enter__(self) -> ReplyView:
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
        if not self._at_line_start:
            self._at_line_start = True
            write("\n")


def trimmed_notice(event: Trimmed) -> str:
    """The line that says what the context had no room for."""
    turns = "turn was" if event.turns == 1 else f"{event.turns} turns were"
    return f"the context is full: the oldest {turns} left out"
