"""The conversation as it begins: a line can be typed at once, and the model is loaded meanwhile.

What takes long to import comes with the model, in the thread that loads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from llamachat import settings
from llamachat.terminal.failure import Notices, one_line, say, show_failure
from llamachat.terminal.opener import Opener
from llamachat.terminal.prompt import Line, ask_yes, take_typed, typed_unseen
from llamachat.terminal.question import valid
from llamachat.terminal.toolbar import fitted, toolbar

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

    from llamachat.terminal.front import Front
    from llamachat.terminal.opening import Run
    from llamachat.terminal.repl import Talk

HOW_TO_BEGIN = "/help lists commands, Ctrl-C stops a reply, Ctrl-D leaves."
LEAVE = "/exit"
HOW_TO_LEAVE = "Ctrl-D or /exit leaves."


def converse(
    read: Callable[[Notices], Run], notices: Notices, *, first: str | None = None, verbose: bool
) -> None:
    """Talk until the user leaves. The conversation outlives every failure.

    Args:
        read: what the user asked for, from the flags.
        notices: told what the user should know.
        first: a question that was asked before the conversation began.
        verbose: tracebacks and statistics, too.

    Raises:
        LlamachatError: what the user asked for cannot be, or the model cannot be loaded.
    """
    if not notices.quiet:
        say(HOW_TO_BEGIN)
    with Dialogue(read, notices, first) as dialogue, typed_unseen(signals=False):
        take_typed()
        while (line := dialogue.next_line()) is not None:
            try:
                if line.strip() and dialogue.perform(line):
                    return
            except Exception as error:  # noqa: BLE001  # the conversation goes on
                show_failure(error, verbose=verbose)
            except KeyboardInterrupt:  # while a prompt was being written, not yet answered
                say("[interrupted]")


def opens_meanwhile() -> bool:
    """Whether a line can be typed while the model loads: where what is drawn can be replaced."""
    return not settings.terminal_is_dumb()


class Dialogue:
    """Lines from the user, and what they do: at once, or when the model is there.

    As a context it keeps the conversation on disk while it lasts.
    """

    def __init__(
        self, read: Callable[[Notices], Run], notices: Notices, first: str | None = None
    ) -> None:
        self._read, self._notices = read, notices
        self._talk: Talk | None = None
        self._kept = ExitStack()
        self._waiting: deque[str] = deque()  # lines that were typed before the model was there
        if first is not None:
            from llamachat.chat.commands import as_typed

            say(f">>> {one_line(first)}")
            self._waiting.append(as_typed(first))
        self._line = Line(self._toolbar, notices, self._completer)
        self._opener = Opener(self._open, ask_yes, self._line.redraw)
        if not opens_meanwhile():
            from llamachat.terminal.front import Streams

            self._opener.open_now(Streams(quiet=notices.quiet))

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.close()

    def next_line(self) -> str | None:
        """The next line to perform; None where the user leaves.

        Raises:
            LlamachatError: why there is no model.
        """
        while True:
            try:
                self._attend()
                if self._talk is not None and self._waiting:
                    return self._waiting.popleft()
                line = self._line.read(self._opener.waking, self._opener.start)
            except EOFError:
                if not self._waiting or self._waiting[-1] == LEAVE:
                    return None
                self._waiting.append(LEAVE)  # after what was typed before; the next time at once
                continue
            except KeyboardInterrupt:
                say("[not sent]" if self._waiting else HOW_TO_LEAVE)
                self._waiting.clear()
                continue
            if line is not None:
                return valid(line, "the line", self._notices)

    def perform(self, line: str) -> bool:
        """Do what a line means, or keep it for later; returns whether to leave. See `perform`."""
        if self._talk is not None:
            from llamachat.terminal.repl import perform

            with typed_unseen():
                return perform(line, self._talk)
        from llamachat.chat.commands import Leave, Say, interpret_early

        effect = interpret_early(line)
        if isinstance(effect, Say):
            say(effect.text)
        elif isinstance(effect, Leave) and not self._waiting:
            return True
        else:
            self._waiting.append(line)
        return False

    def _open(self, front: Front) -> Talk:
        from llamachat.terminal.repl import begin

        notices = Notices(quiet=self._notices.quiet, tell=self._opener.tell)
        return begin(self._read(notices), front)

    def _attend(self) -> None:
        """Say and ask what came from the thread, and begin to talk when the model is there."""
        opened = self._opener.attend()
        if opened is not None and self._talk is None:
            self._talk = opened
            if not self._notices.quiet:
                say(opened.conversation.title)
            from llamachat.terminal.repl import kept

            self._kept.enter_context(kept(opened))

    def _completer(self) -> Completer:
        from llamachat.terminal.completion import LineCompleter

        return LineCompleter(self._talk.conversation if self._talk else None)

    def _toolbar(self, columns: int) -> str:
        if self._talk is not None:
            return toolbar(self._talk.conversation, columns)
        waiting = f"{len(self._waiting)} to be sent"
        return fitted([self._opener.status, *([waiting] if self._waiting else [])], columns)
