"""`llamachat eval`: how well a model predicts a text, and how far it is from a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

from llamachat.cli.flags import (
    Backend,
    Dtype,
    Force,
    Json,
    KvCache,
    Name,
    Number,
    Quantize,
    Quiet,
    Text,
    Threads,
    Verbose,
    option,
)
from llamachat.cli.parallel import TensorParallel, ranks_of

# ruff: noqa: UP045  # Typer reads Optional on every Python that is supported


def evaluate(
    model: Name,
    *,
    against: Annotated[
        Text, option("--against", metavar="REF", help="A model; none: MODEL's own file, unpacked.")
    ] = None,
    text: Annotated[
        Optional[Path], option("--text", metavar="FILE", help="What to score; - is stdin.")
    ] = None,
    ctx_size: Annotated[
        int, option("--ctx-size", "-c", metavar="N", help="Tokens of a window [512].", minimum=3)
    ] = 512,
    chunks: Annotated[
        Number, option("--chunks", metavar="N", help="Windows, at most [all].", minimum=1)
    ] = None,
    require: Annotated[
        Optional[list[str]],
        option("--require", metavar="BOUND", help='Such as "kl<0.01", else exit 8; repeatable.'),
    ] = None,
    quantize: Quantize = "auto",
    kv_cache: KvCache = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    tensor_parallel: TensorParallel = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure perplexity on a text as llama.cpp does; with --against the divergence, too.

    REF runs unpacked to float32 by the reference backend, with a float32 KV cache; where memory
    has no room for that, in its file's own type, or bfloat16. It runs in one process.
    """
    from llamachat.library import results
    from llamachat.library.fit import Wanted
    from llamachat.measure.request import Request, requirement
    from llamachat.terminal import question
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.fetching import Door
    from llamachat.terminal.interrupts import left_at_once
    from llamachat.terminal.progress import Status
    from llamachat.terminal.results import last_of, show_result

    request = Request(
        model=model,
        against=against,
        ctx_size=ctx_size,
        chunks=chunks,
        quantize=quantize,
        kv_cache=kv_cache,
        backend=backend,
        dtype=dtype,
        threads=threads,
        tensor_parallel=ranks_of(tensor_parallel, "auto", backend),
        required=tuple(map(requirement, require or ())),
    )
    notices, status = Notices(quiet=quiet), Status(quiet=quiet)
    document = question.document(text, notices)
    door = Door(notices, flags=("--ctx-size", "--quantize"), force=force)
    wanted = Wanted(
        ctx_size, quantize, backend=backend, dtype=dtype, kv_cache=kv_cache,
        tensor_parallel=request.tensor_parallel,
    )  # fmt: skip
    door.prepare(model, wanted)
    if request.reference is not None:
        door.prepare(request.reference, Wanted(ctx_size, "none", kv_cache="f32"))
    request = replace(request, force=door.force)
    with left_at_once():
        from llamachat.measure.scoring import score

    def notice(line: str) -> None:
        status.clear()
        notices(line)

    result = last_of(score(request, document, status=status.show, notice=notice), status)
    show_result(result, json=json)
    results.keep(Path(result["path"]), result, notice=notices)
    request.check(result)
