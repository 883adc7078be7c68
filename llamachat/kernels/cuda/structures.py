"""What kernels are called with: the structures of the .cu and .cuh files, for ctypes."""

from __future__ import annotations

from ctypes import Structure, Union, c_float, c_int8, c_int32, c_int64, c_uint64, c_void_p


class Acts(Structure):
    """Activations (T, K): codes of 8 bits, and the values themselves (common.cuh)."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("values", c_void_p),
        ("squares", c_void_p),
        ("blocks", c_int32),
        ("dim", c_int32),
        ("eps", c_float),
        ("unused", c_int32),
    )


class Part(Structure):
    """Rows of a weight in one form (weights.cuh)."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("book", c_int8 * 16),
        ("summands", c_int8 * 16),
        ("stride", c_int64),
        ("unit", c_float),
        ("rows", c_int32),
        ("units", c_int32),
        ("groups", c_int32),
        ("shift", c_int32),
        ("step", c_int32),
        ("form", c_int32),
        ("first", c_int32),
    )


class Linear(Structure):
    """A product of a few tokens (linear.cu)."""

    _fields_ = (
        ("parts", Part * 3),
        ("x", Acts),
        ("out", Acts),
        ("bias", c_void_p),
        ("gain", c_void_p),
        ("wanted", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("n_parts", c_int32),
        ("tokens", c_int32),
    )


class Sending(Linear):
    """A product whose numbers go to several processes (linear.cu)."""

    _fields_ = (  # type: ignore[assignment]  # after those of the base
        ("to", c_void_p * 8),
        ("epoch", c_void_p),
        ("peers", c_int32),
        ("unused", c_int32),
    )


class Gather(Structure):
    """A sum over processes (gather.cu)."""

    _fields_ = (
        ("out", Acts),
        ("from_", c_void_p),
        ("h", c_void_p),
        ("gain", c_void_p),
        ("epoch", c_void_p),
        ("next", c_void_p),
        ("stride", c_int64),
        ("peers", c_int32),
        ("dim", c_int32),
    )


class Bring(Structure):
    """A batch (stream.cu, as the next five)."""

    _fields_ = (
        ("staged", c_void_p),
        ("chosen", c_void_p),
        ("to", c_void_p),
        ("count", c_int32),
        ("tokens", c_int32),
    )


class Best(Structure):
    """The largest logits."""

    _fields_ = (
        ("logits", c_void_p),
        ("found", c_void_p),
        ("tickets", c_void_p),
        ("ids", c_void_p),
        ("width", c_int64),
    )


class Angles(Structure):
    """Positions times frequencies."""

    _fields_ = (
        ("position", c_void_p),
        ("frequencies", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("half", c_int32),
        ("tokens", c_int32),
    )


class Embed(Structure):
    """Rows of a table."""

    _fields_ = (
        ("part", Part),
        ("out", Acts),
        ("gain", c_void_p),
        ("ids", c_void_p),
        ("h", c_void_p),
        ("dim", c_int64),
    )


class Unpack(Structure):
    """Rows of a weight as bfloat16."""

    _fields_ = (
        ("parts", Part * 3),
        ("out", c_void_p),
        ("columns", c_int64),
        ("first", c_int64),
        ("rows", c_int64),
    )


class Code(Structure):
    """Values brought to 8 bits."""

    _fields_ = (("out", Acts), ("x", c_void_p), ("gain", c_void_p))


class Quantize(Structure):
    """Floats that become codes (quantize.cu)."""

    _fields_ = (
        ("x", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("groups", c_int64),
    )


class Attention(Structure):
    """Attention of a few tokens in one layer (attention.cu)."""

    _fields_ = (
        ("qkv", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("row", c_void_p),
        ("slot", c_void_p),
        ("seen", c_void_p),
        ("table", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("partial", c_void_p),
        ("weights", c_void_p),
        ("tickets", c_void_p),
        ("out", Acts),
        ("slots", c_int64),
        ("table_stride", c_int64),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("splits", c_int32),
        ("is_stored", c_int32),
    )


class Rows(Structure):
    """Rows of a prompt, normed or gated (stream.cu)."""

    _fields_ = (
        ("x", c_void_p),
        ("gain", c_void_p),
        ("out", c_void_p),
        ("dim", c_int64),
        ("eps", c_float),
        ("unused", c_int32),
    )


class Map(Structure):
    """A matrix in global memory, of which boxes are copied: what the driver encodes (ptx.cuh)."""

    _fields_ = (("words", c_uint64 * 16),)


class _Works(Union):
    _fields_ = (("linear", Linear), ("attention", Attention))


class Phase(Structure):
    """What a step's blocks do between two waits (step.cu)."""

    _anonymous_ = ("works",)
    _fields_ = (
        ("maps", Map * 3 * 3),
        ("works", _Works),
        ("op", c_int32),
        ("units", c_int32),
        ("first", c_int32),
        ("unused", c_int32 * 13),
    )


class Step(Structure):
    """All phases of a pass."""

    _fields_ = (
        ("phases", c_void_p),
        ("arrived", c_void_p),
        ("n_phases", c_int32),
        ("unused", c_int32),
    )
