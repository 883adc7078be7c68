"""GGUF files of the architectures llama and chatglm, whole or split, as a `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.architecture import CHATGLM, ModelConfig, brief, config_from_gguf
from llamachat.checkpoints import chatglm
from llamachat.checkpoints.gguf_header import Header, TensorInfo, integer, map_file, read_header
from llamachat.checkpoints.joined import Joined, Layout, iter_joined, rows_by_weight
from llamachat.checkpoints.names import check_shapes, located, renamed, shown
from llamachat.checkpoints.stored import Place, as_read, check_finite
from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_QKV_BIASES = ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")
_O_BIAS = "blk.0.attn_output.bias"
_MODULES = {
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_MODULES_OF_CHATGLM = {
    **_MODULES,
    "self_attn.q_proj": "attn_qkv",
    "self_attn.k_proj": "attn_qkv",
    "self_attn.v_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_up",
}
LAYOUT = Layout(lambda hf: renamed(hf, _MODULES, "blk."), rows_by_weight)  # of a Llama
_CHATGLM_LAYOUT = Layout(lambda hf: renamed(hf, _MODULES_OF_CHATGLM, "blk."), rows_by_weight)
_ROPE_FREQS = "rope_freqs.weight"
_UNREAD = re.compile(r"blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")  # tables that are computed


class GgufCheckpoint:
    """One GGUF file, or all parts of a split one, opened through any part."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The file that was opened."""
        return self._path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every part, the first one first; only the name is looked at."""
        part = _PART.fullmatch(self._path.name)
        if part is None or not 1 <= int(part["number"]) <= int(part["count"]):
            return (self._path,)
        count, stem = int(part["count"]), part["stem"]
        names = (f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
        return tuple(self._path.with_name(name) for name in names)

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture; the presence and shape of every tensor agree with it."""
        metadata, tensors = self._header.metadata, self._tensors
        embedding = tensors.get("token_embd.weight")
        with located(self._path):
            config = config_from_gguf(
                metadata,
                tied="output.weight" not in tensors,
                # without a table the check below says that it is missing
                vocab_size=embedding.shape[0] if embedding else 1,
            )
            config = replace(
                config,
                qkv_bias=any(name in tensors for name in _QKV_BIASES),
                o_bias=_O_BIAS in tensors,
            )
            _check_tensors(tensors, iter_joined(config, self._layout), config)
            _check_vocabulary(metadata, config.vocab_size)
        return config

    def declared_config(self, *, tied: bool, vocab_size: int) -> ModelConfig:
        """What the metadata says of tensors that are elsewhere: `vocab_size` rows in the table.

        It does not say whether there are biases.
        """
        with located(self._path):
            config = config_from_gguf(self._header.metadata, tied=tied, vocab_size=vocab_size)
            _check_vocabulary(self._header.metadata, vocab_size)
        return config

    @property
    def form(self) -> str:
        """The tensor type that takes most bytes, for example "Q4_K"."""
        n_bytes: dict[str, int] = {}
        for tensor in self._tensors.values():
            n_bytes[tensor.kind.name] = n_bytes.get(tensor.kind.name, 0) + tensor.n_bytes
        return max(n_bytes, key=n_bytes.__getitem__, default="no weights")

    @property
    def types(self) -> Mapping[str, str]:
        """The type of every weight by its Hugging Face name: "Q4_K"..."""
        return {
            weight.hf: self._tensors[joined.name].kind.name
            for joined in iter_joined(self.config, self._layout)
            for weight in joined.weights
        }

    @property
    def chat_template(self) -> str | None:
        """The value of `tokenizer.chat_template`, else, of ChatGLM2, what its code writes."""
        template = self._header.metadata.get("tokenizer.chat_template")
        if template is None and self._is_chatglm2:
            return chatglm.CHAT_TEMPLATE
        if template is not None and not isinstance(template, str):
            raise DamagedFileError(
                f"{self._path}: tokenizer.chat_template is {brief(template)}, expected a string"
            )
        return template

    @property
    def generation(self) -> Mapping[str, Any]:
        """Empty: a GGUF file has no generation defaults."""
        return {}

    @property
    def left_out(self) -> str | None:
        """None: all of the file is run."""
        return None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The short strings among the `general.*` keys, without that prefix."""
        return {
            key.removeprefix("general."): value
            for key, value in self._header.metadata.items()
            if key.startswith("general.") and isinstance(value, str) and len(value) <= 200
        }

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer from the metadata of the first part."""
        from llamachat.tokenizer.gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(self._header.metadata, str(self.files[0]))

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight by its Hugging Face name, in the order of a forward pass."""
        for joined in iter_joined(self.config, self._layout):
            yield from joined.split(_read(self._tensors[joined.name], place))
        if _ROPE_FREQS in self._tensors:
            yield "rope_freqs", _read_rope_freqs(self._tensors[_ROPE_FREQS])

    @property
    def _is_chatglm(self) -> bool:
        kind = self._header.metadata.get("general.architecture")
        return isinstance(kind, str) and kind == CHATGLM

    @property
    def _is_chatglm2(self) -> bool:
        """Its successors have the same block, but tokens for roles."""
        tokens = self._header.metadata.get("tokenizer.ggml.tokens")
        if not self._is_chatglm or not isinstance(tokens, list):
            return False
        return "[gMASK]" in tokens and "<|user|>" not in tokens

    @property
    def _layout(self) -> Layout:
        return _CHATGLM_LAYOUT if self._is_chatglm else LAYOUT

    @cached_property
    def _header(self) -> Header:
        """Of the first part, which has the metadata."""
        return read_header(self.files[0])

    @cached_property
    def _tensors(self) -> Mapping[str, TensorInfo]:
        """Of all parts."""
        tensors: dict[str, TensorInfo] = {}
        for index, path in enumerate(self.files):
            header = self._header if index == 0 else _read_part(path)
            with located(path):
                _check_part(header, index, len(self.files))
                if twice := tensors.keys() & header.tensors.keys():
                    raise DamagedFileError(f"{shown(min(twice))} is also in another part")
            tensors |= header.tensors
        with located(self._path):
            expected = integer(self._header.metadata, "split.tensors.count", len(tensors))
            if len(tensors) != expected:
                raise DamagedFileError(f"{len(tensors)} tensors, split.tensors.count is {expected}")
        return tensors


def _read_part(path: Path) -> Header:
    if not path.exists():
        raise DamagedFileError(
            f"{path}: no such file, expected this part of a split model",
            hint="fetch every part into one folder",
        )
    return read_header(path)


def _check_part(header: Header, index: int, count: int) -> None:
    number = integer(header.metadata, "split.no", 0)
    found = max(integer(header.metadata, "split.count", 1), 1)  # merged files say 0
    if (number, found) != (index, count):
        raise DamagedFileError(
            f"split.no {number} of split.count {found}, its name says {index} of {count}",
            hint="the parts of a split model keep their names, like model-00001-of-00003.gguf",
        )


def _check_tensors(
    tensors: Mapping[str, TensorInfo], joined: Iterable[Joined], config: ModelConfig
) -> None:
    expected = ((it.name, it.shape) for it in joined)
    rope_freqs = [(_ROPE_FREQS, (config.rope_pairs,))] if _ROPE_FREQS in tensors else []
    found = {name: it.shape for name, it in tensors.items() if not _UNREAD.fullmatch(name)}
    check_shapes(found, chain(expected, rope_freqs))
    for name in found:
        kind = tensors[name].kind
        if len(found[name]) == 1 and kind.is_quantized:
            raise DamagedFileError(f"{name}: a vector of type {kind.name}, expected F32")


def _check_vocabulary(metadata: Mapping[str, Any], n_rows: int) -> None:
    key = f"{metadata['general.architecture']}.vocab_size"
    said = integer(metadata, key, n_rows)
    if said != n_rows:
        raise DamagedFileError(f"token_embd.weight: {n_rows} rows, {key} is {said}")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise DamagedFileError(f"tokenizer.ggml.tokens is {brief(tokens)}, expected strings")
    if len(tokens) > n_rows:
        raise DamagedFileError(
            f"token_embd.weight: {n_rows} rows, tokenizer.ggml.tokens has {len(tokens)}"
        )


def _read(info: TensorInfo, place: Place = as_read) -> Tensor | QTensor:
    from llamachat.checkpoints.blocks import read_blocks

    end = info.start + info.n_bytes
    with map_file(info.path) as data, memoryview(data) as view:
        if len(data) < end:
            raise DamagedFileError(
                f"{info.path}: {info.name} ends at {end}, the file has shrunk to {len(data)} bytes"
            )
        with view[info.start : end] as raw:
            tensor = read_blocks(raw, info.kind, info.shape, place)
    with located(info.path):
        check_finite(info.name, tensor)
    return tensor


def _read_rope_freqs(info: TensorInfo) -> Tensor:
    from torch import Tensor

    freqs = _read(info)
    assert isinstance(freqs, Tensor)  # vectors are never quantized
    freqs = freqs.float()
    if not bool((freqs > 0).all() and freqs.isfinite().all()):
        raise DamagedFileError(
            f"{info.path}: {info.name} has values from {freqs.min():g} to {freqs.max():g}, "
            "expected positive ones"
        )
    return freqs
