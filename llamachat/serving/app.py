"""The routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llamachat.serving.answers import Answer
from llamachat.serving.failures import body_of, failure, handle, told
from llamachat.serving.guard import Guard
from llamachat.serving.protocol import ChatAsked, CompletionAsked
from llamachat.serving.service import Service, UnknownModelError
from llamachat.serving.several import Several

T = TypeVar("T")
MAX_BODY_BYTES = 4 << 20
PATIENCE_S = 60.0


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """The body of every error."""

    error: Problem


def create_app(service: Service, *, key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The application.

    Args:
        service: what answers; its worker begins with the application.
        key: what clients must know, or None.
        origins: of web pages that may ask (CORS).
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield

    failures: dict[int | str, dict[str, Any]] = {
        kind: {"model": Failure, "description": "An error"} for kind in ("4XX", "5XX")
    }
    app = FastAPI(title="llamachat", lifespan=lifespan, responses=failures)
    handle(app)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, key=key, max_bytes=MAX_BODY_BYTES, patience_s=PATIENCE_S)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llamachat",
        "context_length": service.ctx_size,
    }

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """The one model."""
        if model != service.name:
            raise UnknownModelError(f"the model here is {service.name!r}, not {model!r}")
        return JSONResponse(card)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked) -> Response:
        """Answer a conversation."""
        return Answering(service, await service.chat(asked), asked)

    @app.post("/v1/completions")
    async def completion(asked: CompletionAsked) -> Response:
        """Go on with a text."""
        return Answering(service, await service.completion(asked), asked)


class Answering(Response):
    """An answer on its way to a client; one that leaves ends it."""

    def __init__(
        self, service: Service, answer: Answer | Several, asked: ChatAsked | CompletionAsked
    ) -> None:
        super().__init__()
        self._service, self._answer, self._asked = service, answer, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until that is done or nobody listens."""
        end: str | None = None
        try:
            work = self._streamed(send) if self._asked.stream else self._whole(scope, receive, send)
            end = await _until_left(work, receive)
        finally:
            self._answer.account(end or "disconnected")
            self._service.worker.release(*self._answer.streams)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Send it in one piece; returns how it ended."""
        response, end = await self._made()
        await response(scope, receive, send)
        return end

    async def _made(self) -> tuple[Response, str]:
        try:
            return JSONResponse(await self._answer.whole()), "ok"
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told
            status, message, code = told(error)
            return failure(status, message, code=code), "failed"

    async def _streamed(self, send: Send) -> str:
        """Send it as server-sent events; returns how it ended."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        end = "ok"
        try:
            async for chunk in self._answer.chunks(usage=self._asked.includes_usage):
                await _send_event(send, json.dumps(chunk, ensure_ascii=False))
            await _send_event(send, "[DONE]")
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told
            status, message, code = told(error)
            await _send_event(send, json.dumps(body_of(status, message, code=code)))
            end = "failed"
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return end


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_left(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """What the work comes to; None if the client leaves first, which ends it."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
