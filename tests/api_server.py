"""Our own server in a thread of the test, over a model whose passes can be held back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

import llamachat
from llamachat.engine.scheduler import Scheduler, Told
from llamachat.serving import address
from llamachat.serving.app import create_app
from llamachat.serving.server import make_service


class Gated(Scheduler):
    """Takes a step only while the gate is open."""

    gate: threading.Event

    def step(self) -> list[Told]:
        self.gate.wait(30)
        return super().step()


@dataclass
class Server:
    """One that listens."""

    url: str
    scheduler: Gated

    @property
    def gate(self) -> threading.Event:
        """Open: set."""
        return self.scheduler.gate


@contextmanager
def serving(
    model: llamachat.Model, *, parallel: int = 4, queue: int = 8, **options: Any
) -> Iterator[Server]:
    """A server that ends with the block."""
    scheduler = Gated(model.engine, parallel=parallel)
    scheduler.gate = threading.Event()
    scheduler.gate.set()
    session = llamachat.ChatSession(model)
    app = create_app(make_service(model, session, scheduler, queue=queue), **options)
    listening = address.bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Server(address.url(listening), scheduler)
    finally:
        scheduler.gate.set()
        server.should_exit = True
        thread.join(10)


def until(holds: Callable[[], object], patience_s: float = 10.0) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)
