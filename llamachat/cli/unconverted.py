"""Commands that start sooner: a value that is already what it shall be is not converted.

Typer converts every value, defaults too, with pydantic, which takes 0.1 s to be imported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """One command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, --help among them."""
        return _spared(super().get_params(ctx))


class Group(TyperGroup):
    """Several commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, --help among them."""
        return _spared(super().get_params(ctx))


def _spared(params: list[Any]) -> list[Any]:
    for param in params:
        if not param.required and not isinstance(param.process_value, partial):
            param.process_value = partial(_processed, param, param.process_value)
    return params


def _processed(param: Any, process: Any, context: Any, value: Any) -> Any:
    repeatable = param.multiple or param.nargs != 1
    annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if repeatable or (value is not None and type(value) is not annotation):
        return () if repeatable and value is None else process(context, value)
    return value if param.callback is None else param.callback(context, param, value)
