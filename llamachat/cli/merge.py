"""`llamachat merge`: weight deltas and adapters into one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamachat.cli.flags import Offline, Quiet, Text, option


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Alias, org/name, or folder.")],
    changes: Annotated[
        list[str], typer.Argument(metavar="DELTA|LORA...", help="Folders, in order; LORA[:SCALE].")
    ],
    *,
    output: Annotated[Path, option("--output", "-o", metavar="DIR", help="Where to.")],
    new_rows: Annotated[
        Text,
        option("--new-rows", metavar="NAME", help="Of ids that a delta adds: mean, zero."),
    ] = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Add weight deltas and LoRA adapters to a model, and keep the result.

    The folder's path goes to stdout.
    """
    from llamachat.errors import UsageError
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.fetching import Door
    from llamachat.terminal.output import write
    from llamachat.terminal.progress import quantizing_progress

    rows = next((known for known in ("mean", "zero") if known == new_rows), None)
    if new_rows is not None and rows is None:
        raise UsageError(f"--new-rows is {new_rows!r}, expected one of mean, zero")
    notices = Notices(quiet=quiet)
    located = Door(notices, offline=offline).fetch(base, None)  # one weight in memory at a time
    with quantizing_progress(quiet=quiet, doing="merging") as told:
        from llamachat.loading.merging import merge

        merge(located, changes, output, new_rows=rows, notice=notices, progress=told)
    write(f"{output}\n")
