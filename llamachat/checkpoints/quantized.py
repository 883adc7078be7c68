"""Folders that `llamachat quantize` writes, as a `Checkpoint`; they need nothing else.

`model.safetensors` holds a quantized weight X as X.codes, X.scales and, as far as its QTensor has
them, X.mins and X.codebook; other weights are there as they are. The `__metadata__` of its header
says how and from what they were made, with the sha256 of every weight and of the files beside it;
the last tensor, `sha256`, is that of the header itself. Config, tokenizer and template are in
copies of the source's own files: those of a Hugging Face folder, or a GGUF file without tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from llamachat import hardware
from llamachat.architecture import ModelConfig, brief
from llamachat.checkpoints.gguf import GgufCheckpoint
from llamachat.checkpoints.meta import MetaCheckpoint, is_meta
from llamachat.checkpoints.names import located
from llamachat.checkpoints.quantized_layout import PARTS, Kept, StoredWeight, expect, layouts
from llamachat.checkpoints.safetensors import FolderCheckpoint, opened, read_header
from llamachat.checkpoints.stored import Place, as_read, check_finite
from llamachat.errors import DamagedFileError, TransferError
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

WEIGHTS = "model.safetensors"
GGUF_HEADER = "header.gguf"
FORMAT = "llamachat-quantized"
VERSION = "1"
SEAL = "sha256"  # the tensor that holds the header's
MAGIC = f'{{"__metadata__":{{"format":"{FORMAT}"'.encode()  # after the 8 bytes of length

_BIASED = "model.layers.0.self_attn.{}_proj.bias"  # as the first layer, so are all
_CHUNK_BYTES = 1 << 20
_MOST_AHEAD = 4  # weights that are verified while one is used
_HINT = "it is no longer as it was written: delete the folder, or quantize again with --force"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a quantized folder says of itself.

    Attributes:
        recipe: "name", "group_size", "nested" and "key", as they were asked for.
        source: "name", "path", "repo", "revision", "form", "size_bytes", "identity" (of its files
            when they were read) and "sha256" (of each file of weights).
        sha256: of every weight: of the bytes of its parts, in the order of `PARTS`.
        errors: of quantized weights: root of the mean squared error, relative to the weight's own.
        files: the sha256 of every file beside the weights.
    """

    recipe: Mapping[str, Any]
    source: Mapping[str, Any]
    sha256: Mapping[str, str]
    errors: Mapping[str, float]
    files: Mapping[str, str]

    @property
    def form(self) -> str:
        """As people name it: "INT4"."""
        return str(self.recipe["name"]).upper()


def is_quantized(path: Path) -> bool:
    """Whether a folder is one that `llamachat quantize` wrote, be it damaged or not."""
    try:
        with (path / WEIGHTS).open("rb") as file:
            return file.read(8 + len(MAGIC))[8:] == MAGIC
    except OSError:
        return False


