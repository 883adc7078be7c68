"""Conversations on disk: a list, one of them, copies for other programs, and their end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamachat.chat import saved
from llamachat.chat.export import export
from llamachat.chat.transcript import Transcript
from llamachat.errors import UsageError
from llamachat.terminal.failure import Notices, say
from llamachat.terminal.output import write
from llamachat.terminal.tables import write_columns, write_json


def show_all(*, json: bool) -> None:
    """Every conversation, the one that was changed last first."""
    found = saved.listed()
    if json:
        write_json([{**asdict(it), "path": str(saved.path_of(it.name))} for it in found])
    elif not found:
        say("llamachat: no conversation is saved yet")
    else:
        rows = [(it.name, it.when, _cell(it.model), _cell(it.title)) for it in found]
        write_columns([("name", "changed", "model", "begins with"), *rows])


def show_one(name: str, *, json: bool) -> None:
    """What was said."""
    path = saved.path_of(name)
    transcript = _read(path)
    if json:
        write_json(facts(path, transcript))
    else:
        write(conversation(transcript))


def export_one(form: str, name: str, output: Path | None) -> None:
    """The messages as Markdown or JSON, on stdout or in a new file.

    Raises:
        UsageError: the form is unknown, or the file is there.
    """
    text = export(_read(saved.path_of(name)).messages, form)
    if output is None:
        write(text)
        return
    try:
        with output.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror or error}") from error


def remove(names: Sequence[str], *, yes: bool) -> None:
    """Delete conversations, after asking on a terminal.

    Raises:
        UsageError: it may not ask and was not told to go ahead, or there is no such conversation.
    """
    paths = [saved.path_of(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise UsageError(
                f"{path}: there is no such conversation", hint="llamachat sessions list"
            )
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and stdin is no terminal", hint="--yes")
        say(f"delete {', '.join(map(str, paths))}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("llamachat: nothing was deleted")
            return
    for path in paths:
        saved.remove(path)


def conversation(transcript: Transcript) -> str:
    """The messages as they stood on the terminal: questions after a mark."""
    marks = {"system": "[system] ", "user": ">>> ", "assistant": ""}
    return "\n".join(f"{marks[m.role]}{m.content.rstrip()}\n" for m in transcript.messages)


def facts(path: Path, transcript: Transcript) -> dict[str, Any]:
    """A conversation as JSON: what was said, and how it was answered."""
    return {
        "name": path.stem,
        "path": str(path),
        "title": transcript.title,
        "created": transcript.created,
        "run": transcript.run,
        "messages": [
            {
                "role": message.role,
                "content": message.content,
                **({"token_ids": list(message.ids)} if message.ids is not None else {}),
            }
            for message in transcript.messages
        ],
    }


def _read(path: Path) -> Transcript:
    transcript = saved.read(path)
    for problem in transcript.problems[:3]:
        Notices()(problem)
    return transcript


def _cell(text: str) -> str:
    return " ".join(text.split())
