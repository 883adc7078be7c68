"""Weights that bitsandbytes has quantized, as transformers saves them: several tensors each.

4 bits, a weight "X.weight": codes "X.weight" uint8 (O I / 2, 1), scales "X.weight.absmax", their
"X.weight.quant_map" float32 (16,), and "X.weight.quant_state.bitsandbytes__nf4" (or fp4), the
bytes of a JSON object. Where scales are quantized in turn, "absmax" is uint8, and there are
"nested_absmax" and "nested_quant_map". 8 bits: "X.weight" int8 (O, I), "X.SCB" float32 (O,), and
"X.weight_format", one uint8, 0. (bitsandbytes, `QuantState.as_dict` and
`Linear8bitLt._save_to_state_dict`.)

Opening needs neither torch nor bitsandbytes, reading the tensors only torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llamachat.architecture import brief
from llamachat.checkpoints.names import Shape, located, shown
from llamachat.errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE_BYTES = 4096
_LARGEST_SIZE = 2**31  # of a matrix: what no config allows
_BLOCK_SIZES = tuple(2**n for n in range(5, 13))  # 32 to 4096: bitsandbytes takes no others
_SCALES, _FORMAT = ".SCB", ".weight_format"


class Header(Protocol):
    """What a file's header says of a tensor."""

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> str:
        """In safetensors' words: "U8", "F32"..."""
        ...


class Quantized(Protocol):
    """One weight, in several tensors that fit each other."""

    @property
    def form(self) -> str:
        """As people name it: "NF4", "FP4", "INT8"."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the matrix."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all the tensors."""
        ...

    def read(self, tensor: Callable[[str], Tensor]) -> QTensor:
        """The weight; `tensor` reads one by its name."""
        ...


