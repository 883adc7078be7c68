"""A conversation in forms that other programs read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, get_args

from llamachat.chat.templates import Message
from llamachat.errors import UsageError

Form = Literal["md", "json"]
_HEADINGS = {"system": "System", "user": "You", "assistant": "Assistant"}


def export(messages: Sequence[Message], form: str) -> str:
    """The messages as Markdown, or as a JSON list of role and content.

    Raises:
        UsageError: the form is neither "md" nor "json".
    """
    if form not in get_args(Form):
        raise UsageError(f"{form or 'no form'}: expected {' or '.join(get_args(Form))}")
    if form == "json":
        said = [{"role": message.role, "content": message.content} for message in messages]
        return json.dumps(said, ensure_ascii=False, indent=2) + "\n"
    return "\n".join(f"## {_HEADINGS[it.role]}\n\n{it.content.rstrip()}\n" for it in messages)
