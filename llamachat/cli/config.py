"""`llamachat config`: where the settings are, what they are, and how to change them."""

from __future__ import annotations

from typing import Annotated

import typer

from llamachat.cli import completion
from llamachat.cli.configured import decisions, flags_of_chat
from llamachat.cli.flags import Json, Text, option

Key = Annotated[
    str,
    typer.Argument(
        metavar="KEY",
        help="temperature, models.ALIAS.top_k, aliases.NAME, ui.color.",
        autocompletion=completion.keys,
    ),
]
Value = Annotated[str, typer.Argument(metavar="VALUE", help="As its flag takes it.")]


def path() -> None:
    """Show where the config file is, or would be."""
    from llamachat import settings
    from llamachat.terminal.output import write

    write(f"{settings.config_path()}\n")


def show(
    context: typer.Context,
    *,
    model: Annotated[Text, option("--model", "-m", metavar="MODEL", help="For this one.")] = None,
    json: Json = False,
) -> None:
    """Show every setting of `chat`, and who says so: a variable, the file, or nobody."""
    from llamachat.terminal.decisions import show_settings

    show_settings(decisions(context, model), json=json)


def set_(key: Key, value: Value) -> None:
    """Write a setting into the file; its comments stay, and nothing wrong gets in."""
    from llamachat.chat import configuration
    from llamachat.terminal.failure import say

    file = configuration.write(key, value, flags_of_chat())
    say(f"llamachat: {file}: {key} = {value}")
