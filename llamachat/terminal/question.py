"""What is asked in one shot: argument, files and standard input, put together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from llamachat.errors import UsageError

PATIENCE_S = 2.0
Notice = Callable[[str], None]


def read(
    argument: str | None, option: str | None, files: Sequence[Path], notice: Notice
) -> str | None:
    """The whole question, or None for a conversation (both ends are terminals, nothing asked).

    Raises:
        UsageError: asked twice, asked nothing, or a file that is not text.
    """
    if argument is not None and option is not None:
        raise UsageError("the prompt was given twice: as PROMPT and with -p")
    prompt = argument if argument is not None else option
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not files and on_terminal:
        if sys.stdout.isatty():
            return None
        raise UsageError(
            "no prompt, and stdout is no terminal", hint='llamachat chat "your question" > file'
        )
    wants_stdin = any(str(path) == "-" for path in files)
    piped = "" if on_terminal and not wants_stdin else _read_stdin(prompt is not None, notice)
    fenced = [_fenced(path, piped) for path in files]
    parts = [*fenced, "" if wants_stdin else piped, prompt or ""]
    question = "\n\n".join(part for part in parts if part)
    if not question.strip():
        raise UsageError("the prompt is empty", hint='llamachat chat "your question"')
    return question


def system_message(text: str | None, path: Path | None) -> str | None:
    """The system message from whichever was given.

    Raises:
        UsageError: both were, or the file is not text.
    """
    if text is not None and path is not None:
        raise UsageError("--system and --system-file contradict each other")
    return _read_file(path).strip() if path is not None else text


def token(path: str | None) -> str | None:
    """The Hub token in a file.

    Raises:
        UsageError: there is none.
    """
    if path is None:
        return None
    found = _read_file(Path(path)).strip()
    if not found:
        raise UsageError(f"{path}: holds no token")
    return found


def _read_stdin(has_prompt: bool, notice: Notice) -> str:
    """Standard input to its end, decoded; a pipe that stays open is announced once."""
    if sys.stdin is None:
        return ""
    waiting = threading.Timer(
        PATIENCE_S, notice, ("stdin is a pipe that is still open; waiting for its end",)
    )
    waiting.daemon = True
    if has_prompt:
        waiting.start()
    try:
        raw = sys.stdin.buffer.read()
    except OSError:  # closed by whoever started us
        raw = b""
    finally:
        waiting.cancel()
    return _decoded(raw, "stdin", notice).removesuffix("\n")


def _decoded(raw: bytes, name: str, notice: Notice) -> str:
    text = raw.decode("utf-8-sig", "replace")
    if "\ufffd" in text and "\ufffd".encode() not in raw:
        notice(f"{name} is not all UTF-8; invalid bytes were replaced")
    return text.replace("\r\n", "\n")


def _fenced(path: Path, stdin: str) -> str:
    text = stdin if str(path) == "-" else _read_file(path)
    text = text.removesuffix("\n")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{'stdin' if str(path) == '-' else path.name}\n{text}\n{fence}"


def _read_file(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UsageError(f"{path}: {reason}") from error
