"""`llamachat serve`: a model behind the OpenAI protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from llamachat.cli.configured import unflagged
from llamachat.cli.flags import (
    Backend,
    CtxSize,
    Device,
    Dtype,
    File,
    Force,
    KvCache,
    Lora,
    ModelName,
    Offline,
    Quantize,
    Quiet,
    Revision,
    Template,
    Texts,
    Threads,
    TokenFile,
    Verbose,
    option,
    run_of,
)
from llamachat.cli.parallel import TensorParallel, ranks_of

# What `chat` is told, and here the clients say.
UNSAID = {"system": None, "system_file": None, "stop": None, "stop_loops": 0, "color": "auto"}


def serve(
    context: typer.Context,
    *,
    model: ModelName = None,
    host: Annotated[
        str, option("--host", metavar="ADDRESS", help="Where to listen [127.0.0.1].")
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", metavar="N", minimum=0, maximum=65535, help="0: any free [8000].")
    ] = 8000,
    parallel: Annotated[
        int,
        option("--parallel", metavar="N", minimum=1, maximum=256, help="Rows at once [8]."),
    ] = 8,
    queue: Annotated[
        int, option("--queue", metavar="N", minimum=0, help="Requests that may wait [64].")
    ] = 64,
    api_key_file: Annotated[
        File, option("--api-key-file", metavar="FILE", help="File that holds the clients' key.")
    ] = None,
    cors_origin: Annotated[
        Texts, option("--cors-origin", metavar="URL", help="Web page that may ask; repeatable.")
    ] = None,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "auto",
    lora: Lora = None,
    kv_cache: KvCache = "auto",
    tensor_parallel: TensorParallel = None,
    template: Template = None,
    force: Force = False,
    offline: Offline = False,
    revision: Revision = None,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer programs over HTTP, as OpenAI's servers do."""
    flags = dict(locals())
    from llamachat.errors import UsageError
    from llamachat.terminal import question
    from llamachat.terminal.failure import Notices

    try:
        from llamachat.serving import address
    except ImportError as missing:
        raise UsageError(
            f"serve needs {missing.name}", hint="pip install 'llamachat[serve]'"
        ) from missing
    flags["tensor_parallel"] = ranks_of(tensor_parallel, device, backend)
    notices = Notices(quiet=quiet)
    key = question.token(api_key_file, notices)
    listening = context.with_resource(address.bound(host, port))
    if key is None and not address.is_loopback(listening):
        notices("other machines may reach this and no key is asked for: --api-key-file")
    from llamachat.loading import Model
    from llamachat.terminal.opening import open_session

    opened = open_session(run_of(flags | UNSAID, notices, defaults=unflagged(context)))
    assert isinstance(opened.model, Model)
    from llamachat.serving.server import make_scheduler, make_service, serve

    scheduler = make_scheduler(opened.model, parallel=parallel)
    service = make_service(opened.model, opened.session, scheduler, queue=queue)
    del opened  # the cache of its own, too
    listening.listen()  # so that whoever reads the line finds it
    notices(f"{service.name} at {address.url(listening)}/v1 (Ctrl-C ends it)")
    serve(service, listening, key=key, origins=cors_origin or ())
