"""`llamachat quantize`: weights of 8 or 4 bits, made once and kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

from llamachat.cli.flags import Name, Number, Offline, Quiet, Revision, Threads, TokenFile, option

# ruff: noqa: UP045  # Typer evaluates annotations on Python 3.10, too


def quantize(
    model: Name,
    *,
    to: Annotated[str, option("--to", metavar="FORM", help="int8, int4, nf4, fp4, llm-int8.")],
    group_size: Annotated[
        Number,
        option("--group-size", metavar="N", help="Values that share a scale [32], 64, 128."),
    ] = None,
    double_quant: Annotated[
        bool, option("--double-quant", help="Scales of nf4 and fp4 at 8 bits, too.")
    ] = False,
    report: Annotated[
        bool, option("--report", help="What it did to each weight: a table, and report.svg.")
    ] = False,
    output: Annotated[
        Optional[Path],
        option("--output", "-o", metavar="DIR", help="Where to [default: the cache]."),
    ] = None,
    threads: Threads = None,
    force: Annotated[bool, option("--force", help="Do it again.")] = False,
    revision: Revision = None,
    offline: Offline = False,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
) -> None:
    """Make a model small, once. `chat --quantize FORM` finds it then.

    Stopped, it goes on where it was. The folder's path goes to stdout, or with --report the report.
    """
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.fetching import Door
    from llamachat.terminal.interrupts import left_at_once
    from llamachat.terminal.losses import show_report
    from llamachat.terminal.output import write
    from llamachat.terminal.progress import quantizing_progress
    from llamachat.terminal.question import token

    notices = Notices(quiet=quiet)
    door = Door(notices, revision=revision, token=token(hf_token_file, notices), offline=offline)
    located = door.fetch(model, None)  # one weight is in memory at a time
    with left_at_once(), quantizing_progress(quiet=quiet) as told:  # what is done is kept
        from llamachat.measure import quantizing

        folder = quantizing.quantize(
            located,
            quantizing.Wanted(to, group_size, double_quant),
            name=model,
            folder=output,
            threads=threads,
            force=force,
            notice=notices,
            progress=told,
        )
    if report:
        show_report(folder)
    else:
        write(f"{folder}\n")
