"""The cache of quantized models: a folder for each source and recipe. Torch-free.

A folder is found by the paths, sizes and times of its source's files, which are looked at, not
read: where one has changed, the folder is no longer the source's and is not found.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat import settings
from llamachat.checkpoints import Checkpoint
from llamachat.errors import LlamachatError, TransferError
from llamachat.library import Notice, locks

_LOCKS = ".locks"


@dataclass(frozen=True, slots=True)
class Quantized:
    """One folder of the cache.

    Attributes:
        path: where it is.
        form: "INT4"..., or what is wrong with it: "damaged", "unfinished".
        source: what its model was called when it was quantized; "" where that cannot be read.
        source_path: where that model was.
        size_bytes: of all its files.
    """

    path: Path
    form: str
    source: str
    source_path: Path | None
    size_bytes: int


def identity(checkpoint: Checkpoint) -> str:
    """12 hexadecimal digits that stand for a model's files as they are now.

    Raises:
        TransferError: one cannot be looked at.
    """
    digest = hashlib.sha256()
    for file in checkpoint.files:
        try:
            path = file.resolve()
            found = path.stat()
        except OSError as error:
            raise TransferError(f"{file}: {error.strerror or error}") from error
        digest.update(f"{file.name}\0{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]


def folder_for(checkpoint: Checkpoint, recipe_key: str) -> Path:
    """Where a model is kept that was quantized by a recipe, whether it is there or not."""
    return _root() / f"{_slug(checkpoint.path)}-{recipe_key}-{identity(checkpoint)}"


def locate(checkpoint: Checkpoint, recipe_key: str) -> Path | None:
    """The folder of a model that was quantized by a recipe, if there is one.

    It is whole, since it appeared in one step; reading it finds out whether it was damaged since.
    """
    folder = folder_for(checkpoint, recipe_key)
    return folder if folder.is_dir() else None


def installed() -> list[Quantized]:
    """Every folder of the cache, those that are damaged or not finished included."""
    try:
        folders = sorted(path for path in _root().iterdir() if path.is_dir())
    except OSError:  # there is no cache
        return []
    return [_described(folder) for folder in folders if folder.name != _LOCKS]


def is_cached(path: Path) -> bool:
    """Whether a path is a folder of the cache."""
    root = _root().resolve()
    return path.is_dir() and path.resolve().parent == root and path.name != _LOCKS


def remove(path: Path) -> int:
    """Delete a folder of the cache.

    Returns:
        bytes freed.

    Raises:
        TransferError: it cannot be deleted.
    """
    freed = _size_bytes(path)
    try:
        if path.exists():  # it may have gone with its source
            shutil.rmtree(path)
    except OSError as error:
        raise TransferError(f"cannot delete {path}: {error.strerror or error}") from error
    return freed


@contextmanager
def locked(folder: Path, notice: Notice) -> Iterator[None]:
    """Be the only process that makes `folder`; say so where that takes waiting for another.

    Raises:
        TransferError: the cache cannot be written.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    waiting = f"another process is making {folder}; waiting for it"
    with locks.locked(_root() / _LOCKS / f"{name}.lock", notice, waiting):
        yield


def _root() -> Path:
    return settings.cache_dir()[0] / "quantized"


def _slug(path: Path) -> str:
    """What people recognise a model by: its repository in the Hub's cache, else its own name."""
    path = path.resolve()
    own = path.name if path.is_dir() else path.stem
    repo = next((part for part in path.parts if part.startswith("models--")), own)
    return re.sub(r"[^A-Za-z0-9._-]", "-", repo.rpartition("--")[2])[:60].strip(".-") or "model"


def _described(folder: Path) -> Quantized:
    from llamachat.checkpoints.quantized import QuantizedCheckpoint
    from llamachat.checkpoints.quantized_writer import PARTIAL, read_job

    form = "unfinished"
    made_from: Mapping[str, Any] = {}
    if folder.suffix == PARTIAL:
        made_from = (read_job(folder) or {"source": {}})["source"]
    else:
        try:
            facts = QuantizedCheckpoint(folder).facts
            form, made_from = facts.form, facts.source
        except LlamachatError:
            form = "damaged"
    path = made_from.get("path")
    return Quantized(
        path=folder,
        form=form,
        source=str(made_from.get("name", "")),
        source_path=Path(path) if isinstance(path, str) else None,
        size_bytes=_size_bytes(folder),
    )


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
