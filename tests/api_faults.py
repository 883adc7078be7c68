"""A server of the OpenAI protocol on loopback that says what a test tells it to, byte for byte."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Step = bytes | float  # to be sent, or seconds to wait before


@dataclass(frozen=True)
class Response:
    """What one request gets.

    Attributes:
        steps: the body as it is sent; each part is a chunk of its own.
        cut: the connection breaks where the body should end.
    """

    steps: Sequence[Step] = ()
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def delta(text: str | None, reason: str | None = None, **more: Any) -> bytes:
    """An event that adds text to a reply."""
    content = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": content, "finish_reason": reason, **more}
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [choice]})


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    told = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": told})


DONE = b"data: [DONE]\n\n"


def said(*texts: str, reason: str = "stop", counted: tuple[int, int] = (9, 3)) -> Response:
    """A whole reply."""
    parts = [*map(delta, texts), delta(None, reason), usage(*counted), DONE]
    return Response(parts)


def failed(status: int, message: str = "", **headers: str) -> Response:
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response([body], status, "application/json", named)


@dataclass
class Api:
    """The server.

    Attributes:
        cards: what /v1/models tells; None: there is no such page.
        responses: to chat requests, in turn; the last one again and again.
        asked: the bodies of these.
        headers: of the last request.
        closed: how many clients went away before their reply was whole.
    """

    cards: list[dict[str, Any]] | None = field(
        default_factory=lambda: [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]
    )
    responses: list[Response] = field(default_factory=lambda: [said("Hel", "lo")])
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    closed: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            path, body = await self._read(reader)
            response = self._response(path, body)
            await self._send(response, writer)
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.headers = {
            name.lower(): value
            for line in head[1:]
            if line
            for name, value in [line.split(": ", 1)]
        }
        length = int(self.headers.get("content-length", 0))
        return head[0].split()[1], await reader.readexactly(length)

    def _response(self, path: str, body: bytes) -> Response:
        if path.endswith("/chat/completions"):
            self.asked.append(json.loads(body))
            return self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        if path.endswith("/v1/models") and self.cards is not None:
            return Response([json.dumps({"data": self.cards}).encode()], kind="application/json")
        return failed(404, "no such page")

    async def _send(self, response: Response, writer: asyncio.StreamWriter) -> None:
        headers = {
            "content-type": response.kind,
            "transfer-encoding": "chunked",
            "connection": "close",
            **response.headers,
        }
        lines = [f"HTTP/1.1 {response.status} X", *(f"{k}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            for step in response.steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    writer.write(b"%x\r\n%s\r\n" % (len(step), step))
                    await writer.drain()
        except ConnectionError:
            self.closed += 1
            raise
        if not response.cut:
            writer.write(b"0\r\n\r\n")
            await writer.drain()


@contextmanager
def api_server() -> Iterator[Api]:
    """The server, while a test lasts."""
    api, ready = Api(), threading.Event()
    loop = asyncio.new_event_loop()
    servers: list[asyncio.Server] = []

    async def start() -> None:
        servers.append(await asyncio.start_server(api.serve, "127.0.0.1", 0))
        api.port = servers[0].sockets[0].getsockname()[1]
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        servers[0].close()
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield api
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
