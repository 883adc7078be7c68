"""What was typed before, kept in a file that only its owner can read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from llamachat import settings

MOST_CHARACTERS = 100_000  # of a message that is kept: a pasted book is not typed again


class PrivateHistory(FileHistory):
    """A history file of mode 0600."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        """Keep a message; a full disk loses the message, not the conversation."""
        if len(string) > MOST_CHARACTERS:
            return
        try:
            super().store_string(string.encode("utf-8", "replace").decode())  # lone surrogates
        except OSError:
            return


def new_history(notice: Callable[[str], None]) -> History:
    """The history in the data folder; in memory alone where none may or can be kept."""
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
