"""Ids and pieces of a text."""

from __future__ import annotations

import json as jsonlib
import sys

from llamachat.checkpoints import open_checkpoint
from llamachat.errors import UsageError
from llamachat.library.store import require
from llamachat.terminal.output import write


def show(model: str, text: str | None, *, json: bool) -> None:
    """Write the ids of `text`, or of stdin, byte for byte.

    Raises:
        UsageError: stdin is a terminal, or is not UTF-8.
    """
    tokenizer = open_checkpoint(require(model).path).tokenizer()
    ids = tokenizer.encode(_stdin() if text is None else text)
    pieces = [tokenizer.piece(token) for token in ids]
    if json:
        lines = [jsonlib.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False)]
    else:
        lines = [f"{token}\t{piece!r}" for token, piece in zip(ids, pieces, strict=True)]
    write("".join(f"{line}\n" for line in lines))


def _stdin() -> str:
    if sys.stdin.isatty():
        raise UsageError("no text", hint='llamachat tokenize MODEL "text", or pipe it in')
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 at byte {error.start}") from error
