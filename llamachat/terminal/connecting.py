"""From flags to a session with a server."""

from __future__ import annotations

import time
from dataclasses import replace

from llamachat.chat.commands import Switch
from llamachat.chat.context import UNBOUNDED, check_overflow
from llamachat.chat.endpoint import Endpoint
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import Server, connect
from llamachat.chat.session import ChatSession
from llamachat.engine.decoding import check_one_row
from llamachat.errors import TransferError, UsageError
from llamachat.terminal.opening import Opened, Run


def open_remote(run: Run, endpoint: Endpoint) -> Opened:
    """Begin a conversation with a server.

    Raises:
        LlamachatError: see `connect`; or the server cannot do what was asked for.
    """
    decoding = run.options().decoding()
    check_one_row(decoding, logprobs=run.logprobs)
    overflow = check_overflow(run.overflow)
    server, seconds = _connected(run, endpoint)
    server.dialect.fields(decoding)
    session = ChatSession(
        server,
        system=run.system,
        options=run.options(),
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        template=AsMessages(),
        logprobs=run.logprobs,
        overflow=overflow,
    )
    return Opened(server, session, seconds)


def switch_remote(effect: Switch, opened: Opened, run: Run, endpoint: Endpoint) -> Run:
    """Go on with another model of the server; see `switching.switch`."""
    if effect.model is None:
        raise UsageError("/lora: a server has the adapters that it was started with")
    wanted = replace(run, model=effect.model)
    server, _ = _connected(wanted, endpoint)
    opened.session.use(server, AsMessages(), opened.session.options)
    opened.model, opened.session.run = server, server.facts
    return wanted


def title_of(server: Server) -> str:
    """One line about a model of a server."""
    known = server.engine.ctx_size
    context = f" · context {known:,}" if known < UNBOUNDED else ""
    return f"{server.name} · {server.dialect.name} at {server.endpoint.url}{context}"


def _connected(run: Run, endpoint: Endpoint) -> tuple[Server, float]:
    if run.offline and not endpoint.is_local:
        raise TransferError(f"{endpoint.url} is not on this machine, and --offline is asked for")
    began = time.perf_counter()
    server = connect(endpoint, run.model, run.notices, ctx_size=run.ctx_size)
    return server, time.perf_counter() - began
