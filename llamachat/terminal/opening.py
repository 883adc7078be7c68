"""From flags to a session that is ready to be asked, with progress on stderr meanwhile."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llamachat import settings
from llamachat.chat.builtin import BuiltInTemplate, check_name, template_for
from llamachat.chat.context import check_overflow
from llamachat.chat.endpoint import Endpoint
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import PlainTemplate, Template
from llamachat.engine.decoding import check_one_row
from llamachat.errors import WillNotFitError
from llamachat.terminal.failure import Notices
from llamachat.terminal.front import BetweenLines, Front, Streams
from llamachat.terminal.interrupts import ending

if TYPE_CHECKING:
    from llamachat.chat.remote import Server
    from llamachat.loading import Model


@dataclass(frozen=True, slots=True)
class Run:
    """What the user asked for, as flags, variables and the config file say it.

    Attributes:
        layers: (origin, values) of decoding below what was said, the strongest first.
        origins: who said what, by name.
        endpoint: the server that answers; None: this process does.
    """

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
    overflow: str
    force: bool
    offline: bool
    revision: str | None
    token: str | None
    notices: Notices
    verbose: bool
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    session: str | None = None
    resume: bool = False
    no_save: bool = False
    tensor_parallel: int | None = None

    def options(self, sampling: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> Options:
        """What was said about decoding, over what a model suggests."""
        return Options(self.said, (*self.layers, *sampling), self.origins)


@dataclass(slots=True)
class Opened:
    """A model that is loaded or served, the session over it, and the seconds that this took."""

    model: Model | Server
    session: ChatSession
    load_s: float


def open_session(run: Run, front: Front | None = None) -> Opened:
    """Load the model, and begin a conversation.

    Args:
        run: how.
        front: where the user is; default at the standard streams.

    Raises:
        LlamachatError: see `load`; what is wrong with names and options is found before loading.
    """
    if run.endpoint is not None:
        from llamachat.terminal.connecting import open_remote

        return open_remote(run, run.endpoint)
    decoding = run.options().decoding()
    check_one_row(decoding, draft=run.speculate, logprobs=run.logprobs)
    if run.template is not None:
        check_name(run.template)
    overflow = check_overflow(run.overflow)
    front = front or Streams(quiet=run.notices.quiet)
    run = replace(run, force=fetch(run, front))
    began = time.perf_counter()
    model = _load(run, front)
    load_s = time.perf_counter() - began
    session = ChatSession(
        model,
        system=run.system,
        options=run.options(model.sampling),
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        template=_template(run, model),
        logprobs=run.logprobs,
        speculate=run.speculate,
        stop_loops=run.stop_loops,
        overflow=overflow,
    )
    return Opened(model, session, load_s)


def reopened(opened: Opened, run: Run) -> Opened:
    """The same session beside a model that is loaded anew, as `run` says."""
    began = time.perf_counter()
    model = _load(run, BetweenLines(quiet=run.notices.quiet))
    return Opened(model, opened.session, time.perf_counter() - began)


def adopt(model: Model, opened: Opened, run: Run) -> None:
    """Go on with another model, loaded as `run` says."""
    session = opened.session
    options = replace(session.options, layers=(*run.layers, *model.sampling))
    session.use(model, _template(run, model), options)
    opened.model = model


def _template(run: Run, model: Model) -> Template:
    template = template_for(model.chat_template, model.tokenizer, model.located, asked=run.template)
    if run.template is None and isinstance(template, PlainTemplate):
        run.notices(f"{model.name} has no chat template: it goes on writing where the prompt ends")
    elif run.template is None and isinstance(template, BuiltInTemplate):
        run.notices(f"{model.name} carries no chat template: {template.name}, by what it is")
    return template


def fetch(run: Run, front: Front) -> bool:
    """See to it that the model is on disk, before the long import of torch.

    Returns:
        whether to load it although it will not fit.
    """
    from llamachat.library.store import locate

    name = run.model or settings.default_model()
    if locate(name, revision=run.revision):  # what forecasts import takes a while
        return run.force
    from llamachat.library.fit import Wanted
    from llamachat.terminal.fetching import Door

    door = Door(
        run.notices,
        force=run.force,
        revision=run.revision,
        token=run.token,
        offline=run.offline,
        front=front,
    )
    wanted = Wanted(
        run.ctx_size, run.quantize, run.device, run.backend, run.dtype, run.kv_cache,
        run.tensor_parallel or 1,
    )  # fmt: skip
    door.fetch(name, wanted)
    return door.force


def _load(run: Run, front: Front) -> Model:
    """Load the model; what will not fit only if the user says so."""
    try:
        return load_model(run, front)
    except WillNotFitError as error:
        from llamachat.terminal.fetching import confirm

        if run.force:  # it does not, in earnest
            raise
        confirm(error, front.ask)
    return load_model(replace(run, force=True), front)


def load_model(run: Run, front: Front) -> Model:
    """Load a model as `run` says, with a sign of life meanwhile.

    Raises:
        LlamachatError: see `load`.
    """
    with front.loading(run.notices) as notice:
        from llamachat.loading import load
        from llamachat.loading.preload import preload_torch

        preload_torch()
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
            tensor_parallel=run.tensor_parallel or 1,
            revision=run.revision,
            token=run.token,
            offline=run.offline,
            force=run.force,
            notice=notice,
            lost=ending(),
        )
