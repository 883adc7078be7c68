"""Models and findings for people to read, and the same as JSON."""

from __future__ import annotations

import json as jsonlib
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from llamachat.chat.builtin import template_for
from llamachat.chat.templates import JinjaTemplate, Message, PlainTemplate, encode, render
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import ModelNotFoundError, UsageError
from llamachat.library import told_size
from llamachat.library.catalog import find, of_repo
from llamachat.library.forecast import token_bytes
from llamachat.library.loads import last_used
from llamachat.library.results import newest
from llamachat.library.store import derived, names_revision, require
from llamachat.library.store import remove as delete
from llamachat.terminal.failure import say
from llamachat.terminal.output import write
from llamachat.terminal.results import dated_lines

Column: TypeAlias = tuple[str, list[str]]  # its heading, and all of its cells
_EXAMPLE = [Message(role, "{" + role + "}") for role in ("system", "user", "assistant", "user")]


def show_model(name: str, *, json: bool) -> None:
    """Config, sizes, licence and files."""
    located = require(name)
    checkpoint = open_checkpoint(located.path)
    config = checkpoint.config
    entry = find(located.alias) if located.alias else of_repo(located.repo or "")
    evaluations = newest(located.path)
    facts: dict[str, Any] = {
        "name": name,
        "path": str(located.path),
        "alias": located.alias,
        "repo": located.repo,
        "revision": located.revision,
        "family": entry.family if entry else None,
        "form": checkpoint.form,
        "params": config.n_params,
        "size_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "config": asdict(config),
        "chat_template": checkpoint.chat_template is not None,
        "licence": checkpoint.metadata.get("license") or (entry.licence if entry else None),
        "gated": entry.gated if entry else None,
        "context": config.longest_context,
        "kv_bytes_per_token": token_bytes(config, "bf16"),
        "last_used": _moment(last_used().get(str(located.path))),
        "generation": dict(checkpoint.generation),
        "metadata": dict(checkpoint.metadata),
        "files": [str(file) for file in checkpoint.files],
        "evaluations": evaluations if json else dated_lines(evaluations),
    }
    if json:
        write_json(facts)
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
        write_json({"template": checkpoint.chat_template, "name": template.name})
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
        write_json({"text": text, "ids": encode(segments, tokenizer)})
    else:
        write(text)


def remove(names: Sequence[str], *, yes: bool, revision: str | None = None) -> None:
    """Delete models, after asking on a terminal; of a `revision` what no other one shares.

    Raises:
        UsageError: it may not ask, and was not told to go ahead.
    """
    found = {name: require(name, revision=revision) for name in names}
    one = {name: names_revision(name, revision) for name in names}
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and stdin is no terminal", hint="--yes")
        also = {it.path for name in found for it in derived(found[name], one_revision=one[name])}
        paths = dict.fromkeys([*(located.path for located in found.values()), *sorted(also)])
        say(f"delete {', '.join(map(str, paths))}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("llamachat: nothing was deleted")
            return
    for name, located in found.items():
        freed = told_size(delete(located, one_revision=one[name]))
        say(f"llamachat: {name}: {freed} freed")


def show_findings(findings: Mapping[str, Any], *, json: bool) -> None:
    """What `doctor` found."""
    if json:
        write_json(findings)
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


def _moment(seconds: float | None) -> str | None:
    """A time as ISO 8601 has it."""
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


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


def told_params(n_params: int) -> str:
    """Parameters as people say them: "135M", "8.03B"."""
    return f"{n_params / 1e9:.3g}B" if n_params >= 1e9 else f"{n_params / 1e6:.3g}M"


def write_columns(
    rows: Sequence[tuple[str, ...]], *, right: Collection[str] = (), least: Collection[str] = ()
) -> None:
    """Rows of as many cells each, every column as wide as its widest cell.

    Args:
        rows: where columns are named below, the first one has their headings.
        right: columns that are aligned to the right.
        least: columns that a terminal without room for all goes without, the first of them first;
            there, those without a cell are left out as well.
    """
    columns = [(cell, [row[i] for row in rows]) for i, cell in enumerate(rows[0])] if rows else []
    if least and sys.stdout.isatty():
        columns = _narrowed(columns, least, shutil.get_terminal_size().columns)
    padded = [
        [cell.rjust(width) if name in right else cell.ljust(width) for cell in cells]
        for name, cells in columns
        for width in [max(map(len, cells))]
    ]
    for cells in zip(*padded, strict=True):
        write("  ".join(cells).rstrip() + "\n")


def _narrowed(columns: list[Column], least: Collection[str], width: int) -> list[Column]:
    """Those columns that say something, as many as have room."""
    columns = [(name, cells) for name, cells in columns if any(cells[1:]) or name not in least]
    for dropped in least:
        if sum(max(map(len, cells)) + 2 for _, cells in columns) - 2 <= width:
            break
        columns = [column for column in columns if column[0] != dropped]
    return columns


def write_json(value: Any) -> None:
    """Any value as JSON, on stdout."""
    write(jsonlib.dumps(value, ensure_ascii=False, indent=2) + "\n")
