"""Servers that are programs of others, and conversations with them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.request import urlopen

import pytest

from llamachat.chat.endpoint import Endpoint
from llamachat.chat.events import Done
from llamachat.chat.options import Options, Said
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import connect
from llamachat.chat.session import ChatSession

QUESTION = "Once upon a time"


def free_port() -> str:
    """One of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], endpoint: Endpoint, *, end: signal.Signals, seconds: float = 30
) -> Iterator[None]:
    """While it lasts, a program answers at the endpoint; `end` is what it is told to end by."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=silent, stdout=silent, stderr=silent, start_new_session=True
    ) as process:
        try:
            _until_healthy(endpoint, process, seconds)
            yield
        finally:
            process.send_signal(end)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _until_healthy(endpoint: Endpoint, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(f"{endpoint.root}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the server does not start")


def talk(endpoint: Endpoint, said: dict[str, Any] | None = None, **settings: Any) -> ChatSession:
    """A conversation with the only model of a server."""
    settings = {"max_new_tokens": 12, **settings}
    options = Options(Said(**said or {}))
    server = connect(endpoint, None, lambda _: None)
    return ChatSession(server, template=AsMessages(), options=options, **settings)


def ask(session: ChatSession, question: str = QUESTION) -> Done:
    """How the reply to a question ended, which is well."""
    *_, done = session.send(question)
    assert isinstance(done, Done)
    assert done.problem is None
    return done
