"""The moment that templates are told: one for a whole conversation."""

from __future__ import annotations

from datetime import datetime

from llamachat.chat.templates import JinjaTemplate, Template


def date_of(template: Template) -> str | None:
    """The moment that a template is told, in ISO 8601; None: it does not ask."""
    tells = isinstance(template, JinjaTemplate) and template.tells_date
    return template.now.isoformat() if tells and isinstance(template, JinjaTemplate) else None


def set_date(template: Template, date: str | None) -> None:
    """Let a template be told another moment, in ISO 8601."""
    if date is not None and isinstance(template, JinjaTemplate):
        template.now = datetime.fromisoformat(date)
