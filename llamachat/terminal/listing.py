"""The models on disk and those of the catalog, as a table or as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PureWindowsPath
from typing import Any

from llamachat.errors import UsageError
from llamachat.library import told_size
from llamachat.library.catalog import CATALOG, Entry
from llamachat.library.details import Details, details
from llamachat.library.loads import last_used
from llamachat.library.store import Installed, installed
from llamachat.terminal.failure import say
from llamachat.terminal.tables import told_params, write_columns, write_json

HEADINGS = (
    "name", "family", "params", "form", "size", "context", "used", "quality", "licence", "gated",
    "where",
)  # fmt: skip
_RIGHT = ("params", "size", "context")
_LEAST = ("where", "gated", "licence", "quality", "family", "used", "context", "params")
_ENTRY_KEYS = (
    "also", "family", "params", "context", "licence", "gated", "template", "defaults", "base",
)  # fmt: skip
_UNITS = {"m": 1e6, "b": 1e9}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which models to list; None is any.

    Attributes:
        max_params: at most so many parameters.
        family: part of a family's name, in any case.
        licence: part of a licence's name, in any case.
        gated: whether the Hub asks for a consent.
    """

    max_params: float | None = None
    family: str | None = None
    licence: str | None = None
    gated: bool | None = None

    def admits(self, facts: Details | Entry) -> bool:
        """Whether a model is listed; what is not known of it fits no filter."""
        if self.max_params is not None and not (facts.params or 1e18) <= self.max_params:
            return False
        wanted = ((self.family, facts.family), (self.licence, facts.licence))
        if any(asked and asked.lower() not in (found or "").lower() for asked, found in wanted):
            return False
        return self.gated is None or facts.gated is self.gated


def max_params(text: str | None) -> float | None:
    """Parameters as people write them: "8b", "135m".

    Raises:
        UsageError: they are not written so.
    """
    if text is None:
        return None
    try:
        return float(text[:-1]) * _UNITS[text[-1:].lower()]
    except (ValueError, LookupError):
        raise UsageError(f"--max-size is {text!r}, expected such as 8b or 135m") from None


def show_models(*, every: bool, only: Filter, json: bool) -> None:
    """What is on disk; with `every`, what the catalog knows besides."""
    models = [(model, facts) for model in installed() if only.admits(facts := details(model))]
    known = {model.alias for model, _ in models} | {model.alias for model in installed()}
    absent = [it for it in CATALOG if every and it.alias not in known and only.admits(it)]
    used = last_used()
    if json:
        rows = [_installed_json(model, facts, used) for model, facts in models]
        rows += [{"name": e.alias, "repo": e.repo, "installed": False} for e in absent]
        catalog = {entry.alias: _entry_json(entry) for entry in CATALOG if every}
        write_json([{**row, **catalog.get(row["name"], {})} for row in rows])
        return
    if not models and not absent:
        what = "model on disk yet" if only == Filter() else "such model on disk"
        say(f"llamachat: no {what}; `llamachat pull smollm2-135m` fetches one")
        return
    shown = [_installed_cells(model, facts, used) for model, facts in models]
    shown += [_entry_cells(entry) for entry in absent]
    write_columns([HEADINGS, *shown], right=_RIGHT, least=_LEAST)


def _installed_cells(
    model: Installed, facts: Details, used: Mapping[str, float]
) -> tuple[str, ...]:
    return (
        _title(model),
        facts.family or "",
        told_params(facts.params) if facts.params else "",
        facts.form or "",
        told_size(model.size_bytes),
        f"{facts.context:,}" if facts.context else "",
        _day(used.get(str(model.path))),
        _quality(facts.quality),
        facts.licence or "",
        "gated" if facts.gated else "",
        str(model.path),
    )


def _entry_cells(entry: Entry) -> tuple[str, ...]:
    gated = "gated" if entry.gated else ""
    empty = ("", "not on disk", f"{entry.context:,}", "", "")
    head = (entry.alias, entry.family, told_params(entry.params))
    return (*head, *empty, entry.licence, gated, entry.repo)


def _day(moment: float | None) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment)) if moment else "never"


def _quality(result: Mapping[str, Any] | None) -> str:
    """The divergence from the unquantized model, if that was measured, else the perplexity."""
    if result is None:
        return ""
    kl = result.get("kl")
    if isinstance(kl, Mapping) and isinstance(kl.get("mean"), float):
        return f"KL {kl['mean']:.4f}"
    perplexity = result.get("perplexity")
    return f"ppl {perplexity:.2f}" if isinstance(perplexity, float) else ""


def _title(model: Installed) -> str:
    """What a model is called in a table: a quantized one by its source and form."""
    source = PureWindowsPath(model.made_from or "?").name  # which knows both separators
    return model.name if model.form is None else f"{source} {model.form}"


def _installed_json(model: Installed, facts: Details, used: Mapping[str, float]) -> dict[str, Any]:
    row = {**asdict(facts), **asdict(model), "path": str(model.path), "installed": True}
    return row | {"form": facts.form, "last_used": used.get(str(model.path))}


def _entry_json(entry: Entry) -> dict[str, Any]:
    facts = asdict(entry)
    return {key: facts[key] for key in _ENTRY_KEYS}
