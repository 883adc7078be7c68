"""The process: an address, signals, and an end that loses nothing."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from llamachat import hardware
from llamachat.engine.pool import PAGE
from llamachat.engine.scheduler import Scheduler
from llamachat.kernels.backends import gpu_of
from llamachat.serving.app import create_app
from llamachat.serving.metrics import Metrics
from llamachat.serving.service import Service
from llamachat.serving.worker import Worker

if TYPE_CHECKING:
    from llamachat.chat.session import ChatSession
    from llamachat.loading import Model


def make_scheduler(model: Model, *, parallel: int) -> Scheduler:
    """What runs so many rows of a model at once, with as large a cache as memory allows."""
    return Scheduler(model.engine, parallel=parallel, slots=_slots(model, parallel))


def make_service(
    model: Model, session: ChatSession, scheduler: Scheduler, *, queue: int
) -> Service:
    """What answers for a model, as a session over it would: with its template and defaults."""
    metrics = Metrics()
    return Service(
        name=Path(model.name).name,
        tokenizer=model.tokenizer,
        template=session.template,
        options=session.options,
        ctx_size=scheduler.ctx_size,
        worker=Worker(scheduler, queue=queue, watch=metrics.watch),
        metrics=metrics,
    )


def serve(
    service: Service, bound: socket.socket, *, key: str | None = None, origins: Sequence[str] = ()
) -> None:
    """Answer until a signal comes, and what was begun is ended; a second one ends it at once.

    Raises:
        KeyboardInterrupt: the signal was SIGINT.
    """
    app = create_app(service, key=key, origins=origins)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on",
        backlog=1024, timeout_keep_alive=30,
    )  # fmt: skip
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again
    try:
        _Server(config, service.worker).run([bound])
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Server(uvicorn.Server):
    """Tells the worker first that the end has come; any second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.close()
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def _slots(model: Model, parallel: int) -> int:
    """Of the cache: what every row can need, or half of what is free where that is less."""
    engine = model.engine
    free = hardware.shared_memory_bytes(gpu_of(model.device))[1]
    a_slot = max(1, engine.bytes_per_token(1) - engine.bytes_per_token(0))
    least = engine.ctx_size + 4 * PAGE  # one reply that fills its context
    return max(least, min(free // 2 // a_slot, parallel * least))
