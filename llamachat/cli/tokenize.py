"""`llamachat tokenize`: text to ids."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from llamachat.cli.flags import Json, Name


def tokenize(
    model: Name,
    text: Annotated[
        Optional[str],  # noqa: UP045  # Typer reads it on Python 3.10
        typer.Argument(metavar="TEXT", help="Default: stdin, byte for byte.", show_default=False),
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Show the ids and pieces of a text. No BOS is added, special tokens are not parsed."""
    from llamachat.terminal import tokens

    tokens.show(model, text, json=json)
