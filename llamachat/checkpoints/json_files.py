"""JSON and other text beside weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamachat.architecture import brief
from llamachat.checkpoints.names import located, shown
from llamachat.errors import DamagedFileError, TransferError

_MAX_TEXT_BYTES = 64 * 2**20


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.exists():
        return {}
    text = read_text(path)
    try:
        with located(path):
            values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise DamagedFileError(f"{path}: not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path}: {brief(values)}, expected a JSON object")
    return values


def read_text(path: Path) -> str:
    """A text of UTF-8.

    Raises:
        DamagedFileError: it is not, or larger than any such file.
        TransferError: it cannot be read.
    """
    try:
        n_bytes = path.stat().st_size
        if n_bytes > _MAX_TEXT_BYTES:
            raise DamagedFileError(f"{path}: {n_bytes} bytes, expected at most {_MAX_TEXT_BYTES}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"{error.object[error.start : error.start + 1]!r} at byte {error.start}"
        raise DamagedFileError(f"{path}: {found} is not UTF-8") from error
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What json.loads makes of an object, whose keys must differ: a hook for it.

    Raises:
        DamagedFileError: one is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise DamagedFileError(f"{shown(name)} is there twice, expected once")
    return values
