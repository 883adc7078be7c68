"""The line that the user types: keys, history, the toolbar. It is quick to import."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.completion import Completer, DynamicCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.layout.processors import TabsProcessor

from llamachat import settings
from llamachat.terminal.history import new_history
from llamachat.terminal.question import is_yes

Waking = Callable[[Callable[[], None]], AbstractContextManager[None]]


class Line:
    """The input line: Enter sends, Alt-Enter or Ctrl-J makes a new line, a paste is one message."""

    def __init__(
        self,
        toolbar: Callable[[int], str],
        notice: Callable[[str], None],
        completer: Callable[[], Completer],
    ) -> None:
        """Prepare it.

        Args:
            toolbar: what stands below, in so many columns.
            completer: what Tab asks, each time.
            notice: told what the user should know.
        """
        self._editing: asyncio.Task[None] | None = None
        self._aside = Document()

        def below() -> str:
            return toolbar(self._app.output.get_size().columns)

        self._session: PromptSession[str | None] = PromptSession(
            message=">>> ",
            prompt_continuation="... ",
            multiline=True,
            key_bindings=self._keys(),
            history=new_history(notice),
            completer=DynamicCompleter(completer),
            complete_while_typing=False,
            bottom_toolbar=below if settings.ui().toolbar else None,
            enable_history_search=True,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
        )
        self._session.default_buffer.tempfile_suffix = ".md"
        if hasattr(signal, "SIGWINCH"):  # else the size is asked for twice a second
            self._app.terminal_size_polling_interval = None

    def read(self, waking: Waking, begin: Callable[[], None]) -> str | None:
        """The next line; None where it was woken: what was typed is there again the next time.

        Args:
            waking: told how to wake it, while it reads.
            begin: called once the prompt is drawn.

        Raises:
            EOFError: the user leaves.
            KeyboardInterrupt: Ctrl-C on an empty line.
        """
        with ExitStack() as reading:

            def pre_run() -> None:
                loop = asyncio.get_running_loop()
                loop.call_soon(begin)
                reading.enter_context(waking(lambda: _soon(loop, self._put_aside)))

            self._editing = None
            default, self._aside = self._aside, Document()
            self._app.erase_when_done = False
            return self._session.prompt(default=default, pre_run=pre_run)

    def redraw(self) -> None:
        """Draw the toolbar anew, from any thread."""
        self._app.invalidate()

    @property
    def _app(self) -> Application[str | None]:
        return self._session.app

    def _put_aside(self) -> None:
        """End reading without a line, once an editor that was opened gave the terminal back."""

        async def put_aside() -> None:
            if self._editing is not None:
                await asyncio.wait([self._editing])
            if self._app.is_running and not self._app.is_done:
                self._aside = self._session.default_buffer.document
                self._app.erase_when_done = True
                self._app.exit(result=None)

        self._app.create_background_task(put_aside())

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            """A line in triple quotes goes on until they are closed."""
            text = event.current_buffer.text
            if text.lstrip().startswith('"""') and text.count('"""') < 2:
                event.current_buffer.insert_text("\n")
            else:
                event.current_buffer.validate_and_handle()

        @keys.add("<sigint>")
        def _interrupted(event: KeyPressEvent) -> None:
            """Ctrl-C at an editor is the editor's, though it may be heard when that has ended."""
            if self._editing is None:
                _clear(event)

        @keys.add("c-c")
        def _clear(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        @keys.add("escape", "enter")
        @keys.add("c-j")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-x", "c-e")
        def _edit(event: KeyPressEvent) -> None:
            self._editing = event.current_buffer.open_in_editor()

        return keys


def ask_number(message: str, most: int) -> int | None:
    """A number from 1 to `most`: its key, or typed and sent; None for none."""
    keys = KeyBindings()
    for number in range(1, most + 1 if most < 10 else 1):

        @keys.add(str(number))
        def _chosen(event: KeyPressEvent) -> None:
            event.app.exit(result=event.data)

    session: PromptSession[str] = PromptSession(message=message, key_bindings=keys)
    while True:
        try:
            answer = session.prompt().strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if not answer:
            return None
        if answer.isdecimal() and 1 <= int(answer) <= most:
            return int(answer)


def ask_yes(question: str) -> bool:
    """Whether the user says yes."""
    session: PromptSession[str] = PromptSession(message=f"llamachat: {question} [y/N] ")
    try:
        return is_yes(session.prompt())
    except (EOFError, KeyboardInterrupt):
        return False


if sys.platform == "win32":

    @contextmanager
    def typed_unseen(*, signals: bool = True) -> Iterator[None]:
        """The console shows no keys until a line is asked for."""
        yield

    def take_typed() -> None:
        """The console keeps keys as they are typed."""

else:
    import select
    import termios

    @contextmanager
    def typed_unseen(*, signals: bool = True) -> Iterator[None]:
        """Keys typed inside stay out of the reply, and are there when the next line is asked for.

        Carriage returns stay what they are, so that Enter sends then, too. Without `signals`,
        Ctrl-C is such a key as well.
        """
        try:
            before = termios.tcgetattr(sys.stdin)
        except (termios.error, OSError, ValueError):  # no terminal
            yield
            return
        unseen = list(before)
        unseen[0] &= ~termios.ICRNL
        unseen[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
        unseen[3] |= termios.ISIG if signals else 0
        try:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
            yield
        finally:
            with suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def take_typed() -> None:
        """Let the next line begin with what was typed while the terminal took whole lines.

        To that one Enter was a newline and Ctrl-D an end, which is read as NUL. Several lines are
        one message, as it may be a paste: no terminal tells that yet.
        """
        from prompt_toolkit.application.current import get_app_session
        from prompt_toolkit.input.typeahead import store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        typed = b""
        with suppress(OSError):
            while select.select([sys.stdin], [], [], 0)[0] and (more := os.read(0, 4096)):
                typed += more
        keys: list[KeyPress] = []
        parser = Vt100Parser(keys.append)
        typed = re.sub(rb"\n(?=\x04|$)", b"\r", typed.replace(b"\0", b"\x04"))
        parser.feed_and_flush(typed.decode("utf-8", "surrogateescape"))
        store_typeahead(get_app_session().input, keys)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, from any thread; one that has ended needs no call."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