def sha256_of(stream: IO[bytes], n_bytes: int | None = None) -> str:
    """The sha256 of the next `n_bytes`, or of all that is left."""
    digest = hashlib.sha256()
    left = math.inf if n_bytes is None else n_bytes
    while chunk := stream.read(int(min(_CHUNK_BYTES, left))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def parts_of(weight: Tensor | QTensor) -> dict[str, Tensor]:
    """What is stored of a weight, by its suffix; a float tensor has none ("")."""
    from torch import Tensor

    if isinstance(weight, Tensor):
        return {"": weight.contiguous()}
    found = {part: getattr(weight, part) for part in PARTS}
    return {f".{part}": it.contiguous() for part, it in found.items() if it is not None}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _frame(path: Path) -> GgufCheckpoint | MetaCheckpoint | FolderCheckpoint:
    """The source's config and tokenizer, copied into the folder."""
    if (path / GGUF_HEADER).exists():
        return GgufCheckpoint(path / GGUF_HEADER)
    return MetaCheckpoint(path) if is_meta(path) else FolderCheckpoint(path)


class QuantizedCheckpoint:
    """A folder that `llamachat quantize` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frame = _frame(path)

    @property
    def path(self) -> Path:
        """The folder that was opened."""
        return self._path

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights, config and tokenizer."""
        beside = (file for file in self._frame.files if file.name != WEIGHTS)
        return (self._path / WEIGHTS, *beside)

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture; the presence, shape and type of every tensor agree with it."""
        _, stored = self._header
        embedding = self._embedding_rows()
        tied = not {"lm_head.weight", "lm_head.weight.codes"} & stored.keys()
        if isinstance(self._frame, GgufCheckpoint | MetaCheckpoint):
            config = replace(
                self._frame.declared_config(tied=tied, vocab_size=embedding),
                qkv_bias=_BIASED.format("q") in stored,
                o_bias=_BIASED.format("o") in stored,
            )
        else:
            config = replace(self._frame.declared_config, tied=tied)
        with _blamed(self._path / WEIGHTS):
            for weight in layouts(stored, config):
                if weight.name not in self.facts.sha256:
                    raise DamagedFileError(f"{weight.name}: no sha256 of it")
        return config

    @property
    def form(self) -> str:
        """The form that was asked for: "INT4"."""
        return self.facts.form

    @property
    def chat_template(self) -> str | None:
        """The source's own."""
        return self._frame.chat_template

    @property
    def generation(self) -> Mapping[str, Any]:
        """The source's own."""
        return self._frame.generation

    @property
    def left_out(self) -> str | None:
        """The source's."""
        return self._frame.left_out

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The source's own, and what was made of it."""
        made = {"recipe": str(self.facts.recipe["key"]), "source": str(self.facts.source["name"])}
        return {**self._frame.metadata, **made}

    @property
    def facts(self) -> Facts:
        """How and from what it was made."""
        return self._header[0]

    @cached_property
    def weights(self) -> tuple[StoredWeight, ...]:
        """Every weight in the order of a forward pass."""
        return layouts(self._header[1], self.config)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def share_of_source(self) -> float:
        """Its size, as a share of the source's."""
        return self.size_bytes / max(1, int(self.facts.source["size_bytes"]))

    @property
    def bits_per_weight(self) -> float:
        """Of a value, on average over all weights, whatever they are stored as."""
        n_bytes = sum(weight.n_bytes for weight in self.weights)
        return n_bytes * 8 / sum(weight.n_values for weight in self.weights)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer."""
        return self._frame.tokenizer()

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every weight by its name, verified; the next ones are while this one is used."""
        self.verify()
        path, sha256 = self._path / WEIGHTS, self.facts.sha256
        n_ahead = max(1, min(hardware.usable_cores() // 2, _MOST_AHEAD))
        with (
            _blamed(),
            opened(path, framework="pt") as file,
            ThreadPoolExecutor(n_ahead) as pool,
        ):
            submitted = (
                pool.submit(_read, file, weight, sha256[weight.name], path)
                for weight in self.weights
            )
            ahead = deque(islice(submitted, n_ahead))
            while ahead:
                sooner = ahead.popleft()
                ahead.extend(islice(submitted, 1))
                yield sooner.result()

    def verify(self) -> None:
        """Compare the header and the files beside the weights with their sha256.

        Raises:
            DamagedFileError: one is not as it was written.
        """
        found = {}
        for file in self.files[1:]:
            with _readable(file) as stream:
                found[file.name] = sha256_of(stream)
        for name in sorted(found.keys() | self.facts.files.keys()):
            if found.get(name) != self.facts.files.get(name):
                raise DamagedFileError(f"{self._path / name}: another sha256", hint=_HINT)
        path = self._path / WEIGHTS
        with _blamed(), opened(path, framework="numpy") as file:
            seal = bytes(file.get_tensor(SEAL)).hex()
        with _readable(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            if sha256_of(stream, 8 + length) != seal:
                raise DamagedFileError(f"{path}: its header has another sha256", hint=_HINT)

    @cached_property
    def _header(self) -> tuple[Facts, Mapping[str, Kept]]:
        path = self._path / WEIGHTS
        with _blamed(), opened(path, framework="numpy") as file:
            stored: dict[str, Kept] = {
                name: (it.dtype, it.shape) for name, it in read_header(path).items()
            }
            metadata = file.metadata() or {}
        with _blamed(path):
            expect(SEAL, stored.pop(SEAL, None), ("U8", (32,)))
            return _facts(metadata), stored

    def _embedding_rows(self) -> int:
        stored, name = self._header[1], "model.embed_tokens.weight"
        _, shape = stored.get(f"{name}.codes") or stored.get(name) or ("", ())
        return shape[0] if shape else 1  # the comparison with the config says that it is missing


def _read(file: Any, weight: StoredWeight, sha256: str, path: Path) -> tuple[str, Tensor | QTensor]:
    from llamachat.quant.tensor import QTensor

    if weight.bits is None:
        found = {"": file.get_tensor(weight.name)}
    else:
        there = set(file.keys())
        names = {part: f"{weight.name}.{part}" for part in PARTS}
        found = {p: file.get_tensor(name) for p, name in names.items() if name in there}
    digest = hashlib.sha256()
    for part in found.values():
        digest.update(raw_bytes(part))
    if digest.hexdigest() != sha256:
        raise DamagedFileError(f"{path}: {weight.name} has another sha256", hint=_HINT)
    if weight.bits is None:
        tensor: Tensor | QTensor = found[""]
    else:
        assert weight.group_size is not None
        bits: Literal[4, 8] = 4 if weight.bits == 4 else 8
        tensor = QTensor(**found, bits=bits, group_size=weight.group_size)
    with located(path):
        check_finite(weight.name, tensor)
    return weight.name, tensor


def _facts(metadata: Mapping[str, str]) -> Facts:
    """From the strings of the header, whoever wrote them."""
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise DamagedFileError(
            f"format {brief(found[0])}, version {brief(found[1])}, "
            f"expected {FORMAT!r}, version {VERSION!r}"
        )
    try:
        recipe, source, weights, files = (
            json.loads(metadata[key]) for key in ("recipe", "source", "weights", "files")
        )
        return Facts(
            recipe={**recipe, "name": str(recipe["name"]), "key": str(recipe["key"])},
            source={
                **source,
                **{key: str(source[key]) for key in ("name", "path", "form")},
                "size_bytes": int(source["size_bytes"]),
            },
            sha256={name: str(weight["sha256"]) for name, weight in weights.items()},
            errors={
                name: float(weight["error"])
                for name, weight in weights.items()
                if weight["error"] is not None
            },
            files={name: str(sha256) for name, sha256 in files.items()},
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"metadata: {brief(str(error))}") from error


@contextmanager
def _blamed(where: Path | None = None) -> Iterator[None]:
    """Say in which file it was, and what to do with a folder that is ours."""
    try:
        yield
    except DamagedFileError as error:
        message = f"{where}: {error.message}" if where else error.message
        raise DamagedFileError(message, hint=_HINT) from error


@contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
