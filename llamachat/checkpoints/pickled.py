"""State dicts that torch.save has written (*.bin, *.pth), read without running their pickle.

Such a file is a zip archive: "X/data.pkl" says which tensor is where in "X/data/0", "X/data/1"...,
which hold bare values, uncompressed (torch, `_save` in torch/serialization.py). `pickletools` takes
the pickle apart; of its opcodes only those are followed that state dicts consist of, and what they
call is never called: a tensor becomes a description of where its values are. `pickle.Unpickler`
with a list of permitted names would not do: a megabyte of nested tuples as the key of a dictionary
overflows its stack and ends the process.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llamachat.architecture import brief
from llamachat.checkpoints.names import Shape, located, shown
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import DamagedFileError, TransferError

if TYPE_CHECKING:
    from torch import Tensor

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch before 1.6
_PICKLE = "/data.pkl"
_MAX_PICKLE_BYTES = 4 * 2**20  # that of 126 layers has 0.13
_MAX_OPCODES = 1_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, bytes of the name, of the extra field
_ENCRYPTED = 1
_MAX_DIMS = 8
_LARGEST_SIZE = 2**48

_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGES = {  # the type in safetensors' words, and the bytes of a value
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.DoubleStorage": ("F64", 8),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
_GLOBALS = frozenset((_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES))


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """One tensor of one file; `start` is a byte of the file, strides count values."""

    path: Path
    shape: Shape
    dtype: str
    strides: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The values: where they are contiguous a view of the file, private to this process."""
        import torch

        dtype = getattr(torch, FLOATS[self.dtype])
        n_values = _span(self.shape, self.strides)
        if not n_values:
            return torch.empty(self.shape, dtype=dtype)
        data, at = _map(self.path, self.start, n_values * dtype.itemsize)
        values = torch.frombuffer(data, dtype=dtype, count=n_values, offset=at)
        if at % dtype.itemsize:
            values = values.clone()
        return values.as_strided(self.shape, self.strides).contiguous()


