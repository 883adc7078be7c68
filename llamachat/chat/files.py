"""Files as text for a prompt."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from llamachat.errors import UsageError

Notice = Callable[[str], None]


def decoded(raw: bytes, name: str, notice: Notice) -> str:
    """UTF-8 as text, without BOM and carriage returns; what is not UTF-8 is replaced and told."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        notice(f"{name} is not all UTF-8; invalid bytes were replaced")
        text = raw.decode("utf-8-sig", "replace")
    return text.replace("\r\n", "\n")


def read_text(path: Path, notice: Notice) -> str:
    """The text of a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return decoded(path.expanduser().read_bytes(), str(path), notice)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {reason}") from error


def fenced(name: str, text: str) -> str:
    """Text under its name, in a fence that it does not have itself."""
    fence = "```"
    while fence in text:
        fence += "`"
    newline = "" if text.endswith("\n") else "\n"
    return f"{fence}{name}\n{text}{newline}{fence}"


def words(line: str) -> list[str]:
    """What is typed as several arguments; quotes hold one with spaces together.

    Raises:
        UsageError: a quote is not closed.
    """
    try:
        found = shlex.split(line, posix=os.name != "nt")  # where \\ is part of a path
    except ValueError as error:
        raise UsageError(f"{line}: {error}") from error
    return [word.strip("\"'") if os.name == "nt" else word for word in found]


def matching(pattern: str) -> list[Path]:
    """The files that a path or a glob (with ** for folders in folders) names, in order.

    Raises:
        UsageError: there is none.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise UsageError(f"{pattern}: is a folder", hint=f"{pattern.rstrip('/')}/* is its files")
    if path.is_file():
        return [path]
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no whole path
    found = [Path(name) for name in sorted(names)]
    files = [path for path in found if path.is_file()]
    if not files:
        raise UsageError(f"{pattern}: no such file")
    return files
