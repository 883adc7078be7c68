"""`llamachat sessions` and `llamachat replay`: conversations on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from llamachat.cli import completion
from llamachat.cli.flags import Json, option

# ruff: noqa: UP045  # Typer reads Optional on every Python that is supported

SessionName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="As the list has it, or a path.",
        show_envvar=False,
        autocompletion=completion.sessions,
    ),
]


def top(context: typer.Context) -> None:
    """Conversations that are saved."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def list_sessions(*, json: Json = False) -> None:
    """List the conversations that are saved, the last one first."""
    from llamachat.terminal import sessions

    sessions.show_all(json=json)


def show(name: SessionName, *, json: Json = False) -> None:
    """Show what was said."""
    from llamachat.terminal import sessions

    sessions.show_one(name, json=json)


def export(
    form: Annotated[str, typer.Argument(metavar="FORM", help="md or json.", show_envvar=False)],
    name: SessionName,
    *,
    output: Annotated[
        Optional[Path], option("--output", "-o", metavar="FILE", help="A new file, not stdout.")
    ] = None,
) -> None:
    """Write a conversation as Markdown or JSON."""
    from llamachat.terminal import sessions

    sessions.export_one(form, name, output)


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="As the list has them.", autocompletion=completion.sessions
        ),
    ],
    *,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete conversations."""
    from llamachat.terminal import sessions

    sessions.remove(names, yes=yes)


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_sessions,
    "show": show,
    "export": export,
    "rm": remove,
}


def replay(
    file: SessionName,
    *,
    check: Annotated[
        bool, option("--check", help="Answer again, and compare token by token (exit 8).")
    ] = False,
    json: Json = False,
) -> None:
    """Show a saved conversation again as it was; with --check, hold it again and compare."""
    from llamachat.terminal import replaying

    if check:
        replaying.check(file, json=json)
    else:
        replaying.show(file, json=json)
