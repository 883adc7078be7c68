"""From flags to a session that is ready to be asked, with progress on stderr meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llamachat import settings
from llamachat.chat.builtin import BuiltInTemplate, check_name, template_for
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import PlainTemplate, Template
from llamachat.engine.decoding import check_one_row
from llamachat.engine.parameters import PARAMETERS
from llamachat.errors import UsageError, WillNotFitError
from llamachat.terminal.failure import Notices
from llamachat.terminal.interrupts import left_at_once
from llamachat.terminal.progress import download_progress, loading

if TYPE_CHECKING:
    from llamachat.loading import Model


@dataclass(frozen=True, slots=True)
class Run:
    """What the user asked for, as flags say it."""

    model: str | None
    system: str | None
    said: Said
    max_new_tokens: int | None
    ctx_size: int | None
    threads: int | None
    device: str
    backend: str
    dtype: str
    quantize: str
    lora: tuple[str, ...]
    kv_cache: str
    template: str | None
    stop: tuple[str, ...]
    logprobs: int
    stop_loops: int
    speculate: int
    force: bool
    offline: bool
    revision: str | None
    token: str | None
    notices: Notices
    verbose: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model, the session over it, and the seconds that loading took."""

    model: Model
    session: ChatSession
    load_s: float


def open_session(run: Run) -> Opened:
    """Load the model, and begin a conversation.

    Raises:
        LlamachatError: see `load`; what is wrong with names and options is found before loading.
    """
    layer = ("config file", _configured())
    decoding = Options(run.said, (layer,)).decoding()
    check_one_row(decoding, draft=run.speculate, logprobs=run.logprobs)
    if run.template is not None:
        check_name(run.template)
    _fetch(run)
    began = time.perf_counter()
    model = _load(run)
    load_s = time.perf_counter() - began
    session = ChatSession(
        model,
        system=run.system,
        options=Options(run.said, (layer, *model.sampling)),
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        template=_template(run, model),
        logprobs=run.logprobs,
        speculate=run.speculate,
        stop_loops=run.stop_loops,
    )
    return Opened(model, session, load_s)


def reopened(opened: Opened, run: Run) -> Opened:
    """The same session beside a model that is loaded anew, as `run` says."""
    began = time.perf_counter()
    model = _load(run)
    return Opened(model, opened.session, time.perf_counter() - began)


def _template(run: Run, model: Model) -> Template:
    template = template_for(model.chat_template, model.tokenizer, model.located, asked=run.template)
    if run.template is None and isinstance(template, PlainTemplate):
        run.notices(f"{model.name} has no chat template: it goes on writing where the prompt ends")
    elif run.template is None and isinstance(template, BuiltInTemplate):
        run.notices(f"{model.name} carries no chat template: {template.name}, by what it is")
    return template


def _configured() -> dict[str, float]:
    """The numbers for decoding in the config file."""
    values = {k: v for k, v in settings.defaults().items() if k in PARAMETERS}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(f"{settings.config_path()}: {name} is {value!r}, expected a number")
    return values


def _fetch(run: Run) -> None:
    """See to it that the model is on disk, before the long import of torch."""
    from llamachat.library.store import resolve
    from llamachat.terminal.fitting import consult

    approve = partial(
        consult,
        force=run.force,
        ctx_size=run.ctx_size,
        quantize=run.quantize,
        notices=run.notices,
    )
    with download_progress(quiet=run.notices.quiet) as progress:
        resolve(
            run.model or settings.default_model(),
            revision=run.revision,
            token=run.token,
            offline=run.offline,
            approve=approve,
            notice=run.notices,
            progress=progress,
        )


def _load(run: Run) -> Model:
    """Load the model; what will not fit only if the user says so."""
    try:
        return _loaded(run, force=run.force)
    except WillNotFitError as error:
        from llamachat.terminal.fitting import confirm

        confirm(error, force=run.force)
    return _loaded(run, force=True)


def _loaded(run: Run, *, force: bool) -> Model:
    said: list[str] = []
    try:
        with loading(quiet=run.notices.quiet), left_at_once():
            import torch  # noqa: F401  # the longest part of starting

            from llamachat.loading import load

            return load(
                run.model,
                lora=run.lora,
                device=run.device,
                backend=run.backend,
                dtype=run.dtype,
                quantize=run.quantize,
                kv_cache=run.kv_cache,
                ctx_size=run.ctx_size,
                threads=run.threads,
                revision=run.revision,
                token=run.token,
                offline=run.offline,
                force=force,
                notice=said.append,
            )
    finally:
        for line in said:
            run.notices(line)
