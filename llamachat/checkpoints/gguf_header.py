"""The header of one GGUF file, read without trusting it: metadata and where each tensor lies.

Format: docs/gguf.md of ggml, versions 2 and 3, little-endian. Every count, length and offset is
compared with the file's size before it is used, so that nothing larger than the file is made.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from llamachat.architecture import brief
from llamachat.checkpoints.gguf_types import BLOCK_TYPES, BlockType
from llamachat.checkpoints.names import Shape, located, shown
from llamachat.errors import DamagedFileError, TransferError

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_STRING: Final = 8
_ARRAY: Final = 9
# The other value types, as struct and numpy call them.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `n_bytes` from `start` of `path`; `shape` has the rows first."""

    name: str
    kind: BlockType
    shape: Shape
    path: Path
    start: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself.

    `metadata` holds numbers, strings, lists of strings and read-only numpy arrays of numbers.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read-only; to be closed, or Windows lets nobody replace the file.

    Raises:
        DamagedFileError: the file is empty.
        TransferError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise DamagedFileError(f"{path}: 0 bytes, expected a GGUF file") from error
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        DamagedFileError: not GGUF, truncated, or anything in it that cannot be true.
    """
    hint = "it may be incomplete: fetch the file again"
    with map_file(path) as data, located(path, hint=hint):
        reader = _Reader(data)
        _check_magic(reader)
        n_tensors = reader.count("tensors", least_bytes=32)
        n_metadata = reader.count("metadata keys", least_bytes=13)
        metadata = _read_metadata(reader, n_metadata)
        stored = [_read_tensor_info(reader) for _ in range(n_tensors)]
        return Header(metadata, _locate(stored, path, _alignment(metadata), reader))


def read_architecture(start: bytes, name: str) -> Mapping[str, Any]:
    """The metadata before the vocabulary, from the first bytes of a file: a few KB are enough.

    Of `tokenizer.ggml.tokens` there is the number, as the architecture's `vocab_size` where that is
    not told.

    Raises:
        DamagedFileError: as `read_header`; or the vocabulary comes first.
    """
    with located(name):
        reader = _Reader(start)
        _check_magic(reader)
        n_tensors, count = reader.number("Q"), reader.number("Q")
        metadata: dict[str, Any] = {"tensors": n_tensors}
        for _ in range(count):
            key = reader.string()
            if key == "tokenizer.ggml.tokens":
                _, _, n_tokens = (reader.number(code) for code in "IIQ")
                kind = metadata.get("general.architecture")
                return {f"{kind}.vocab_size": n_tokens, **metadata}
            with located(shown(key)):
                metadata[key] = _read_value(reader)
        return metadata


def without_tensors(path: Path) -> bytes:
    """A GGUF file of the same metadata that holds no tensors.

    Raises:
        DamagedFileError: as `read_header`.
    """
    with map_file(path) as data, located(path):
        reader = _Reader(data)
        _check_magic(reader)
        magic, _ = reader.at, reader.number("Q")
        _read_metadata(reader, reader.count("metadata keys", least_bytes=13))
        return data[:magic] + bytes(8) + data[magic + 8 : reader.at]


def integer(metadata: Mapping[str, Any], key: str, default: int) -> int:
    """A non-negative integer of the metadata.

    Raises:
        DamagedFileError: it is something else.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DamagedFileError(f"{key} is {brief(value)}, expected a whole number")
    return value


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor info as the file has it; `offset` counts from the start of the data."""

    name: str
    kind: BlockType
    shape: Shape
    offset: int


class _Reader:
    """Takes values from the front of the data, never from beyond its end."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self.size = len(data)
        self.at = 0

    def count(self, what: str, *, least_bytes: int) -> int:
        count: int = self.number("Q")
        if count * least_bytes > self.size:
            raise DamagedFileError(f"{count} {what} announced, the file has {self.size} bytes")
        return count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return _decoded(self.bytes(self.number("Q")))

    def bytes(self, n: int) -> bytes:
        start, end = self.at, self.at + n
        if end > self.size:
            raise DamagedFileError(
                f"{n} bytes expected at offset {start}, the file has {self.size}"
            )
        self.at = end
        return self._data[start:end]

    def strings(self, count: int) -> list[str]:
        """As `string`, `count` times: vocabularies have 10^5 of them."""
        if count * 8 > self.size - self.at:
            raise DamagedFileError(f"{count} strings expected, the file has {self.size} bytes")
        data, at, length_at = self._data, self.at, struct.Struct("<Q").unpack_from
        texts = []
        for index in range(count):
            start = at + 8
            end = start + length_at(data, at)[0] if start <= self.size else start
            if end > self.size:
                raise DamagedFileError(
                    f"string {index} of {count} ends at {end}, the file has {self.size} bytes"
                )
            texts.append(_decoded(data[start:end]))
            at = end
        self.at = at
        return texts


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{raw[:20]!r} is not UTF-8, as every string must be") from error


