"""From flags to a session that is ready to be asked, with progress on stderr meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat import settings
from llamachat.chat.options import BUILT_IN, Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import PlainTemplate
from llamachat.errors import UsageError
from llamachat.terminal.failure import Notices
from llamachat.terminal.progress import download_progress, loading

if TYPE_CHECKING:
    from llamachat.load import Model


@dataclass(frozen=True, slots=True)
class Run:
    """What the user asked for, as flags say it. `began`: perf_counter at the start, in seconds."""

    model: str | None
    system: str | None
    said: Said
    max_new_tokens: int | None
    ctx_size: int | None
    threads: int | None
    device: str
    dtype: str
    template: str | None
    stop: tuple[str, ...]
    offline: bool
    revision: str | None
    token: str | None
    notices: Notices
    verbose: bool
    began: float


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model, the session over it, and the seconds that loading took."""

    model: Model
    session: ChatSession
    load_s: float


def open_session(run: Run) -> Opened:
    """Load the model, and begin a conversation.

    Raises:
        LlamachatError: see `load`; options that contradict each other are found before loading.
    """
    config = settings.defaults()
    layer = ("config file", {k: v for k, v in config.items() if k in BUILT_IN})
    Options(run.said, (layer,)).decoding()
    if run.template not in (None, "none"):
        raise UsageError(f"--template {run.template} is not known", hint="--template none")
    began = time.perf_counter()
    with left_at_once():
        import torch  # noqa: F401  # the longest part of starting

        from llamachat.load import load
    with download_progress(quiet=run.notices.quiet) as progress, loading(quiet=run.notices.quiet):
        model = load(
            run.model,
            device=run.device,
            dtype=run.dtype,
            ctx_size=run.ctx_size,
            threads=run.threads,
            revision=run.revision,
            token=run.token,
            offline=run.offline,
            notice=run.notices,
            progress=progress,
        )
    if model.chat_template is None and run.template is None:
        run.notices(f"{model.name} has no chat template: it goes on writing where the prompt ends")
    session = ChatSession(
        model,
        system=run.system,
        options=Options(run.said, (layer, *model.sampling)),
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        template=PlainTemplate() if run.template == "none" else None,
    )
    return Opened(model, session, time.perf_counter() - began)


@contextmanager
def left_at_once() -> Iterator[None]:
    """An interrupt inside ends the process: half-imported C extensions may swallow exceptions."""
    previous = signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
