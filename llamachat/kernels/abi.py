"""The C ABI of the native library, as ctypes reads it. Layouts and meanings: native/abi.h."""

from __future__ import annotations

from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_void_p,
)
from functools import lru_cache
from typing import ClassVar

from llamachat.kernels.library import load_library

FORMS = {"q4": 0, "q8": 1, "float32": 2, "float16": 3, "bfloat16": 4}
CACHE_FORMS = {"f32": 0, "bf16": 1, "int8": 2}
STORE, ADD, SWIGLU = 0, 1, 2


class Panels(Structure):
    """A matrix in panels of 16 rows."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("form", c_int32),
        ("group", c_int32),
        ("has_book", c_int32),
        ("shift", c_int32),
        ("unit", c_float),
        ("book", c_int8 * 16),
    )


class Weight(Structure):
    """Parts stacked along their rows."""

    _fields_ = (
        ("parts", POINTER(Panels)),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("n_parts", c_int32),
        ("gated", c_int32),
    )


class Cache(Structure):
    """Keys and values."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("chunk", c_int64),
        ("n_layers", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("form", c_int32),
    )


class Pass(Structure):
    """What changes from one pass to the next."""

    _fields_ = (
        ("ids", c_void_p),
        ("row", c_void_p),
        ("slot", c_void_p),
        ("seen", c_void_p),
        ("position", c_void_p),
        ("table", c_void_p),
        ("wanted", c_void_p),
        ("n_tokens", c_int64),
        ("n_wanted", c_int64),
        ("table_stride", c_int64),
    )


class Angles(Structure):
    """Positions to cosines and sines."""

    kind: ClassVar[int] = 0
    _fields_ = (
        ("pass_", POINTER(Pass)),
        ("frequencies", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("half", c_int64),
    )


class Embed(Structure):
    """Ids to rows of a table."""

    kind: ClassVar[int] = 1
    _fields_ = (("pass_", POINTER(Pass)), ("table", POINTER(Panels)), ("out", c_void_p))


class Gather(Structure):
    """The rows that are wanted."""

    kind: ClassVar[int] = 2
    _fields_ = (
        ("pass_", POINTER(Pass)),
        ("x", c_void_p),
        ("out", c_void_p),
        ("cols", c_int64),
    )


class Attention(Structure):
    """Rotate, store, attend."""

    kind: ClassVar[int] = 3
    _fields_ = (
        ("pass_", POINTER(Pass)),
        ("qkv", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("cache", POINTER(Cache)),
        ("out", c_void_p),
        ("n_heads", c_int32),
        ("layer", c_int32),
    )


class Linear(Structure):
    """A norm, if any, a product, and what becomes of it."""

    kind: ClassVar[int] = 4
    _fields_ = (
        ("x", c_void_p),
        ("norm", c_void_p),
        ("weight", POINTER(Weight)),
        ("out", c_void_p),
        ("n_tokens", c_int64),
        ("eps", c_float),
        ("mode", c_int32),
    )


class Quantize(Structure):
    """Floats to codes and scales."""

    _fields_ = (
        ("x", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("group", c_int32),
        ("has_book", c_int32),
        ("shift", c_int32),
        ("book", c_int8 * 16),
    )


class Op(Structure):
    """One step of a program; `args` is where the structure of its kind lies."""

    _fields_ = (("kind", c_int64), ("args", c_void_p))


class Progress(Structure):
    """Where a program is."""

    _fields_ = (("op", c_int64), ("unit", c_int64))


@lru_cache(maxsize=1)
def library() -> CDLL:
    """The library with its functions declared.

    Raises:
        LibraryMissing: it was not built, or cannot be loaded.
    """
    lib = load_library()
    prototypes = {
        "lc_isas": (c_char_p, ()),
        "lc_pool_new": (c_void_p, (c_int32, c_char_p)),
        "lc_pool_free": (None, (c_void_p,)),
        "lc_run": (c_int32, (c_void_p, POINTER(Op), c_int64, POINTER(Progress))),
        "lc_pack": (None, (c_void_p, c_void_p, POINTER(Panels))),
        "lc_quantize": (None, (c_void_p, POINTER(Quantize))),
        "lc_read_bandwidth": (c_double, (c_void_p, c_void_p, c_int64)),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def instruction_sets() -> tuple[str, ...]:
    """Those that were compiled in and this CPU has, the best first.

    Raises:
        LibraryMissing: the library was not built, or cannot be loaded.
    """
    names: bytes = library().lc_isas()
    return tuple(names.decode("ascii").split(","))
