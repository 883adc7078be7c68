"""What a request must pass before anything reads it: its key, its size, its pace."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamachat.serving.failures import failure

OPEN = ("/health",)  # paths that need no key


class Guard:
    """Lets pass what has the key, and reads no more of a body than may be."""

    def __init__(self, app: ASGIApp, *, key: str | None, max_bytes: int, patience_s: float) -> None:
        """Nothing is read yet.

        Args:
            app: what is guarded.
            key: what clients must know, or None.
            max_bytes: of a body.
            patience_s: for each piece of a body.
        """
        self._app = app
        self._key = None if key is None else key.encode()
        self._max_bytes = max_bytes
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not self._knows_key(scope, headers):
            refused = failure(401, "the API key is missing or wrong", code="invalid_api_key")
            await refused(scope, receive, send)
        elif length.isdigit() and (len(length) > 18 or int(length) > self._max_bytes):
            await failure(413, self._too_long())(scope, receive, send)
        else:
            await self._app(scope, self._bounded(receive), send)

    def _knows_key(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return secrets.compare_digest(given, self._key) and kind.lower() == b"bearer"

    def _bounded(self, receive: Receive) -> Receive:
        n_bytes, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                message: dict[str, Any] = dict(await asyncio.wait_for(receive(), self._patience_s))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"no body came for {self._patience_s:g} s") from None
            n_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if n_bytes > self._max_bytes:
                raise HTTPException(413, self._too_long())
            return message

        return bounded

    def _too_long(self) -> str:
        return f"the body has more than {self._max_bytes} bytes"
