"""A text in the user's own editor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamachat import settings
from llamachat.chat.commands import Answer, Edit, Say
from llamachat.chat.files import read_text, words
from llamachat.errors import LlamachatError, TransferError, UsageError
from llamachat.terminal.failure import say

USUAL = ("notepad",) if os.name == "nt" else ("editor", "nano", "vi")


def edited(effect: Edit) -> Answer | Say:
    """Let the user change the text; what comes of it.

    Raises:
        UsageError: there is no editor that can be started.
        LlamachatError: see the effect; the text is then kept in its file, whose name is said.
    """
    path = _written(effect.text)
    try:
        ended_well = _open(path)
        text = read_text(path, say).removesuffix("\n")
        if not ended_well or not text.strip() or text == effect.text.removesuffix("\n"):
            path.unlink()
            return Say(f"{effect.what[:1].upper()}{effect.what[1:]} stays as it was.")
        result = effect.then(text)
    except LlamachatError:
        if path.exists() and path.read_bytes() != _stored(effect.text):
            say(f"what you wrote is kept in {path}")
        else:
            path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)
    return result


def _written(text: str) -> Path:
    """A new file with the text, which only its owner can read."""
    try:
        number, name = tempfile.mkstemp(prefix="llamachat-", suffix=".md")
        with os.fdopen(number, "wb") as file:
            file.write(_stored(text))
    except OSError as error:
        raise TransferError(f"no file for the editor: {error.strerror}") from error
    return Path(name)


def _stored(text: str) -> bytes:
    newline = "" if text.endswith("\n") else "\n"
    return f"{text}{newline}".encode("utf-8", "replace")


def _open(path: Path) -> bool:
    """Wait until the editor is left; returns whether it says that all went well."""
    found = settings.editor() or next(filter(shutil.which, USUAL), None)
    if found is None:
        raise UsageError("no editor was found", hint="name one in VISUAL or EDITOR")
    try:
        with _ctrl_c_is_the_editors():
            return subprocess.run([*words(found), str(path)], check=False).returncode == 0
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"editor {found}: {reason}", hint="VISUAL or EDITOR names one") from error


@contextmanager
def _ctrl_c_is_the_editors() -> Iterator[None]:
    """A handler, as what is ignored stays so in the editor."""
    previous = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
