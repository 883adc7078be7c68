"""Folders as Meta publishes them, `params.json` and `consolidated.NN.pth`, as a `Checkpoint`.

Matrices are cut into as many shards as GPUs once held them: along the axis that the table below
says (`ColumnParallelLinear` and `RowParallelLinear` in Meta's model.py), the embedding by its
columns in LLaMA 1 and 2, by its rows since Llama 3. Where there are more shards than key/value
heads, neighbours hold the same head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.architecture import ModelConfig, config_from_meta, meta_has_vision
from llamachat.checkpoints.json_files import read_json
from llamachat.checkpoints.mllama import LEFT_OUT, meta_text_part
from llamachat.checkpoints.names import (
    Shape,
    WeightName,
    check_shapes,
    half_split_rows,
    iter_weights,
    located,
    renamed,
    shown,
)
from llamachat.checkpoints.pickled import PickledTensor, read_pickled
from llamachat.checkpoints.stored import Place, as_read, check_finite, check_floats, commonest_type
from llamachat.errors import DamagedFileError, LlamachatError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_PARAMS = "params.json"
_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_MOST_SHARDS = 100  # that such names have room for
_UNREAD = "rope.freqs"  # a table that is computed

# Hugging Face, Meta, the axis along which shards are cut, None where each has the whole.
_TOP = (
    ("model.embed_tokens", "tok_embeddings", 0),  # or 1: see `_axis`
    ("model.norm", "norm", None),
    ("lm_head", "output", 0),
)
_LAYER = (
    ("input_layernorm", "attention_norm", None),
    ("self_attn.q_proj", "attention.wq", 0),
    ("self_attn.k_proj", "attention.wk", 0),
    ("self_attn.v_proj", "attention.wv", 0),
    ("self_attn.o_proj", "attention.wo", 1),
    ("post_attention_layernorm", "ffn_norm", None),
    ("mlp.gate_proj", "feed_forward.w1", 0),
    ("mlp.up_proj", "feed_forward.w3", 0),
    ("mlp.down_proj", "feed_forward.w2", 1),
)
_NAMES = {hf: meta for hf, meta, _ in (*_TOP, *_LAYER)}
_AXES = {meta: axis for _, meta, axis in (*_TOP, *_LAYER)}
_KEY_VALUE = ("attention.wk", "attention.wv")


def is_meta(path: Path) -> bool:
    """Whether a folder is of this form, and not (also) of Hugging Face's."""
    if not (path / _PARAMS).exists():
        return False
    return not (path / _CONFIG).exists() or not any(
        next(path.glob(weights), None) for weights in ("*.safetensors*", "pytorch_model*.bin*")
    )


def has_all_shards(path: Path) -> bool:
    """Whether no `consolidated.NN.pth` is missing, by what share of a matrix the first has.

    One that cannot be read counts as whole: opening the folder says what is wrong with it.
    """
    first = _shard(path, 0)
    if not first.exists():
        return False
    try:
        stored, dim = read_pickled(first), read_json(path / _PARAMS).get("dim", 0)
    except LlamachatError:
        return True
    rows = [
        it.shape[0] for name, it in stored.items() if name.endswith("layers.0.attention.wq.weight")
    ]
    n_shards = dim // max(rows[0], 1) if rows and isinstance(dim, int) else 1
    return all(_shard(path, number).exists() for number in range(min(n_shards, _MOST_SHARDS)))


