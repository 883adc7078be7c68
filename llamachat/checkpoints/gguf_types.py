"""How GGUF stores the values of a tensor: the block layouts that are read, by their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SCALE = ("d", "<f2")
_MIN = ("m", "<f2")


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type: `layout` (numpy dtype) holds `values` consecutive values of a row."""

    name: str
    values: int
    layout: np.dtype[Any]

    @property
    def is_quantized(self) -> bool:
        """Whether a block holds more than one value."""
        return self.values > 1

    def n_bytes(self, n_values: int) -> int:
        """The size of `n_values` values, a whole number of blocks."""
        return n_values // self.values * self.layout.itemsize


def _type(name: str, values: int, layout: npt.DTypeLike) -> BlockType:
    return BlockType(name, values, np.dtype(layout))


# Numbers and layouts: ggml/include/ggml.h and ggml/src/ggml-common.h of llama.cpp (February 2025).
# d scale, m minimum, q low bits of the codes, h their high bits, s packed scales.
BLOCK_TYPES = {
    0: _type("F32", 1, "<f4"),
    1: _type("F16", 1, "<f2"),
    2: _type("Q4_0", 32, [_SCALE, ("q", "u1", 16)]),
    3: _type("Q4_1", 32, [_SCALE, _MIN, ("q", "u1", 16)]),
    6: _type("Q5_0", 32, [_SCALE, ("h", "<u4"), ("q", "u1", 16)]),
    7: _type("Q5_1", 32, [_SCALE, _MIN, ("h", "<u4"), ("q", "u1", 16)]),
    8: _type("Q8_0", 32, [_SCALE, ("q", "i1", 32)]),
    10: _type("Q2_K", 256, [("s", "u1", 16), ("q", "u1", 64), _SCALE, _MIN]),
    11: _type("Q3_K", 256, [("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), _SCALE]),
    12: _type("Q4_K", 256, [_SCALE, _MIN, ("s", "u1", 12), ("q", "u1", 128)]),
    13: _type("Q5_K", 256, [_SCALE, _MIN, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)]),
    14: _type("Q6_K", 256, [("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _SCALE]),
    20: _type("IQ4_NL", 32, [_SCALE, ("q", "u1", 16)]),
    23: _type("IQ4_XS", 256, [_SCALE, ("h", "<u2"), ("s", "u1", 4), ("q", "u1", 128)]),
    30: _type("BF16", 1, "<u2"),
}