def read_pickled(path: Path) -> dict[str, PickledTensor]:
    """Where the tensors of a state dict are. Torch-free.

    Raises:
        DamagedFileError: it is not a zip archive of torch's, it names anything that no state dict
            needs, or a tensor would lie outside the file.
        TransferError: it cannot be read.
    """
    if not path.exists():
        raise DamagedFileError(
            f"{path}: no such file, expected weights", hint="fetch all files of the model"
        )
    try:
        with located(path, hint="fetch the file again, or the model's *.safetensors"):
            return _state_dict(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile was sent to before the beginning
            raise DamagedFileError(f"{path}: not a whole zip archive") from error
        raise TransferError(f"{path}: {error.strerror or error}") from error


def _state_dict(path: Path) -> dict[str, PickledTensor]:
    with path.open("rb") as file:
        begin = file.read(len(_LEGACY))
        if begin == _LEGACY:
            raise DamagedFileError("the format of torch before 1.6, expected a zip archive")
        if not begin.startswith(_ZIP):
            raise DamagedFileError(f"it begins with {begin[:4]!r}, expected {_ZIP!r}")
        try:
            with zipfile.ZipFile(file) as archive:
                members = _Members(archive, file)
                pickled = members.pickle()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise DamagedFileError(f"not a whole zip archive: {brief(str(error))}") from error
        values = _Machine(path, members.storage).run(pickled)
    if not isinstance(values, dict):
        raise DamagedFileError(f"it holds {brief(values)}, expected tensors by name")
    for name, value in values.items():
        if not isinstance(value, PickledTensor):
            raise DamagedFileError(f"{shown(name)} is {brief(value)}, expected a tensor")
    return values


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of values in the file."""

    dtype: str
    value_bytes: int
    n_values: int
    start: int


class _Members:
    """What an archive holds, by the names that torch gives it."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes]) -> None:
        self._archive = archive
        self._file = file
        self._n_bytes = file.seek(0, os.SEEK_END)
        self._members = {info.filename: info for info in archive.infolist()}
        if len(self._members) < len(archive.infolist()):
            raise DamagedFileError("a member is there twice, expected each once")
        pickles = [name for name in self._members if name.endswith(_PICKLE)]
        if len(pickles) != 1:
            raise DamagedFileError(f"{len(pickles)} members named *{_PICKLE}, expected one")
        self._root = pickles[0].removesuffix(_PICKLE)

    def pickle(self) -> bytes:
        """The description of the tensors."""
        info = self._stored(self._root + _PICKLE)
        if info.file_size > _MAX_PICKLE_BYTES:
            raise DamagedFileError(
                f"{info.file_size} bytes of pickle, expected at most {_MAX_PICKLE_BYTES}"
            )
        order = self._members.get(f"{self._root}/byteorder")  # older files have none
        if order and (order.file_size != 6 or self._archive.read(order) != b"little"):
            raise DamagedFileError("the byte order is another, expected little-endian")
        return self._archive.read(info)

    def storage(self, described: object) -> _Storage:
        """Where the values of a persistent id are."""
        match described:
            case ("storage", _Global(name), str(key), str(), int(n_values)) if name in _STORAGES:
                dtype, value_bytes = _STORAGES[name]
            case _:
                raise DamagedFileError(f"persistent id {brief(described)}, expected a storage")
        info = self._stored(f"{self._root}/data/{key}")
        if not 0 <= n_values <= info.file_size // value_bytes:
            raise DamagedFileError(
                f"{shown(info.filename)}: {brief(n_values)} values of {value_bytes} bytes, "
                f"it has {info.file_size} bytes"
            )
        return _Storage(dtype, value_bytes, n_values, self._start(info))

    def _stored(self, name: str) -> zipfile.ZipInfo:
        info = self._members.get(name)
        if info is None:
            raise DamagedFileError(f"no member {shown(name)} in the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise DamagedFileError(f"{shown(name)} is compressed or encrypted, expected neither")
        if info.compress_size != info.file_size:
            raise DamagedFileError(
                f"{shown(name)}: {info.compress_size} bytes stored for {info.file_size}"
            )
        return info

    def _start(self, info: zipfile.ZipInfo) -> int:
        """The first byte of a member, which zipfile does not tell."""
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP):
            raise DamagedFileError(f"{shown(info.filename)}: no header at {info.header_offset}")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start: int = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + info.file_size > self._n_bytes:
            raise DamagedFileError(
                f"{shown(info.filename)} ends at {start + info.file_size}, "
                f"the file has {self._n_bytes} bytes"
            )
        return start


class _Machine:
    """Follows a pickle. What comes out are its own literals, tuples, dictionaries and tensors."""

    def __init__(self, path: Path, storage: Callable[[object], _Storage]) -> None:
        self._path = path
        self._storage = storage
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> object:
        """The object that is described."""
        try:
            for count, (opcode, argument, at) in enumerate(pickletools.genops(pickled)):
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise DamagedFileError(f"{opcode.name} at {at}, no state dict needs it")
                if count >= _MAX_OPCODES:
                    raise DamagedFileError(f"more than {_MAX_OPCODES} opcodes")
                step(self, argument)
            return self._stack.pop()
        except (IndexError, KeyError, ValueError) as error:  # what is taken is not there
            raise DamagedFileError(f"not a pickle: {brief(str(error))}") from error

    def nothing(self, _: object) -> None:
        pass

    def push(self, value: object) -> None:
        self._stack.append(value)

    def put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def get(self, key: int) -> None:
        self.push(self._memo[key])

    def mark(self, _: object) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._marked.pop()
        return values

    def wrap(self, n_values: int) -> None:
        values = [self._stack.pop() for _ in range(n_values)]
        self.push(tuple(reversed(values)))

    def set_item(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str):
                raise DamagedFileError(f"{brief(key)} as a key, expected a name in a dictionary")
            if key in target:
                raise DamagedFileError(f"{shown(key)} is there twice")
            target[key] = value

    def named(self, module_and_name: str) -> None:
        name = module_and_name.replace(" ", ".", 1)
        if name not in _GLOBALS:
            raise DamagedFileError(
                f"it names {shown(name)}, which no state dict needs",
                hint="it may want to run code: use the model's *.safetensors",
            )
        self.push(_Global(name))

    def stored(self, _: object) -> None:
        self.push(self._storage(self._stack.pop()))

    def build(self, _: object) -> None:
        """Attributes, of a state dict the versions of its modules, are left out."""
        self._stack.pop()

    def call(self, _: object) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        match function, arguments:
            case _Global(name), () if name == _ORDERED_DICT:
                self.push({})
            case _Global(name), (PickledTensor() as tensor, bool(), _) if name == _PARAMETER:
                self.push(tensor)
            case _Global(name), (
                _Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), *_,
            ) if name == _TENSOR:  # fmt: skip
                self.push(_tensor(self._path, storage, offset, shape, strides))
            case _:
                called = function.name if isinstance(function, _Global) else brief(function)
                raise DamagedFileError(f"a call of {called} with {brief(arguments)}")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), _Machine.nothing),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(value=True),
    "NEWFALSE": lambda machine, _: machine.push(value=False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.wrap(1),
    "TUPLE2": lambda machine, _: machine.wrap(2),
    "TUPLE3": lambda machine, _: machine.wrap(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "MARK": _Machine.mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.named,
    "BINPERSID": _Machine.stored,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _tensor(
    path: Path, storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]
) -> PickledTensor:
    sizes = (offset, *shape, *strides)
    if (
        len(shape) != len(strides)
        or len(shape) > _MAX_DIMS
        or not all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in sizes)
    ):
        raise DamagedFileError(f"a tensor of {brief(shape)}, strides {brief(strides)}")
    # no more values than are stored: one that is spread over many would fill the memory
    if max(math.prod(shape), offset + _span(shape, strides)) > storage.n_values:
        raise DamagedFileError(
            f"a tensor of {brief(shape)}, strides {brief(strides)} from {offset}, "
            f"its storage has {storage.n_values} values"
        )
    start = storage.start + offset * storage.value_bytes
    return PickledTensor(path, shape, storage.dtype, strides, start)


def _span(shape: Shape, strides: tuple[int, ...]) -> int:
    """Values from the first to the last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _map(path: Path, start: int, n_bytes: int) -> tuple[mmap.mmap, int]:
    """Pages of a file, written to in memory alone, and where in them `start` is."""
    at = start % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            data = mmap.mmap(
                file.fileno(), at + n_bytes, access=mmap.ACCESS_COPY, offset=start - at
            )
    except ValueError as error:
        raise DamagedFileError(f"{path}: {n_bytes} bytes at {start}, it has shrunk") from error
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from error
    return data, at