class MetaCheckpoint:
    """A folder of params.json, consolidated.NN.pth and, there or one level above, a tokenizer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The folder that was opened."""
        return self._path

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that this program reads, as far as they are there."""
        beside = [self._path / _PARAMS, *(self._tokenizer_folder / name for name in _TOKENIZERS)]
        return tuple(path for path in (*beside, *self._shards) if path.exists())

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture; the presence, shape and type of every tensor agree with it."""
        embedding = self._stored.get(_EMBEDDING, ())
        with located(self._path):
            # without a table the check below says that it is missing
            rows = next(iter(self._whole_shape(_EMBEDDING)), 1) if embedding else 1
            config = self.declared_config(tied=self._is_tied, vocab_size=rows)
            self._check_tensors(config)
        return config

    def declared_config(self, *, tied: bool, vocab_size: int) -> ModelConfig:
        """What params.json says of tensors that are elsewhere: `vocab_size` rows in the table."""
        path = self._path / _PARAMS
        params = read_json(path)
        with located(path):
            return config_from_meta(params, tied=tied, vocab_size=vocab_size)

    @property
    def form(self) -> str:
        """The type of most values: "BF16"."""
        return commonest_type(part for parts in self._stored.values() for part in parts)

    @property
    def chat_template(self) -> str | None:
        """None: Meta's code holds it, not the folder."""
        return None

    @property
    def generation(self) -> Mapping[str, Any]:
        """Empty: there are no generation defaults."""
        return {}

    @property
    def left_out(self) -> str | None:
        """The vision part of Llama 3.2 Vision."""
        return LEFT_OUT if self._has_vision else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Empty: there is none."""
        return {}

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer."""
        from llamachat.tokenizer.folder import tokenizer_from_folder

        return tokenizer_from_folder(self._tokenizer_folder, bos_id=None, eos_ids=())

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, in the order of a forward pass."""
        copies = self._copies(self.config)
        for weight in iter_weights(self.config):
            yield weight.hf, self._read(weight, copies, place)

    @property
    def _tokenizer_folder(self) -> Path:
        """LLaMA-1 has one tokenizer above the folders of its four sizes."""
        above = self._path.parent
        is_above = not any((self._path / name).exists() for name in _TOKENIZERS[:2])
        return above if is_above and (above / "tokenizer.model").exists() else self._path

    @cached_property
    def _shards(self) -> tuple[Path, ...]:
        """As many as there are files of such a name."""
        n_shards = len(list(self._path.glob("consolidated.*.pth")))
        numbers = range(max(n_shards, 1))
        return tuple(_shard(self._path, number) for number in numbers)

    @cached_property
    def _stored(self) -> Mapping[str, tuple[PickledTensor, ...]]:
        """Every tensor by Meta's name: its part of each shard, in their order."""
        shards = [read_pickled(path) for path in self._shards]
        if self._has_vision:
            shards = [
                {ours: it[name] for ours, name in meta_text_part(it).items()} for it in shards
            ]
        for path, shard in zip(self._shards, shards, strict=True):
            if unlike := sorted(shard.keys() ^ shards[0].keys()):
                raise DamagedFileError(f"{path}: {shown(unlike[0])} is not in all shards")
        return {name: tuple(shard[name] for shard in shards) for name in shards[0]}

    @property
    def _has_vision(self) -> bool:
        return meta_has_vision(read_json(self._path / _PARAMS))

    @property
    def _is_tied(self) -> bool:
        """Whether the head is not there, or is the embedding by another name."""
        head, embedding = self._stored.get(_HEAD, ()), self._stored.get(_EMBEDDING)
        return not head or head == embedding

    def _copies(self, config: ModelConfig) -> int:
        """How many shards hold the same key/value head."""
        n_shards, n_heads = len(self._shards), config.n_kv_heads
        return n_shards // n_heads if n_shards > n_heads and n_shards % n_heads == 0 else 1

    def _axis(self, name: str) -> int | None:
        if name == _EMBEDDING:
            dim = self.declared_config(tied=False, vocab_size=1).dim
            return 1 if self._stored[name][0].shape[1:] != (dim,) else 0
        return _AXES.get(_part(name))

    def _whole_shape(self, name: str, copies: int = 1) -> Shape:
        """Of all parts together."""
        axis, shapes = self._axis(name), [part.shape for part in self._stored[name]]
        first = shapes[0]
        for path, shape in zip(self._shards, shapes, strict=True):
            is_like = len(shape) == len(first) and all(
                found == expected
                for at, (found, expected) in enumerate(zip(shape, first, strict=True))
                if at != axis
            )
            if not is_like:
                raise DamagedFileError(f"{name}: {shape} in {path.name}, {first} in the first")
        if axis is None or axis >= len(first):
            return first
        size = sum(shape[axis] for shape in shapes) // copies
        return (*first[:axis], size, *first[axis + 1 :])

    def _check_tensors(self, config: ModelConfig) -> None:
        copies = self._copies(config)
        names = [name for name in self._stored if name != _UNREAD]
        if config.tied:
            names = [name for name in names if name != _HEAD]
        shapes = {
            name: self._whole_shape(name, copies if _part(name) in _KEY_VALUE else 1)
            for name in names
        }
        check_shapes(shapes, ((_meta_name(it.hf), it.shape) for it in iter_weights(config)))
        for parts in zip(*(self._stored[name] for name in names), strict=True):
            check_floats(dict(zip(names, parts, strict=True)), names)

    def _read(self, weight: WeightName, copies: int, place: Place) -> Tensor:
        import torch

        name = _meta_name(weight.hf)
        axis = self._axis(name)
        parts = [place(part.read()) for part in self._stored[name]]
        for path, part in zip(self._shards, parts, strict=True):
            with located(path):
                check_finite(name, part)
        if axis is None:
            return parts[0]
        if copies > 1 and _part(name) in _KEY_VALUE:
            for index, part in enumerate(parts):
                if not torch.equal(part, parts[index - index % copies]):
                    raise DamagedFileError(
                        f"{self._shards[index]}: {name} is no copy of its neighbour's, "
                        f"expected {len(parts)} shards to hold {len(parts) // copies} heads"
                    )
            parts = parts[::copies]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        if weight.heads is None:
            return whole
        return whole[torch.from_numpy(half_split_rows(len(whole), weight.heads))]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"consolidated.{number:02}.pth"


def _meta_name(hf: str) -> str:
    return renamed(hf, _NAMES, "layers.")


def _part(name: str) -> str:
    """Meta's name without its layer."""
    name = name.removesuffix(".weight")
    return name.split(".", 2)[-1] if name.startswith("layers.") else name
