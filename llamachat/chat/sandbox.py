"""Hostile templates: rendered in a process apart, under limits of time, memory and size.

Jinja's sandbox keeps a template from the interpreter, but not from its time and memory: one
expression (`'a' * 10**9`, `10**10**10`) can ask for all of both. So a worker process renders, and
is killed when it takes too much. It costs about 0.1 s to start, once, and 1 ms a render.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, cast

import psutil

from llamachat.errors import DamagedFileError, UsageError

MAX_SOURCE_CHARS: Final = 1_000_000  # the longest in use have about 20,000
MAX_RENDERED_CHARS: Final = 1_000_000  # without what people write: see `JinjaTemplate`

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_START_LIMIT_S = 30.0  # importing jinja2 from a cold disk on a busy machine
_POLL_S = 0.02
_MAX_ANSWER_BYTES = 12 * MAX_RENDERED_CHARS + 1000  # JSON spells a character with 12 at most
_HINT = "the template comes with the model; try another copy of it"


class Sandbox:
    """Renders Jinja templates that nobody vouches for. The worker starts at the first render.

    Args:
        time_limit_s: what one render may take, after the worker has started.
        memory_limit_bytes: address space of the worker (resident memory where the system has no
            limit on that).
    """

    def __init__(self, *, time_limit_s: float = 2.0, memory_limit_bytes: int = 512 << 20) -> None:
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._worker: _Worker | None = None

    def render(
        self, source: str, variables: Mapping[str, Any], *, now: datetime | None = None
    ) -> str:
        """The text of the template `source`.

        Args:
            source: a chat template as Hugging Face writes them.
            variables: what it may name; plain JSON values.
            now: what `strftime_now` tells; default the moment of rendering.

        Raises:
            UsageError: the template refused the variables (`raise_exception`).
            DamagedFileError: it is not a template, fails, or goes over a limit.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise _damaged(f"{len(source):,} characters, expected at most {MAX_SOURCE_CHARS:,}")
        if self._worker is None:
            self._worker = _Worker(self._memory_limit_bytes, self._time_limit_s)
            self._ask("", {}, None, _START_LIMIT_S)  # the start is not the template's time
        answer = self._ask(source, variables, now, self._time_limit_s)
        if "refused" in answer:
            raise UsageError(
                f"chat template: {_printable(answer['refused'])}",
                hint="the model's own template does not take this conversation",
            )
        if "text" not in answer:
            self.close()  # what a failure leaves behind in the worker is not known
            raise _damaged(_printable(answer["failed"]))
        return _whole_characters(answer["text"])

    def close(self) -> None:
        """End the worker. A later render starts another."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, source: str, variables: Mapping[str, Any], now: datetime | None, limit_s: float
    ) -> dict[str, str]:
        assert self._worker is not None
        request = {
            "source": source,
            "variables": variables,
            "now": None if now is None else now.isoformat(),
            "max_chars": MAX_RENDERED_CHARS,
        }
        try:
            return self._worker.ask(request, limit_s)
        except BaseException:  # a limit, or Ctrl-C: the worker is still at it
            self.close()
            raise


class _Worker:
    """One process, asked one thing at a time."""

    def __init__(self, memory_limit_bytes: int, time_limit_s: float) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        own_limits = (str(memory_limit_bytes), str(math.ceil(time_limit_s) + 1))
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), *own_limits, *_jinja_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is not for it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
            | getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._thread = ThreadPoolExecutor(1)  # Windows cannot wait for a pipe, but for a thread
        self.end = weakref.finalize(self, _end, self._process)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, str]:
        """The worker's answer.

        Raises:
            DamagedFileError: it took too long or too much, or it died.
        """
        deadline = time.monotonic() + limit_s
        line = json.dumps(request).encode("ascii") + b"\n"
        exchange = self._thread.submit(_exchange, self._process, line)
        while not wait([exchange], timeout=_POLL_S).done:
            if time.monotonic() > deadline:
                raise _damaged(f"took more than {limit_s:g} s")
            if self._resident_bytes() > self._memory_limit_bytes:
                raise _damaged(f"took more than {self._memory_limit_bytes >> 20} MiB of memory")
        try:
            answer: dict[str, str] = json.loads(exchange.result())
        except (OSError, ValueError) as error:  # a broken pipe, or half a line: it is gone
            raise _damaged("ended the process that rendered it") from error
        return answer

    def _resident_bytes(self) -> int:
        with suppress(psutil.Error):
            started = psutil.Process(self._process.pid)
            # In a Windows venv, python.exe starts the interpreter as its child.
            return sum(each.memory_info().rss for each in (started, *started.children()))
        return 0


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    to_worker, from_worker = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    to_worker.write(line)
    to_worker.flush()
    return from_worker.readline(_MAX_ANSWER_BYTES)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError), process:  # leaving closes the pipes and waits
        process.kill()


def _jinja_folders() -> list[str]:
    """Where the worker finds jinja2 and what it needs, without importing them here."""
    specs = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    origins = (spec.origin for spec in specs if spec is not None)
    return list(dict.fromkeys(str(Path(origin).parents[1]) for origin in origins if origin))


def _whole_characters(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _damaged("renders to half a surrogate pair, expected text") from error
    return text


def _printable(message: str) -> str:
    """A template's own words, unable to reach the terminal's controls."""
    return "".join(c if c.isprintable() else " " for c in message).strip()


def _damaged(found: str) -> DamagedFileError:
    return DamagedFileError(f"chat template: {found}", hint=_HINT)
