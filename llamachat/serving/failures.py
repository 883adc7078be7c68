"""Errors in the form that clients of the OpenAI protocol understand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from llamachat.errors import LlamachatError, PromptTooLongError, UsageError
from llamachat.serving.service import UnknownModelError, in_fields
from llamachat.serving.worker import BusyError, ClosingError

RETRY_AFTER_S = 1
_STATUS: dict[type[LlamachatError], tuple[int, str | None]] = {
    PromptTooLongError: (400, "context_length_exceeded"),
    UsageError: (400, None),
    UnknownModelError: (404, "model_not_found"),
    BusyError: (429, "queue_full"),
    ClosingError: (503, "shutting_down"),
}


def body_of(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error; what is not text in a message is replaced."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    clean = {k: v and v.encode("utf-8", "replace").decode() for k, v in error.items()}
    return {"error": clean}


def failure(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> Response:
    """An error as a response."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body_of(status, message, param=param, code=code), status, headers)


def told(error: Exception) -> tuple[int, str, str | None]:
    """Status, message and code of what went wrong."""
    if not isinstance(error, LlamachatError):
        return 500, f"unexpected {type(error).__name__}", None
    status, code = _STATUS.get(type(error), (500, None))
    hint = f" ({in_fields(error.hint)})" if error.hint else ""
    return status, in_fields(error.message) + hint, code


def handle(app: FastAPI) -> None:
    """Let an app answer in this form whatever goes wrong."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(path)[:200] or None
        if first["type"] == "extra_forbidden":
            return failure(400, f"{param} is not supported", param=param)
        if first["type"] == "json_invalid":
            return failure(400, "the body is not JSON")
        return failure(400, f"{param}: {first['msg']}" if param else first["msg"], param=param)

    @app.exception_handler(HTTPException)
    async def _refused(_request: Request, error: HTTPException) -> Response:
        response = failure(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(LlamachatError)
    async def _failed(_request: Request, error: LlamachatError) -> Response:
        status, message, code = told(error)
        return failure(status, message, code=code)

    @app.exception_handler(Exception)
    async def _unexpected(_request: Request, error: Exception) -> Response:
        return failure(*told(error)[:2])
