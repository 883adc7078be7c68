"""Writes a Hugging Face folder of float weights, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from llamachat.errors import TransferError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 1 << 30  # of one file, and in memory at a time


def is_free(folder: Path) -> bool:
    """Whether there is nothing at `folder`, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def require_free(folder: Path) -> None:
    """Refuse to replace anything.

    Raises:
        UsageError: there is something at `folder`.
    """
    if not is_free(folder):
        raise UsageError(f"{folder} is there and is not empty", hint="name another with -o")


def write_folder(
    folder: Path, files: Mapping[str, bytes], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write weights as they stream by, and what belongs beside them.

    Args:
        folder: where to; made, or empty.
        files: config and tokenizer, by name.
        tensors: by their Hugging Face names.

    Raises:
        UsageError: there is something at `folder`.
        TransferError: it cannot be written; nothing is left of it.
    """
    require_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
            made = Path(room) / folder.name
            made.mkdir()
            for name, content in files.items():
                (made / name).write_bytes(content)
            _write_weights(made, tensors)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TransferError(f"{folder}: {reason}", hint="make room, or name another -o") from error


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    shards: list[tuple[str, ...]] = []
    n_bytes = 0
    for shard in _shards(tensors):
        save_file(shard, folder / str(len(shards)), metadata={"format": "pt"})
        shards.append(tuple(shard))
        n_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for i, file in enumerate(files):
        (folder / str(i)).rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(it.nbytes for it in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    yield shard