@dataclass(frozen=True, slots=True)
class _Nested:
    """How scales are quantized in turn."""

    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class _FourBits:
    name: str
    form: str
    shape: tuple[int, int]
    block: int
    nested: _Nested | None

    @property
    def headers(self) -> dict[str, tuple[str, Shape]]:
        """Type and shape of each tensor but the state."""
        n_values = math.prod(self.shape)
        n_scales = -(-n_values // self.block)
        headers: dict[str, tuple[str, Shape]] = {
            self.name: ("U8", (n_values // 2, 1)),
            f"{self.name}.absmax": ("U8" if self.nested else "F32", (n_scales,)),
            f"{self.name}.quant_map": ("F32", (16,)),
        }
        if self.nested:
            n_inner = -(-n_scales // self.nested.block)
            headers[f"{self.name}.nested_absmax"] = ("F32", (n_inner,))
            headers[f"{self.name}.nested_quant_map"] = ("F32", (256,))
        return headers

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.headers, f"{self.name}.quant_state.bitsandbytes__{self.form.lower()}")

    def read(self, tensor: Callable[[str], Tensor]) -> QTensor:
        from llamachat.kernels.bnb import from_blocks, nested_scales

        scales = tensor(f"{self.name}.absmax")
        if self.nested:
            codebook, inner = (
                tensor(f"{self.name}.{part}") for part in ("nested_quant_map", "nested_absmax")
            )
            scales = nested_scales(scales, codebook, inner, self.nested.block, self.nested.offset)
        codebook = tensor(f"{self.name}.quant_map")
        return from_blocks(tensor(self.name), scales, codebook, self.shape, self.block)


@dataclass(frozen=True, slots=True)
class _EightBits:
    name: str
    shape: tuple[int, int]
    form: str = "INT8"

    @property
    def headers(self) -> dict[str, tuple[str, Shape]]:
        """Type and shape of each tensor but the format."""
        return {self.name: ("I8", self.shape), self._beside(_SCALES): ("F32", self.shape[:1])}

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.headers, self._beside(_FORMAT))

    def read(self, tensor: Callable[[str], Tensor]) -> QTensor:
        from llamachat.kernels.bnb import from_rows

        return from_rows(tensor(self.name), tensor(self._beside(_SCALES)))

    def _beside(self, ending: str) -> str:
        return self.name.removesuffix(".weight") + ending


def described(stored: Mapping[str, Header]) -> Iterator[str]:
    """The tensors whose bytes `quantized` wants to see; each is small.

    Raises:
        DamagedFileError: one is not.
    """
    for name, header in stored.items():
        if _STATE.fullmatch(name):
            is_small = len(header.shape) == 1 and header.shape[0] <= _MAX_STATE_BYTES
            expected = f"at most {_MAX_STATE_BYTES} of U8"
        elif name.endswith(_FORMAT):
            is_small, expected = header.shape == (), _text("U8", ())
        else:
            continue
        if header.dtype != "U8" or not is_small:
            found = _text(header.dtype, header.shape)
            raise DamagedFileError(f"{shown(name)}: {found}, expected {expected}")
        yield name


def quantized(stored: Mapping[str, Header], contents: Mapping[str, bytes]) -> dict[str, Quantized]:
    """The weights that bitsandbytes has quantized, by name.

    Args:
        stored: every tensor's header.
        contents: of the tensors that `described` names.

    Raises:
        DamagedFileError: a weight's tensors do not fit each other.
    """
    weights: list[_FourBits | _EightBits] = []
    for name, content in contents.items():
        with located(shown(name)):
            if found := _STATE.fullmatch(name):
                weights.append(_four_bits(found[1], found[2], content))
            elif content != b"\0":
                raise DamagedFileError(f"{brief(content)}, expected 0: row by row")
    modules = {
        name.removesuffix(ending)
        for name in stored
        for ending in (_SCALES, _FORMAT)
        if name.endswith(ending)
    }
    weights += (_eight_bits(f"{module}.weight", stored) for module in sorted(modules))
    for weight in weights:
        for name, (dtype, shape) in weight.headers.items():
            _expect(stored, name, dtype, shape)
    return {weight.name: weight for weight in weights}


def _four_bits(name: str, kind: str, content: bytes) -> _FourBits:
    try:
        state = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("not JSON") from error
    if not isinstance(state, dict):
        raise DamagedFileError(f"{brief(state)}, expected a JSON object")
    _one_of(state, "quant_type", (kind,))
    shape, block = _shape(state.get("shape")), _one_of(state, "blocksize", _BLOCK_SIZES)
    nested = None
    if "nested_blocksize" in state:
        _one_of(state, "nested_dtype", ("float32",))
        inner = _one_of(state, "nested_blocksize", _BLOCK_SIZES)
        nested = _Nested(inner, _offset(state.get("nested_offset")))
    return _FourBits(name, kind.upper(), shape, block, nested)


def _eight_bits(name: str, stored: Mapping[str, Header]) -> _EightBits:
    if name not in stored:
        raise DamagedFileError(f"{shown(name)} is missing, expected a matrix of I8")
    shape = stored[name].shape
    if len(shape) != 2 or not all(shape):
        found = _text(stored[name].dtype, shape)
        raise DamagedFileError(f"{shown(name)}: {found}, expected a matrix of I8")
    return _EightBits(name, (shape[0], shape[1]))


def _shape(value: Any) -> tuple[int, int]:
    is_shape = isinstance(value, list) and len(value) == 2
    if not is_shape or not all(type(n) is int and 0 < n < _LARGEST_SIZE for n in value):
        raise DamagedFileError(f"shape is {brief(value)}, expected rows and columns")
    rows, cols = value
    if cols % 2:
        raise DamagedFileError(f"{cols} columns, expected an even number: two share a byte")
    return rows, cols


def _offset(value: Any) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise DamagedFileError(f"nested_offset is {brief(value)}, expected a number")
    return value


def _one_of(state: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    value = state.get(key)
    if type(value) is not type(allowed[0]) or value not in allowed:
        expected = ", ".join(map(str, allowed))
        raise DamagedFileError(f"{key} is {brief(value)}, expected {expected}")
    return value


def _expect(stored: Mapping[str, Header], name: str, dtype: str, shape: Shape) -> None:
    expected = _text(dtype, shape)
    if name not in stored:
        raise DamagedFileError(f"{shown(name)} is missing, expected {expected}")
    found = stored[name]
    if (found.dtype, found.shape) != (dtype, shape):
        raise DamagedFileError(
            f"{shown(name)}: {_text(found.dtype, found.shape)}, expected {expected}"
        )


def _text(dtype: str, shape: Shape) -> str:
    return f"{' x '.join(map(str, shape)) or 'one value'} of {dtype}"
