"""Models and findings for people to read, and the same as JSON."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import Any

from llamachat.chat.builtin import template_for
from llamachat.chat.templates import JinjaTemplate, Message, PlainTemplate, encode, render
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import ModelNotFoundError, UsageError
from llamachat.library.catalog import CATALOG, Entry, find
from llamachat.library.results import newest
from llamachat.library.store import Installed, Located, derived, installed, require
from llamachat.library.store import remove as delete
from llamachat.terminal.failure import say
from llamachat.terminal.output import write
from llamachat.terminal.results import dated_lines

MB = 1e6
_ENTRY_KEYS = (
    "also", "family", "params", "context", "licence", "gated", "template", "defaults", "base",
)  # fmt: skip
_EXAMPLE = [Message(role, "{" + role + "}") for role in ("system", "user", "assistant", "user")]


def show_models(*, every: bool, json: bool) -> None:
    """What is on disk; with `every`, what the catalog knows besides."""
    models = installed()
    known = {model.alias for model in models}
    absent = [entry for entry in CATALOG if every and entry.alias not in known]
    if json:
        rows = [_installed_json(model) for model in models]
        rows += [{"name": e.alias, "repo": e.repo, "installed": False} for e in absent]
        facts = {entry.alias: _entry_json(entry) for entry in CATALOG if every}
        rows = [{**row, **facts.get(row["name"], {})} for row in rows]
        _write_json(rows)
        return
    if not models and not absent:
        say("llamachat: no model on disk yet; `llamachat pull smollm2-135m` fetches one")
    rows_shown: list[tuple[str, ...]]
    rows_shown = [(_title(m), f"{m.size_bytes / MB:,.0f} MB", str(m.path)) for m in models]
    rows_shown += [(e.alias, "not on disk", e.repo) for e in absent]
    if every:
        cells = {entry.alias: _entry_cells(entry) for entry in CATALOG}
        rows_shown = [(*row[:2], *cells.get(row[0], ("",) * 4), row[2]) for row in rows_shown]
    write_columns(rows_shown)


def show_model(name: str, *, json: bool) -> None:
    """Config, sizes, licence and files."""
    located = require(name)
    checkpoint = open_checkpoint(located.path)
    config = checkpoint.config
    evaluations = newest(located.path)
    facts: dict[str, Any] = {
        "name": name,
        "path": str(located.path),
        "repo": located.repo,
        "revision": located.revision,
        "form": checkpoint.form,
        "params": config.n_params,
        "size_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "config": asdict(config),
        "chat_template": checkpoint.chat_template is not None,
        "licence": checkpoint.metadata.get("license") or _licence(located),
        "generation": dict(checkpoint.generation),
        "metadata": dict(checkpoint.metadata),
        "files": [str(file) for file in checkpoint.files],
        "evaluations": evaluations if json else dated_lines(evaluations),
    }
    if json:
        _write_json(facts)
    else:
        write_columns(_flat(facts))


def show_template(name: str, *, json: bool) -> None:
    """The Jinja source, or what the built-in template makes of a conversation.

    Raises:
        ModelNotFoundError: the model has neither.
    """
    located = require(name)
    checkpoint = open_checkpoint(located.path)
    tokenizer = checkpoint.tokenizer()
    template = template_for(checkpoint.chat_template, tokenizer, located)
    if json:
        _write_json({"template": checkpoint.chat_template, "name": template.name})
    elif isinstance(template, PlainTemplate):
        raise ModelNotFoundError(f"{name} has no chat template")
    elif isinstance(template, JinjaTemplate):
        write(template.source.removesuffix("\n") + "\n")
    else:
        say(f"llamachat: {name} carries no chat template; built in is {template.name}:")
        write(render(template.segments(_EXAMPLE), tokenizer).removesuffix("\n") + "\n")


def show_rendered(name: str, path: Path, *, json: bool) -> None:
    """A conversation as the exact prompt; with `json`, its ids as well."""
    located = require(name)
    checkpoint = open_checkpoint(located.path)
    tokenizer = checkpoint.tokenizer()
    template = template_for(checkpoint.chat_template, tokenizer, located)
    segments = template.segments(_conversation(path))
    text = render(segments, tokenizer)
    if json:
        _write_json({"text": text, "ids": encode(segments, tokenizer)})
    else:
        write(text)


def remove(names: Sequence[str], *, yes: bool) -> None:
    """Delete models, after asking on a terminal.

    Raises:
        UsageError: it may not ask, and was not told to go ahead.
    """
    found = {name: require(name) for name in names}
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and stdin is no terminal", hint="--yes")
        also = {it.path for located in found.values() for it in derived(located)}
        paths = dict.fromkeys([*(located.path for located in found.values()), *sorted(also)])
        say(f"delete {', '.join(map(str, paths))}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("llamachat: nothing was deleted")
            return
    for name, located in found.items():
        say(f"llamachat: {name}: {delete(located) / MB:,.0f} MB freed")


def show_findings(findings: Mapping[str, Any], *, json: bool) -> None:
    """What `doctor` found."""
    if json:
        _write_json(findings)
    else:
        write_columns(_flat(findings))


def _conversation(path: Path) -> list[Message]:
    try:
        turns = jsonlib.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(turns, list):
            raise TypeError(f"found {type(turns).__name__}")
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no JSON list of role and content ({error!r})") from error
    for message in messages:
        valid = message.role in ("system", "user", "assistant") and isinstance(message.content, str)
        if not valid:
            raise UsageError(
                f"{path}: role {message.role!r} with content {type(message.content).__name__}, "
                "expected system, user or assistant with text"
            )
    return messages


def _entry_cells(entry: Entry) -> tuple[str, ...]:
    gated = "gated" if entry.gated else ""
    return f"{entry.params / 1e9:.3g}B", f"{entry.context:,}", entry.licence, gated


def _entry_json(entry: Entry) -> dict[str, Any]:
    facts = asdict(entry)
    return {k: facts[k] for k in _ENTRY_KEYS}


def _licence(located: Located) -> str | None:
    entry = find(located.alias) if located.alias else None
    return entry.licence if entry else None


def _title(model: Installed) -> str:
    """What a model is called in a table: a quantized one has its path in another column."""
    source = PureWindowsPath(model.made_from or "?").name  # which knows both separators
    return model.name if model.form is None else f"{source} {model.form}"


def _installed_json(model: Installed) -> dict[str, Any]:
    return {**asdict(model), "path": str(model.path), "installed": True}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows += [(f"{prefix}{key}", str(item)) for item in value]
        elif value is not None:
            rows.append((f"{prefix}{key}", f"{value:,}" if type(value) is int else str(value)))
    return rows


def write_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of as many cells each, every column as wide as its widest cell."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        write("  ".join([*cells, row[-1]]).rstrip() + "\n")


def _write_json(value: Any) -> None:
    write(jsonlib.dumps(value, ensure_ascii=False, indent=2) + "\n")
