"""Settings for people to read, with who decides each of them, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llamachat import settings
from llamachat.chat.options import shown
from llamachat.terminal.failure import say
from llamachat.terminal.output import write


def show_settings(decided: Mapping[str, tuple[Any, str]], *, json: bool) -> None:
    """Every setting and who decides it, after the path of the config file."""
    file = str(settings.config_path())
    if json:
        told = {name: {"value": it, "origin": origin} for name, (it, origin) in decided.items()}
        from llamachat.terminal.tables import write_json

        write_json({"path": file, "settings": told, "ui": asdict(settings.ui())})
        return
    say(f"llamachat: {file}" + ("" if settings.config_text() else " (there is none)"))
    rows = [(name, _shown_value(it), origin) for name, (it, origin) in decided.items()]
    rows += [(f"ui.{name}", _shown_value(it), "") for name, it in asdict(settings.ui()).items()]
    wide = max(len(value) for _, value, _ in rows)
    for name, value, origin in rows:
        write(f"{name:<22}  {value:<{min(wide, 32)}}  {origin}".rstrip() + "\n")


def _shown_value(value: Any) -> str:
    """A setting as `config set` takes it; "-" where there is none."""
    if value is None or value in ((), []):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return shown(tuple(value) if isinstance(value, list) else value)
