"""A base, and deltas and adapters over it, as one folder of floats: `llamachat merge`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat.architecture import brief
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.delta import DeltaCheckpoint, NewRows
from llamachat.checkpoints.folder_writer import require_free, write_folder
from llamachat.checkpoints.json_files import read_json
from llamachat.checkpoints.lora import is_adapter
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.overlay import Overlay
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import UsageError
from llamachat.library.store import Located
from llamachat.loading.adapters import adapted

if TYPE_CHECKING:
    from torch import Tensor

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
Progress = Callable[[str, int, int], None]  # what is done, bytes done, and in all


def merge(
    base: Located,
    changes: Sequence[str],
    folder: Path,
    *,
    new_rows: NewRows | None = None,
    notice: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the model that a base becomes.

    Args:
        base: the model: a Hugging Face folder of floats.
        changes: folders of weight deltas, and adapters as PATH or PATH:SCALE, in order.
        folder: where to.
        new_rows: what rows that a delta adds to the base hold before it is added.
        notice: told, in one line each, what people should know.
        progress: told how far it is.

    Raises:
        UsageError: there is something at `folder`, or the base is no such folder.
        DamagedFileError: a file is damaged, or was made for another base.
        CheckFailedError: the sum is not the one that was published; nothing is written.
        TransferError: the disk is full or cannot be written.
    """
    require_free(folder)
    bottom = open_checkpoint(base.path)
    if not isinstance(bottom, FolderCheckpoint) or bottom.form not in FLOATS:
        raise UsageError(
            f"{base.path} is {bottom.form}, merge takes a folder of {', '.join(FLOATS)}",
            hint="take the model's float folder; `chat --lora` takes any form",
        )
    if (kind := read_json(bottom.path / "config.json").get("model_type")) != "llama":
        raise UsageError(
            f"{base.path} is {brief(kind)}, merge writes the folders of 'llama'",
            hint="`chat --lora` merges an adapter on loading",
        )
    checkpoint: Checkpoint = bottom
    for change in changes:
        if Path(change).is_dir() and not is_adapter(Path(change)):
            checkpoint = DeltaCheckpoint(checkpoint, Path(change), new_rows)
        else:
            checkpoint = adapted(checkpoint, [change], base, notice)
    files = _files(bottom, checkpoint)
    write_folder(folder, files, _tensors(checkpoint, progress))


def _files(bottom: FolderCheckpoint, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Config, tokenizer and template; that there is a tokenizer which fits is found out here."""
    checkpoint.tokenizer()
    config = {
        **read_json(bottom.path / "config.json"),
        "vocab_size": checkpoint.config.vocab_size,
        "tie_word_embeddings": checkpoint.config.tied,
        "torch_dtype": FLOATS[checkpoint.form],
    }
    config.pop("dtype", None)  # the newer name
    files = {"config.json": json.dumps(config, indent=2).encode()}
    source = _tokenizer_folder(checkpoint)
    paths = [bottom.path / "generation_config.json", *(source / it for it in _TOKENIZER_FILES)]
    files |= {path.name: path.read_bytes() for path in paths if path.exists()}
    if checkpoint.chat_template is not None:
        files["chat_template.jinja"] = checkpoint.chat_template.encode()
    return files


def _tokenizer_folder(checkpoint: Checkpoint) -> Path:
    while isinstance(checkpoint, Overlay):
        if checkpoint.has_tokenizer:
            return checkpoint.folder
        checkpoint = checkpoint.base
    return checkpoint.path


def _tensors(checkpoint: Checkpoint, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Weights, matrices in the type of most."""
    import torch

    dtype = getattr(torch, FLOATS[checkpoint.form])
    shapes = [it.shape for it in iter_weights(checkpoint.config)]
    total = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    done = 0
    for count, (name, tensor) in enumerate(checkpoint.tensors(), 1):
        assert isinstance(tensor, torch.Tensor)
        yield name, tensor.to(dtype) if tensor.ndim == 2 else tensor
        done += tensor.numel() * dtype.itemsize
        progress(f"{count} of {len(shapes)} weights", done, total)
