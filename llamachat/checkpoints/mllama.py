"""What Llama 3.2 Vision's files call the weights of their text part, which alone is read.

Without images its layers of cross-attention leave the stream as it is (their gates multiply what
comes of an image), and what is left is a Llama 3.1. Source: transformers, modeling_mllama.py, and
llama-models, models/llama3/multimodal/model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat.checkpoints.names import Shape, shown
from llamachat.checkpoints.stored import Stored
from llamachat.errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

LEFT_OUT = "images are not read: the vision part of the model is left out"

# Their beginnings in files of transformers before 4.52 and since, and what Llama has.
_TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in ("vision_model", "multi_modal_projector")
)
_LAYERS = "model.layers."
_EMBEDDING = "model.embed_tokens.weight"
_N_IMAGE_IDS = 8  # rows of the embedding after those of text
_META_TEXT = "text_model."
_META_UNREAD = (
    "vision_model.",
    "text_model.cross_attention_layers.",
    "text_model.learnable_embedding.",
)


@dataclass(frozen=True, slots=True)
class _FirstRows:
    """The first rows of a stored matrix."""

    stored: Stored
    n_rows: int

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def shape(self) -> Shape:
        return (self.n_rows, *self.stored.shape[1:])

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def read(self) -> Tensor:
        return self.stored.read()[: self.n_rows]


def text_part(
    stored: Mapping[str, Stored], layers: Sequence[int], vocab_size: int
) -> dict[str, Stored]:
    """The tensors of the text part by Llama's names; unknown ones keep theirs.

    Args:
        stored: every tensor of a Hugging Face folder.
        layers: which of its layers are run.
        vocab_size: ids of text.

    Raises:
        DamagedFileError: two tensors are one weight.
    """
    numbers = {str(stored_as): str(number) for number, stored_as in enumerate(layers)}
    found: dict[str, Stored] = {}
    for name in stored:
        if (ours := _text_name(name, numbers)) is None:
            continue
        if ours in found:
            raise DamagedFileError(f"{shown(name)} is there twice, under two names")
        found[ours] = stored[name]
    embedding = found.get(_EMBEDDING)
    if embedding and embedding.shape[:1] == (vocab_size + _N_IMAGE_IDS,):
        found[_EMBEDDING] = _FirstRows(embedding, vocab_size)
    return found


def _text_name(stored: str, numbers: Mapping[str, str]) -> str | None:
    """Llama's name of a tensor; None for one that takes images to be of use."""
    if stored.startswith(_VISION):
        return None
    old = next((old for old in _TEXT if stored.startswith(old)), "")
    name = _TEXT.get(old, "") + stored.removeprefix(old)
    if not old or not name.startswith(_LAYERS):
        return name
    layer, _, part = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{numbers[layer]}.{part}" if layer in numbers else None


def meta_text_part(names: Iterable[str]) -> dict[str, str]:
    """Of the names in a shard of Meta's those of the text part, by what Llama 3.1's are."""
    return {
        name.removeprefix(_META_TEXT): name for name in names if not name.startswith(_META_UNREAD)
    }
