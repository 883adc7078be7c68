"""`llamachat pull`, `list`, `show`, `where`, `rm`: models by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from llamachat.cli.flags import Json, Name, Offline, Quiet, Revision, TokenFile, option

# ruff: noqa: UP045  # Typer reads Optional on every Python that is supported


def pull(
    model: Name,
    *,
    revision: Revision = None,
    force: Annotated[
        bool, option("--force", help="Fetch again, and what is forecast not to fit in memory.")
    ] = False,
    offline: Offline = False,
    hf_token_file: TokenFile = None,
    quiet: Quiet = False,
) -> None:
    """Download and verify a model. What is on disk is not fetched again."""
    from llamachat.library.fit import Wanted
    from llamachat.terminal.failure import Notices
    from llamachat.terminal.fetching import Door
    from llamachat.terminal.output import write
    from llamachat.terminal.question import token

    notices = Notices(quiet=quiet)
    door = Door(
        notices,
        flags=(),
        force=force,
        revision=revision,
        token=token(hf_token_file, notices),
        offline=offline,
    )
    located = door.fetch(model, Wanted(), again=force, whole=False)
    write(f"{located.path}\n")


def list_models(
    *,
    all: Annotated[bool, option("--all", help="And what could be fetched.")] = False,
    max_size: Annotated[
        Optional[str], option("--max-size", metavar="N", help="Parameters at most: 8b, 360m.")
    ] = None,
    family: Annotated[
        Optional[str], option("--family", metavar="NAME", help="Of it alone.")
    ] = None,
    licence: Annotated[
        Optional[str], option("--licence", metavar="NAME", help="Under it alone.")
    ] = None,
    gated: Annotated[
        Optional[bool], option("--gated/--not-gated", help="Those that ask for a consent, or not.")
    ] = None,
    json: Json = False,
) -> None:
    """List the models on disk."""
    from llamachat.terminal.listing import Filter, max_params, show_models

    only = Filter(max_params(max_size), family, licence, gated)
    show_models(every=all, only=only, json=json)


def show(
    model: Name,
    *,
    template: Annotated[bool, option("--template", help="The chat template.")] = False,
    render: Annotated[
        Optional[Path],
        option("--render", metavar="FILE", help="A JSON list of role and content, as prompt."),
    ] = None,
    json: Json = False,
) -> None:
    """Show a model's config, sizes, licence and files. Or a conversation as its prompt."""
    from llamachat.terminal import tables

    if render is not None:
        tables.show_rendered(model, render, json=json)
    elif template:
        tables.show_template(model, json=json)
    else:
        tables.show_model(model, json=json)


def where(model: Name) -> None:
    """Show where a model is on disk, and nothing else."""
    from llamachat.library.store import require
    from llamachat.terminal.output import write

    write(f"{require(model).path}\n")


def remove(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Aliases or org/name.")],
    *,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
    revision: Revision = None,
) -> None:
    """Delete models that were downloaded; with --revision that one alone."""
    from llamachat.terminal import tables

    tables.remove(models, yes=yes, revision=revision)
