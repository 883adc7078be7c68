"""`llamachat bench`: how fast models are here, and what that is of what memory allows."""

from __future__ import annotations

from typing import Annotated

import typer

from llamachat.cli.flags import Device, Force, Json, Text, Verbose, option
from llamachat.cli.parallel import TensorParallel, ranks_of
from llamachat.cli.served import ApiKeyFile, ServedBy, Timeouts


def bench(
    context: typer.Context,
    *,
    model: Annotated[
        Text, option("--model", "-m", metavar="MODEL,...", help="Aliases, org/name, or paths.")
    ] = None,
    endpoint: ServedBy = None,
    api_key_file: ApiKeyFile = None,
    timeouts: Timeouts = None,
    n_prompt: Annotated[
        str, option("--n-prompt", "-p", metavar="N,...", help="Prompt tokens; 0: none [512].")
    ] = "512",
    n_gen: Annotated[
        str, option("--n-gen", "-n", metavar="N,...", help="Tokens one by one; 0: none [128].")
    ] = "128",
    depth: Annotated[
        str, option("--depth", "-d", metavar="N,...", help="Tokens of context before them [0].")
    ] = "0",
    threads: Annotated[
        Text, option("--threads", "-t", metavar="N,...", help="[default: physical cores]")
    ] = None,
    device: Device = "auto",
    tensor_parallel: TensorParallel = None,
    repetitions: Annotated[
        int, option("--repetitions", "-r", metavar="N", help="Of each test [5].")
    ] = 5,
    quantize: Annotated[
        str, option("--quantize", metavar="FORM,...", help="auto, none, int8, int4, nf4...")
    ] = "auto",
    output: Annotated[
        Text, option("--output", "-o", metavar="FORM", help="md [default], json, jsonl, csv.")
    ] = None,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Measure speed as llama-bench does, and the memory bandwidth that bounds it.

    Of a server: tokens a second and the time to the first one, as one client meets them.
    """
    flags = dict(locals())
    from dataclasses import asdict

    from llamachat import settings
    from llamachat.cli.served import endpoint_of, measured
    from llamachat.library.fit import Wanted
    from llamachat.measure.plan import plan
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.fetching import Door
    from llamachat.terminal.interrupts import left_at_once
    from llamachat.terminal.progress import Status
    from llamachat.terminal.reports import form_of, show_rows

    form = form_of(output, json=json)
    asked = plan(
        model or settings.default_model(),
        quantize=quantize,
        threads=threads,
        n_prompt=n_prompt,
        n_gen=n_gen,
        depth=depth,
        repetitions=repetitions,
        device=device,
        tensor_parallel=ranks_of(tensor_parallel, device),
    )
    notices, status = Notices(), Status()
    if (server := endpoint_of(flags, notices)) is not None:
        show_rows(map(asdict, measured(server, model, asked, notices, status.show)), form, status)
        return
    door = Door(notices, flags=("--quantize",), force=force)

    def wanted_of(quantize: str) -> Wanted:
        ranks = asked.tensor_parallel
        return Wanted(asked.ctx_size, quantize, device, tensor_parallel=ranks)

    for setup in asked.setups:
        door.prepare(setup.model, wanted_of(setup.quantize))
    with left_at_once():
        from llamachat.measure.bench import measure

    def notice(line: str) -> None:
        status.clear()
        notices(line)

    rows = measure(asked, force=door.force, status=status.show, notice=notice)
    show_rows(map(asdict, rows), form, status)