def _check_magic(reader: _Reader) -> None:
    magic = reader.bytes(min(4, reader.size))
    if magic != b"GGUF":
        raise DamagedFileError(f"it begins with {magic!r}, expected b'GGUF'")
    version = reader.number("I")
    if version and version & 0xFFFF == 0:
        raise DamagedFileError(
            "the byte order is big-endian, expected little-endian",
            hint="fetch the file that was made for this kind of machine",
        )
    if version not in _VERSIONS:
        raise DamagedFileError(f"GGUF version {version}, expected 2 or 3")


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        with located(f"metadata key {index + 1} of {count}"):
            key = reader.string()
        if key in metadata:
            raise DamagedFileError(f"{shown(key)} is there twice, expected once")
        with located(shown(key)):
            metadata[key] = _read_value(reader)
    return metadata


def _read_value(reader: _Reader) -> Any:
    kind = reader.number("I")
    if kind == _STRING:
        return reader.string()
    if kind == _ARRAY:
        kind, count = reader.number("I"), reader.number("Q")
        if kind == _STRING:
            return reader.strings(count)
        if code := _NUMBERS.get(kind):
            item = np.dtype("u1" if code == "?" else "<" + code)
            return np.frombuffer(reader.bytes(count * item.itemsize), item)
        raise DamagedFileError(f"array of value type {kind}, expected numbers or strings")
    if code := _NUMBERS.get(kind):
        return reader.number(code)
    raise DamagedFileError(f"value type {kind}, expected 0 to 12")


def _read_tensor_info(reader: _Reader) -> _Stored:
    with located("tensor name"):
        name = reader.string()
    with located(shown(name)):
        n_dims = reader.number("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise DamagedFileError(f"{n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(reader.number("Q") for _ in range(n_dims))[::-1]  # stored fastest first
        number, offset = reader.number("I"), reader.number("Q")
        kind = BLOCK_TYPES.get(number)
        if kind is None:
            raise DamagedFileError(
                f"tensor type {number}, expected one of "
                + ", ".join(known.name for known in BLOCK_TYPES.values()),
                hint="use a file of the same model in another quantization, for example Q4_K_M",
            )
        if 0 in shape:
            raise DamagedFileError(f"shape {shape}, expected no zero")
        if shape[-1] % kind.values:
            raise DamagedFileError(
                f"rows of {shape[-1]} values, expected blocks of {kind.values} ({kind.name})"
            )
        return _Stored(name, kind, shape, offset)


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = integer(metadata, "general.alignment", _DEFAULT_ALIGNMENT)
    if alignment == 0 or alignment & (alignment - 1):
        raise DamagedFileError(f"general.alignment is {alignment}, expected a power of two")
    return alignment


def _locate(
    stored: list[_Stored], path: Path, alignment: int, reader: _Reader
) -> dict[str, TensorInfo]:
    """Absolute positions, every tensor inside the file and apart from the others."""
    data_start = -(-reader.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for it in stored:
        n_bytes = it.kind.n_bytes(math.prod(it.shape))
        start = data_start + it.offset
        with located(shown(it.name)):
            if it.name in tensors:
                raise DamagedFileError("it is there twice, expected once")
            if it.offset % alignment:
                raise DamagedFileError(f"offset {it.offset}, expected a multiple of {alignment}")
            if start + n_bytes > reader.size:
                raise DamagedFileError(
                    f"it ends at {start + n_bytes}, the file has {reader.size} bytes"
                )
        tensors[it.name] = TensorInfo(it.name, it.kind, it.shape, path, start, n_bytes)
    for one, other in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.start)):
        if one.start + one.n_bytes > other.start:
            raise DamagedFileError(
                f"{shown(other.name)}: it starts at {other.start}, inside {shown(one.name)}, "
                f"which ends at {one.start + one.n_bytes}"
            )
    return tensors
