"""Hugging Face folders of the llama architecture, in one file or shards, as a `Checkpoint`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from llamachat.architecture import (
    CHATGLM,
    MLLAMA,
    ModelConfig,
    brief,
    config_from_hf,
    text_config,
    text_layers,
)
from llamachat.checkpoints import bnb, chatglm, mllama
from llamachat.checkpoints.joined import HUGGING_FACE, Layout, iter_joined
from llamachat.checkpoints.json_files import read_json, read_text, unique
from llamachat.checkpoints.names import Shape, check_shapes, located, shown
from llamachat.checkpoints.pickled import read_pickled
from llamachat.checkpoints.stored import (
    Place,
    Stored,
    as_read,
    check_finite,
    check_floats,
    commonest_type,
)
from llamachat.errors import DamagedFileError, TransferError, UsageError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of a LoRA
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_SMALL_FILES = (
    *(_CONFIG, _GENERATION, _TOKENIZER_CONFIG, _TEMPLATE, _INDEX, _PICKLED_INDEX),
    *("tokenizer.json", "tokenizer.model", "ice_text.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_HEAD = "lm_head.weight"
_UNREAD = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")  # a table that is computed


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of one file, as its header has it."""

    path: Path
    name: str
    shape: Shape
    dtype: str

    def read(self) -> Tensor:
        """The values."""
        with opened(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


class FolderCheckpoint:
    """A folder as `save_pretrained` writes it, in one file or in shards."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The folder that was opened."""
        return self._path

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that this program reads, as far as they are there."""
        names = [*_SMALL_FILES, *(path.name for path in self._weight_files)]
        return tuple(path for name in names if (path := self._path / name).exists())

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture; the presence, shape and type of every tensor agree with it."""
        config = self.declared_config
        if self._head(config) not in self._stored:
            config = replace(config, tied=True)
        quantized = self._quantized
        with located(self._path):
            self._check_tensors(config, quantized)
        return config

    @property
    def declared_config(self) -> ModelConfig:
        """What config.json says, not compared with any tensor."""
        path = self._path / _CONFIG
        if not path.exists():
            self._refuse_adapter()
            raise DamagedFileError(
                f"{path}: no such file, expected the model's architecture",
                hint=f"name a GGUF file, or the folder that holds {_CONFIG} and *.safetensors",
            )
        values = read_json(path)
        with located(path):
            return config_from_hf(values)

    @property
    def form(self) -> str:
        """The type of most values, of quantized ones if there are any: "BF16", "NF4"..."""
        n_values: Counter[str] = Counter()
        for weight in self._quantized.values():
            n_values[weight.form] += math.prod(weight.shape)
        return n_values.most_common(1)[0][0] if n_values else commonest_type(self._stored.values())

    @property
    def chat_template(self) -> str | None:
        """`chat_template.jinja`, else the (default) template of `tokenizer_config.json`."""
        path = self._path / _TEMPLATE
        if path.exists():
            return read_text(path)
        path = self._path / _TOKENIZER_CONFIG
        template = read_json(path).get("chat_template")
        is_chatglm2 = self._is(CHATGLM) and self.declared_config.prefix is None
        if template is None and is_chatglm2:
            return chatglm.CHAT_TEMPLATE
        with located(path):
            return _default_template(template)

    @property
    def generation(self) -> Mapping[str, Any]:
        """`generation_config.json`, empty where there is none."""
        return read_json(self._path / _GENERATION)

    @property
    def left_out(self) -> str | None:
        """The vision part of Llama 3.2 Vision."""
        return mllama.LEFT_OUT if self._is(MLLAMA) else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Empty: what a folder says of itself is in its README."""
        return {}

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer, with the ids of generation_config.json, else of config.json."""
        from llamachat.tokenizer.folder import tokenizer_from_folder

        bos_ids = self._token_ids("bos_token_id")
        return tokenizer_from_folder(
            self._path,
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=self._token_ids("eos_token_id"),
            appended=chatglm.APPENDED_TOKENS if self._is(CHATGLM) else (),
            n_ids=self.declared_config.vocab_size if self._is(MLLAMA) else None,
        )

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight by its name, in the order of a forward pass; a tied head is left out."""
        for joined in iter_joined(self.config, self._layout(self.config)):
            yield from joined.split(self._read(joined.name, place))

    def _refuse_adapter(self) -> None:
        has_files = [(self._path / name).exists() for name in (_CONFIG, ADAPTER_CONFIG)]
        if has_files == [False, True]:
            raise UsageError(
                f"{self._path} is no whole model: it is a LoRA, to be added to one",
                hint=f"llamachat chat -m MODEL --lora {self._path}",
            )

    def _is(self, model_type: str) -> bool:
        return read_json(self._path / _CONFIG).get("model_type") == model_type

    def _layout(self, config: ModelConfig) -> Layout:
        return chatglm.layout(config) if self._is(CHATGLM) else HUGGING_FACE

    def _head(self, config: ModelConfig) -> str:
        return self._layout(config).stored_name(_HEAD)

    @cached_property
    def _stored(self) -> Mapping[str, Stored]:
        """Every tensor; of Llama 3.2 Vision those of its text part, by Llama's names."""
        if not self._is(MLLAMA):
            return self._found
        with located(self._path):
            layers = text_layers(read_json(self._path / _CONFIG))
            return mllama.text_part(self._found, layers, self.declared_config.vocab_size)

    @property
    def _found(self) -> Mapping[str, Stored]:
        """Every tensor by its name in the file, found through the index where there is one."""
        if self._index is None:
            self._refuse_adapter()
            return read_header(*self._weight_files)
        headers = {path.name: read_header(path) for path in self._weight_files}
        stored = {}
        for name, shard in self._weight_map.items():
            if name not in headers[shard]:
                index = self._index.name
                raise DamagedFileError(
                    f"{self._path / shard}: no tensor {shown(name)}, {index} says it is there"
                )
            stored[name] = headers[shard][name]
        return stored

    @cached_property
    def _quantized(self) -> Mapping[str, bnb.Quantized]:
        """Those weights that lie in several tensors."""
        contents: dict[str, bytes] = {}
        if self._is_pickled:  # what bitsandbytes needs beside values is in *.safetensors alone
            return {}
        with located(self._path):
            described = list(bnb.described(self._stored))
        for path in {self._stored[name].path for name in described}:
            found = {name: self._stored[name] for name in described}
            names = {
                name: it.name
                for name, it in found.items()
                if isinstance(it, _Stored) and it.path == path
            }
            with opened(path, framework="numpy") as file:  # without torch
                contents |= {ours: file.get_tensor(it).tobytes() for ours, it in names.items()}
        with located(self._path):
            return bnb.quantized(self._stored, contents)

    def _read(self, name: str, place: Place) -> Tensor | QTensor:
        def tensor(name: str) -> Tensor:
            return place(self._stored[name].read())

        weight = self._quantized.get(name)
        found = weight.read(tensor) if weight else tensor(name)
        with located(self._stored[name].path):
            check_finite(name, found)
        return found

    @property
    def _is_pickled(self) -> bool:
        """Whether weights are in *.bin alone."""
        found = [
            (self._path / name).exists() for name in (_WEIGHTS, _INDEX, _PICKLED, _PICKLED_INDEX)
        ]
        return not any(found[:2]) and any(found[2:])

    @property
    def _index(self) -> Path | None:
        """What says in which shard a tensor is; one file needs none."""
        single, index = (_PICKLED, _PICKLED_INDEX) if self._is_pickled else (_WEIGHTS, _INDEX)
        if (self._path / single).exists() or not (self._path / index).exists():
            return None
        return self._path / index

    @property
    def _weight_files(self) -> tuple[Path, ...]:
        if self._index is None:
            name = _PICKLED if self._is_pickled else _WEIGHTS
            return (self._path / name,)
        return tuple(self._path / shard for shard in sorted(set(self._weight_map.values())))

    @cached_property
    def _weight_map(self) -> Mapping[str, str]:
        path = self._index
        assert path is not None
        weight_map = read_json(path).get("weight_map")
        with located(path):
            if not isinstance(weight_map, dict):
                raise DamagedFileError(f"weight_map is {brief(weight_map)}, expected an object")
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or not _is_file_name(shard):
                    raise DamagedFileError(
                        f"{shown(name)} is in {brief(shard)}, expected a file of the same folder"
                    )
        return weight_map

    def _check_tensors(self, config: ModelConfig, quantized: Mapping[str, bnb.Quantized]) -> None:
        parts = {name for weight in quantized.values() for name in weight.tensors}
        floats = {
            name: stored
            for name, stored in self._stored.items()
            if name not in parts and not name.endswith(_UNREAD)
        }
        shapes: dict[str, Shape] = {name: stored.shape for name, stored in floats.items()}
        shapes |= {name: weight.shape for name, weight in quantized.items()}
        if config.tied:
            shapes.pop(self._head(config), None)
        expected = iter_joined(config, self._layout(config))
        check_shapes(shapes, ((it.name, it.shape) for it in expected))
        check_floats(floats, shapes.keys() & floats.keys())

    def _token_ids(self, key: str) -> tuple[int, ...]:
        for path in (self._path / _GENERATION, self._path / _CONFIG):
            value = text_config(read_json(path)).get(key)
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise DamagedFileError(f"{path}: {key} is {brief(value)}, expected ids")
            return tuple(ids)
        return ()


def _is_file_name(name: str) -> bool:
    if name in ("", ".", "..") or len(name) > 255 or not name.isprintable():
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _default_template(template: Any) -> str | None:
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        if all(isinstance(default, str) for default in named):
            return named[0] if named else None
    raise DamagedFileError(f"chat_template is {brief(template)}, expected a string")


def read_header(path: Path) -> Mapping[str, Stored]:
    """Every tensor of one file, each offset checked against its size. Torch-free.

    Raises:
        DamagedFileError: as `opened`, or a tensor is there twice.
        TransferError: it cannot be read.
    """
    if path.suffix == ".bin":
        return read_pickled(path)
    with opened(path, framework="numpy") as file:  # no array is made
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        stored = {
            name: _Stored(path, name, tuple(it.get_shape()), it.get_dtype())
            for name, it in slices.items()
        }
    with path.open("rb") as stream, located(path):
        header = stream.read(int.from_bytes(stream.read(8), "little"))  # the library has checked it
        json.loads(header, object_pairs_hook=unique)  # but takes the last of two
    return stored


@contextmanager
def opened(path: Path, *, framework: str) -> Iterator[Any]:
    """The library's handle on one file, whose header it has checked.

    Raises:
        DamagedFileError: there is no such file, or it is not what it should be.
        TransferError: it cannot be read.
    """
    if not path.exists():
        raise DamagedFileError(
            f"{path}: no such file, expected weights",
            hint="fetch all files of the model: *.safetensors, or pytorch_model*.bin",
        )
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        reason = "".join(filter(str.isprintable, str(error)))[:200]
        raise DamagedFileError(f"{path}: {reason}", hint="fetch the file again") from error
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
