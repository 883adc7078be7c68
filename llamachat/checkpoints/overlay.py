"""A checkpoint over another one: its tensors pass through and may change on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.architecture import ModelConfig
from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.checkpoints.stored import Place, as_read
from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "ice_text.model")


class Overlay(ABC):
    """A `Checkpoint`: a base, and a folder that changes its weights and may have a tokenizer."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.base = base
        self.folder = folder

    @property
    @abstractmethod
    def changed(self) -> frozenset[str]:
        """Names of the weights that are not as in the file at the bottom."""

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """That of the base, with the vocabulary that the folder leaves; both agree."""

    @property
    @abstractmethod
    def form(self) -> str:
        """How most weights are stored."""

    @abstractmethod
    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight, those that change in their new values."""

    @property
    def path(self) -> Path:
        """The base's."""
        return self.base.path

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's and those of the folder."""
        return (*self.base.files, *sorted(it for it in self.folder.iterdir() if it.is_file()))

    @property
    def chat_template(self) -> str | None:
        """The folder's, else the base's."""
        return FolderCheckpoint(self.folder).chat_template or self.base.chat_template

    @property
    def generation(self) -> Mapping[str, Any]:
        """The base's."""
        return self.base.generation

    @property
    def left_out(self) -> str | None:
        """The base's."""
        return self.base.left_out

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The base's."""
        return self.base.metadata

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder brings its own."""
        return any((self.folder / name).exists() for name in _TOKENIZERS)

    def tokenizer(self) -> Tokenizer:
        """The folder's if it has one, else the base's; the table has a row for each id."""
        source = FolderCheckpoint(self.folder) if self.has_tokenizer else self.base
        tokenizer = source.tokenizer()
        if tokenizer.vocab_size > (rows := self.config.vocab_size):
            raise DamagedFileError(
                f"{source.path}: the tokenizer has {tokenizer.vocab_size} ids, {EMBEDDING} of "
                f"{self.base.path} with {self.folder.name} has {rows} rows",
                hint="it was made for another base, or for one with other adapters before it",
            )
        return tokenizer


def changed_in(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the weights that are not as in the checkpoint's files."""
    return checkpoint.changed if isinstance(checkpoint, Overlay) else frozenset()


def as_floats(tensor: Tensor | QTensor) -> Tensor:
    """A weight in float32, in memory of its own."""
    import torch

    if isinstance(tensor, torch.Tensor):
        return tensor.to(torch.float32, copy=True)
    return tensor.dequantize()
