"""What is asked in one shot: argument, files and standard input, put together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from llamachat.chat.files import Notice, decoded, fenced, read_text
from llamachat.errors import TransferError, UsageError

PATIENCE_S = 2.0


def read(
    argument: str | None,
    option: str | None,
    files: Sequence[Path],
    notice: Notice,
    *,
    talks: bool = False,
) -> str | None:
    """The whole question, or None for a conversation (both ends are terminals, nothing asked).

    Args:
        argument: PROMPT.
        option: of `-p`.
        files: of `-f`, in order.
        notice: told what the user should know.
        talks: whether a conversation follows, which takes a terminal to show it.

    Raises:
        UsageError: asked twice, asked nothing, or a file that is not text.
    """
    if argument is not None and option is not None:
        raise UsageError("the prompt was given twice: as PROMPT and with -p")
    prompt = argument if argument is not None else option
    on_terminal = sys.stdin.isatty()
    if talks and not sys.stdout.isatty():
        raise UsageError("a conversation needs a terminal, and stdout is none", hint="without -i")
    if prompt is None and not files and on_terminal:
        if sys.stdout.isatty():
            return None
        raise UsageError(
            "no prompt, and stdout is no terminal", hint='llamachat chat "your question" > file'
        )
    wants_stdin = any(str(path) == "-" for path in files)
    reads_stdin = wants_stdin or not on_terminal
    piped = _read_stdin(prompt is not None, notice).removesuffix("\n") if reads_stdin else ""
    fenced = [_fenced(path, piped, notice) for path in files]
    asked = valid(prompt or "", "the prompt", notice)
    parts = [*fenced, "" if wants_stdin else piped, asked]
    question = "\n\n".join(part for part in parts if part)
    if not question.strip() and talks:
        return None
    if not question.strip():
        raise UsageError("the prompt is empty", hint='llamachat chat "your question"')
    return question


def is_yes(answer: str) -> bool:
    """Whether an answer agrees."""
    return answer.strip().lower() in ("y", "yes")


def document(path: Path | None, notice: Notice) -> str:
    """The whole text of a file, or of stdin (for "-", or None where it is no terminal).

    Raises:
        UsageError: there is none, or the file cannot be read.
    """
    from_stdin = str(path) == "-" or (path is None and not sys.stdin.isatty())
    text = ""
    if from_stdin:
        text = _read_stdin(path is None, notice)
    elif path is not None:
        text = read_text(path, notice)
    if not text:
        raise UsageError("there is no text", hint="name a file with --text FILE, or pipe one in")
    return text


def system_message(text: str | None, path: Path | None, notice: Notice) -> str | None:
    """The system message from whichever was given.

    Raises:
        UsageError: both were, or the file cannot be read.
    """
    if text is not None and path is not None:
        raise UsageError("--system and --system-file contradict each other")
    if path is not None:
        return read_text(path, notice).strip()
    return None if text is None else valid(text, "--system", notice)


def token(path: Path | None, notice: Notice) -> str | None:
    """The Hub token in a file.

    Raises:
        UsageError: there is none.
    """
    if path is None:
        return None
    found = read_text(path, notice).strip()
    if not found:
        raise UsageError(f"{path}: holds no token")
    return found


def valid(argument: str, name: str, notice: Notice) -> str:
    """An argument as text: bytes that are not, which Python carries as surrogates, are replaced."""
    return decoded(argument.encode("utf-8", "surrogatepass"), name, notice)


def _read_stdin(announced: bool, notice: Notice) -> str:
    """Standard input to its end, decoded; a pipe that stays open may be announced, once."""
    waiting = threading.Timer(
        PATIENCE_S, notice, ("stdin is a pipe that is still open; waiting for its end",)
    )
    waiting.daemon = True
    if announced and not sys.stdin.isatty():
        waiting.start()
    try:
        raw = sys.stdin.buffer.read()
    except OSError as error:
        raise TransferError(f"stdin: {error.strerror or error}") from error
    finally:
        waiting.cancel()
    return decoded(raw, "stdin", notice)


def _fenced(path: Path, stdin: str, notice: Notice) -> str:
    if str(path) == "-":
        return fenced("stdin", stdin)
    return fenced(path.name, read_text(path, notice))
