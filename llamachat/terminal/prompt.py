"""The line that the user types: editing, history, completion, the toolbar."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from llamachat import settings
from llamachat.chat.commands import COMMANDS, SETTINGS, VIEWS

ARGUMENTS = {"set": tuple(SETTINGS), "show": tuple(VIEWS), "help": tuple(COMMANDS)}


def new_prompt(toolbar: Callable[[], str], notice: Callable[[str], None]) -> PromptSession[str]:
    """The input line: Enter sends, Alt-Enter or Ctrl-J makes a new line, a paste is one message."""
    return PromptSession(
        message=">>> ",
        prompt_continuation="... ",
        multiline=True,
        key_bindings=_keys(),
        history=_history(notice),
        completer=_Commands(),
        complete_while_typing=False,
        bottom_toolbar=toolbar,
        enable_open_in_editor=True,
        enable_history_search=True,
    )


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


if sys.platform == "win32":

    @contextmanager
    def typed_unseen() -> Iterator[None]:
        """The console shows no keys until a line is asked for."""
        yield

else:
    import termios

    @contextmanager
    def typed_unseen() -> Iterator[None]:
        """Keys typed inside stay out of the reply, and are there when the next line is asked for.

        Carriage returns stay what they are, so that Enter sends then, too.
        """
        try:
            before = termios.tcgetattr(sys.stdin)
        except (termios.error, OSError, ValueError):  # no terminal
            yield
            return
        unseen = list(before)
        unseen[0] &= ~termios.ICRNL
        unseen[3] &= ~(termios.ECHO | termios.ICANON)
        try:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class PrivateHistory(FileHistory):
    """A history file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        """Keep a line; a full disk loses the line, not the conversation."""
        try:
            super().store_string(string)
        except OSError:
            return


def _history(notice: Callable[[str], None]) -> History:
    if not settings.keeps_history():
        return InMemoryHistory()
    folder, problem = settings.data_dir()
    if problem:
        notice(problem)
    try:
        return PrivateHistory(folder / "history")
    except OSError as error:
        notice(f"{folder / 'history'}: {error.strerror}; this conversation leaves no history")
        return InMemoryHistory()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        """A line in triple quotes goes on until they are closed."""
        text = event.current_buffer.text
        if text.lstrip().startswith('"""') and text.count('"""') < 2:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Commands(Completer):
    """Commands, the keys and views that some of them take, and paths after @."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """What may follow."""
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, word = line[1:].partition(" ")
        if name == "system" and word.startswith("@"):
            path = Document(word[1:])
            yield from PathCompleter(expanduser=True).get_completions(path, complete_event)
            return
        choices = ARGUMENTS.get(name, ()) if space else tuple(COMMANDS)
        typed = word if space else name
        for choice in choices:
            if choice.startswith(typed):
                yield Completion(choice, start_position=-len(typed))
