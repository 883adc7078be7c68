"""Flags, variables and the config file: who decides which parameter of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

if TYPE_CHECKING:
    from llamachat.chat.configuration import Flag
    from llamachat.chat.sources import Source

ORIGINS = "llamachat.origins"  # in a context: what the config file says, and where


def configure(context: typer.Context, model: str | None) -> str | None:
    """Let the config file decide what neither a flag nor a variable does."""
    if not context.resilient_parsing:  # a shell asks for names
        from llamachat import settings

        context.meta[ORIGINS], context.default_map = {}, {}
        if not settings.config():  # the rest takes a while to import
            return model
        from llamachat.chat.configuration import defaults_for, read

        config = read(flags_of_chat())
        said = defaults_for(config, model or settings.default_model())
        said.pop("model", None)
        context.meta[ORIGINS] = {name: origin for name, (_, origin) in said.items()}
        context.default_map = {name: value for name, (value, _) in said.items()}
    return model


def flags_of_chat() -> dict[str, Flag]:
    """Every flag of `chat`, by its name."""
    from llamachat.cli.chat import chat

    found = {}
    for name, hint in get_type_hints(chat, include_extras=True).items():
        option = next((it for it in get_args(hint) if isinstance(it, OptionInfo)), None)
        if option is not None:
            found[name] = _flag(get_args(hint)[0], option)
    return found


def _flag(annotation: Any, option: OptionInfo) -> Flag:
    """What a parameter takes: Optional, list and Path say it in their own ways."""
    from llamachat.chat.configuration import Flag

    plain = next((it for it in get_args(annotation) if it is not NoneType), annotation)
    several = get_origin(plain) is list
    kind = get_args(plain)[0] if several else plain
    known = kind if kind in (bool, int, float) else str
    return Flag(known, several=several, least=option.min, most=option.max)


def decisions(context: typer.Context, model: str | None) -> dict[str, tuple[Any, str]]:
    """Every flag of `chat` as it would be without any on the command line, and who says so.

    Args:
        context: of any command.
        model: for this one.
    """
    from llamachat import settings
    from llamachat.chat.options import BUILT_IN

    program: Any = context.find_root().command
    chat = program.commands["chat"].make_context(
        "chat", [] if model is None else ["--model", model], parent=context.find_root()
    )
    found = {}
    for name in flags_of_chat():
        origin = origin_of(chat, name)
        value = chat.params[name] if origin else BUILT_IN.get(name, chat.params[name])
        found[name] = (value, origin or "built in")
    if found["model"][1] == "built in":
        found["model"] = settings.default_model_and_origin()
    return found


def origin_of(context: typer.Context, name: str) -> str | None:
    """Who decided a parameter: "flag", a variable, the config file; None: nobody."""
    source: Any = context.get_parameter_source(name)  # of an enumeration that Typer keeps private
    if source is None or source.name in ("DEFAULT", "PROMPT"):
        return None
    if source.name == "ENVIRONMENT":
        return f"{context.auto_envvar_prefix}_{name.upper()}"
    return "flag" if source.name == "COMMANDLINE" else str(context.meta[ORIGINS][name])


def sources_of(parameters: Mapping[str, Any]) -> list[Source]:
    """What was said by flags, by variables, and by the config file.

    Args:
        parameters: those of a command, by name, and its `context`.
    """
    context: typer.Context = parameters["context"]
    sources: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    for name, value in parameters.items():
        origin = origin_of(context, name)
        if origin is not None:
            rank = 0 if origin == "flag" else 2 if origin.startswith("config.toml") else 1
            sources[rank][name] = (value, origin)
    return list(sources)


def unflagged(context: typer.Context) -> Source:
    """What the config file says of flags of `chat` that a command does not have."""
    values: Mapping[str, Any] = context.default_map or {}
    origins: Mapping[str, str] = context.meta[ORIGINS]
    return {name: (values[name], origins[name]) for name in values if name not in context.params}


def without_weaker(
    parameters: Mapping[str, Any], sources: Sequence[Source], *rivals: str
) -> Mapping[str, Any]:
    """The parameters, but of rivals only what the strongest source that names one says."""
    for source in sources:
        if any(name in source for name in rivals):
            return {**parameters, **{name: None for name in rivals if name not in source}}
    return parameters
