"""What models were measured to be, kept with them as lines of JSON. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamachat import settings
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import LlamachatError
from llamachat.library import Notice
from llamachat.library.quantized import identity

NAME = "eval.jsonl"
NEWEST_BYTES = 2**16  # of a file: what is read of it


def keep(model: Path, result: Mapping[str, Any], *, notice: Notice) -> None:
    """Append a result to those of a model; if that fails, only `notice` is told.

    Args:
        model: its file or folder.
        result: ready for JSON.
        notice: told, in one line, why it was not kept.
    """
    try:
        append(_home(model), result)
    except LlamachatError as error:
        notice(f"the result was not kept: {error.message}")
    except OSError as error:
        notice(f"the result was not kept: {error.filename or model}: {error.strerror or error}")


def newest(model: Path, n: int = 5) -> list[dict[str, Any]]:
    """The last `n` results of a model, the newest first; lines that are none are passed over."""
    try:
        return newest_lines(_home(model), n)
    except LlamachatError:
        return []


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Add a line to a file of results; may raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # one write: lines of two processes do not mix
        file.write(json.dumps(result).encode() + b"\n")


def newest_lines(path: Path, n: int) -> list[dict[str, Any]]:
    """The last `n` results of a file, the newest first; lines that are none are passed over."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - NEWEST_BYTES))
            lines = file.read(NEWEST_BYTES).splitlines()
    except OSError:
        return []
    results = [result for line in reversed(lines) if (result := _parsed(line))]
    return results[:n]


def _home(model: Path) -> Path:
    """In a folder of ours the file beside the weights, else one in the cache, by the model's files.

    A file that was changed since is another model.
    """
    from llamachat.checkpoints.quantized import is_quantized  # numpy, which `list` does without

    if is_quantized(model):
        return model / NAME
    key = identity(open_checkpoint(model))
    return settings.cache_dir()[0] / "eval" / f"{model.name}-{key}.jsonl"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None
