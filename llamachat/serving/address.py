"""The address that a server listens at; known before anything is loaded."""

from __future__ import annotations

import socket
import sys

import fastapi  # noqa: F401  # found missing before a model is loaded
import prometheus_client  # noqa: F401  # the same
import uvicorn  # noqa: F401  # the same

from llamachat.errors import TransferError


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet; port 0: any that is free.

    Raises:
        TransferError: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TransferError(f"{host}, port {port}: {reason}", hint="--port 0 takes any") from error
    return bound


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    host = str(bound.getsockname()[0])
    return host.startswith("127.") or host == "::1"
