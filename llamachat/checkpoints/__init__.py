"""Files of weights, in whatever form, as one `Checkpoint`: config, tokenizer, named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.stored import Place, as_read
from llamachat.errors import DamagedFileError, ModelNotFoundError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor


class Checkpoint(Protocol):
    """A model on disk. Opening it, and everything but `tensors`, is cheap and torch-free.

    Every member may raise DamagedFileError, which names the file, the tensor or key, what was
    found and what was expected. `tokenizer` works on a file or folder without weights.
    """

    @property
    def path(self) -> Path:
        """The file or folder that was opened."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to the checkpoint."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The architecture, checked against the tensors that are there."""
        ...

    @property
    def form(self) -> str:
        """How most weights are stored, as people name it: "BF16", "Q4_1", "Q4_K"..."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, if the checkpoint carries one."""
        ...

    @property
    def generation(self) -> Mapping[str, Any]:
        """`generation_config.json`, as it is (empty where there is none)."""
        ...

    @property
    def left_out(self) -> str | None:
        """What the model could do and this program does not, in a line to show; mostly nothing."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else is known, to show: name, licence, organization... (short strings)."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer."""
        ...

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight by its Hugging Face name, one in memory at a time; q and k rows half-split.

        `place` is where what was read may be worked on: checked, taken apart, put in order. A form
        that has nothing to do for it, or needs the host, leaves weights where they are.

        Also yields `rope_freqs` (head_dim / 2,) float32 where the file has it: divisors of the
        inverse frequencies.
        """
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a folder: Hugging Face's, Meta's, or one of `llamachat quantize`.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        DamagedFileError: it is neither, or it is damaged.
    """
    from llamachat.checkpoints.gguf import GgufCheckpoint
    from llamachat.checkpoints.meta import MetaCheckpoint, is_meta
    from llamachat.checkpoints.quantized import QuantizedCheckpoint, is_quantized
    from llamachat.checkpoints.safetensors import FolderCheckpoint

    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        if is_quantized(path):
            return QuantizedCheckpoint(path)
        return MetaCheckpoint(path) if is_meta(path) else FolderCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        return GgufCheckpoint(path)
    raise DamagedFileError(
        f"{path}: neither a .gguf file nor a folder with config.json",
        hint="name a GGUF file, or the folder that holds config.json and *.safetensors",
    )
