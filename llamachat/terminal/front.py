"""How the user is reached while a model is opened: progress, and questions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from llamachat.library import Progress
from llamachat.terminal.failure import Notices, say
from llamachat.terminal.interrupts import left_at_once
from llamachat.terminal.progress import download_progress, loading
from llamachat.terminal.question import is_yes


class Front(Protocol):
    """Shows progress and asks, whatever the user is doing meanwhile."""

    def ask(self, question: str) -> bool | None:
        """Whether the user says yes; None where nobody can be asked."""
        ...

    def loading(self, notices: Notices) -> AbstractContextManager[Callable[[str], None]]:
        """While the model is loaded: what says something else meanwhile."""
        ...

    def downloading(self) -> AbstractContextManager[Progress | None]:
        """While the model is fetched: what is told bytes done and in all."""
        ...


@dataclass(frozen=True, slots=True)
class Streams:
    """The standard streams, of a program that does nothing else meanwhile."""

    quiet: bool = False

    def ask(self, question: str) -> bool | None:
        """Ask on the terminal, if there is one."""
        return ask_on_stdin(question)

    @contextmanager
    def loading(self, notices: Notices) -> Iterator[Callable[[str], None]]:
        """Say so on stderr; a signal ends the program at once."""
        with loading(notices) as notice, left_at_once():
            yield notice

    def downloading(self) -> AbstractContextManager[Progress | None]:
        """A bar on a terminal, else a line now and then."""
        return download_progress(quiet=self.quiet)


@dataclass(frozen=True, slots=True)
class BetweenLines(Streams):
    """The standard streams, of a conversation that waits meanwhile."""

    @contextmanager
    def loading(self, notices: Notices) -> Iterator[Callable[[str], None]]:
        """Say so on stderr; Ctrl-C ends the loading, not the program."""
        with loading(notices) as notice:
            yield notice

    def ask(self, question: str) -> bool | None:
        """Ask as the conversation does: the terminal takes keys, not lines."""
        from llamachat.terminal.prompt import ask_yes

        return ask_yes(question) if _can_ask() else None


def ask_on_stdin(question: str) -> bool | None:
    """Whether the user says yes; None where stdin or stderr is no terminal."""
    if not _can_ask():
        return None
    say(f"llamachat: {question} [y/N]")
    return is_yes(sys.stdin.readline())


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
