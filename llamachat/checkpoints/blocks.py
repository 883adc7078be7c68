"""GGUF blocks to tensors: the bits are rearranged, never rounded.

Layouts: ggml/src/ggml-common.h, their meaning: `dequantize_row_*` in ggml/src/ggml-quants.c
(llama.cpp, February 2025). Shapes: O rows, I values a row, B blocks a row, n bytes or codes a
block. A scale that ggml computes as a product (float16 times a small integer) is float32 here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llamachat.checkpoints.gguf_types import BlockType
from llamachat.quant.tensor import QTensor

Array = npt.NDArray[Any]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# kvalues_iq4nl of ggml-common.h
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def read_blocks(raw: memoryview, kind: BlockType, shape: tuple[int, ...]) -> Tensor | QTensor:
    """The tensor whose bytes are exactly `raw`, in memory of its own.

    `shape` is (I,) or (O, I), for a quantized type always (O, I).
    """
    if not kind.is_quantized:
        return torch.frombuffer(bytearray(raw), dtype=_FLOATS[kind.name]).view(shape)
    blocks = np.frombuffer(raw, kind.layout).reshape(shape[0], -1)  # (O, B)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        return _READERS[kind.name](blocks)


def _read_q8_0(blocks: Array) -> QTensor:
    return _qtensor(8, blocks["q"], blocks["d"])


def _read_q4_0(blocks: Array) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=16), blocks["d"])


def _read_q4_1(blocks: Array) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=16), blocks["d"], blocks["m"])


def _read_q5_0(blocks: Array) -> QTensor:
    return _qtensor(8, _five_bit_codes(blocks).view(np.int8) - 16, blocks["d"])


def _read_q5_1(blocks: Array) -> QTensor:
    return _qtensor(8, _five_bit_codes(blocks), blocks["d"], blocks["m"])


def _read_q2_k(blocks: Array) -> QTensor:
    codes = _split(blocks["q"], (0, 2, 4, 6), run=32)
    scales = _products(blocks["d"], blocks["s"] & 15)
    return _qtensor(4, _packed(codes), scales, -_products(blocks["m"], blocks["s"] >> 4))


def _read_q3_k(blocks: Array) -> QTensor:
    codes = _split(blocks["q"], (0, 2, 4, 6), run=32) | _split(blocks["h"], range(8), run=32) << 2
    low = _split(blocks["s"][..., :8], (0, 4), run=8)
    high = _split(blocks["s"][..., 8:], (0, 2, 4, 6), run=4)
    scales = _products(blocks["d"], (low | high << 4).view(np.int8) - 32)
    return _qtensor(4, _packed(codes + 4), scales)  # ggml subtracts 4, a QTensor 8


def _read_q4_k(blocks: Array) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=32), *_scales_and_mins(blocks))


def _read_q5_k(blocks: Array) -> QTensor:
    codes = _split(blocks["q"], (0, 4), run=32) | _split(blocks["h"], range(8), run=32) << 4
    return _qtensor(8, codes, *_scales_and_mins(blocks))


def _read_q6_k(blocks: Array) -> QTensor:
    codes = _split(blocks["q"], (0, 4), run=64) | _split(blocks["h"], (0, 2, 4, 6), run=32) << 4
    return _qtensor(8, codes.view(np.int8) - 32, _products(blocks["d"], blocks["s"]))


def _read_iq4_nl(blocks: Array) -> QTensor:
    codes = _repacked(blocks["q"], run=16)
    return _qtensor(4, codes, blocks["d"], codebook=torch.tensor(_IQ4_VALUES, dtype=torch.float32))


def _read_iq4_xs(blocks: Array) -> QTensor:
    codes = _repacked(blocks["q"], run=16)
    low = _split(blocks["s"], (0, 4), run=1)
    high = _split_word(blocks["h"], range(0, 16, 2), mask=3)
    scales = _products(blocks["d"], (low | high << 4).view(np.int8) - 32)
    return _qtensor(4, codes, scales, codebook=torch.tensor(_IQ4_VALUES, dtype=torch.float32))


_READERS: dict[str, Callable[[Array], QTensor]] = {
    "Q4_0": _read_q4_0,
    "Q4_1": _read_q4_1,
    "Q5_0": _read_q5_0,
    "Q5_1": _read_q5_1,
    "Q8_0": _read_q8_0,
    "Q2_K": _read_q2_k,
    "Q3_K": _read_q3_k,
    "Q4_K": _read_q4_k,
    "Q5_K": _read_q5_k,
    "Q6_K": _read_q6_k,
    "IQ4_NL": _read_iq4_nl,
    "IQ4_XS": _read_iq4_xs,
}


def _split(packed: Array, shifts: Sequence[int], *, run: int) -> Array:
    """Each run of bytes to as many runs of codes as there are shifts: (O, B, n * shifts)."""
    rows, blocks, _ = packed.shape
    runs = packed.reshape(rows, blocks, -1, 1, run)
    mask = 2 ** (8 // len(shifts)) - 1
    codes: Array = (runs >> np.array(shifts, dtype=np.uint8)[:, None]) & mask
    return codes.reshape(rows, blocks, -1)


def _split_word(words: Array, shifts: Sequence[int], *, mask: int) -> Array:
    """One code for each shift of a wide integer: (O, B) -> (O, B, shifts) uint8."""
    codes: Array = (words[..., None] >> np.array(shifts, dtype=words.dtype)) & mask
    return codes.astype(np.uint8)


def _repacked(packed: Array, *, run: int) -> Array:
    """Bytes that hold values (i, i + run) to bytes that hold (2i, 2i + 1): (O, B, n) both."""
    rows, blocks, n = packed.shape
    runs = packed.reshape(rows, blocks, -1, run)
    even, odd = runs[..., ::2], runs[..., 1::2]
    halves = np.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), axis=-2)
    return halves.reshape(rows, blocks, n)


def _packed(codes: Array) -> Array:
    """Two codes to a byte, the even one low: (O, B, n) -> (O, B, n / 2)."""
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed


def _five_bit_codes(blocks: Array) -> Array:
    high = _split_word(blocks["h"], range(32), mask=1)
    codes: Array = _split(blocks["q"], (0, 4), run=16) | high << 4
    return codes


def _scales_and_mins(blocks: Array) -> tuple[Array, Array]:
    """The eight scales and minima of 6 bits in a block's 12 bytes (`get_scale_min_k4`)."""
    first, second, third = (blocks["s"][..., at : at + 4] for at in (0, 4, 8))
    scales = np.concatenate((first & 63, (third & 15) | (first >> 2 & 48)), axis=-1)
    mins = np.concatenate((second & 63, (third >> 4) | (second >> 2 & 48)), axis=-1)
    return _products(blocks["d"], scales), -_products(blocks["m"], mins)


def _products(factors: Array, integers: Array) -> Array:
    """float16 (O, B) times small integers (O, B, n), rounded once: (O, B, n) float32."""
    products: Array = factors.astype(np.float32)[..., None] * integers.astype(np.float32)
    return products


def _qtensor(
    bits: Literal[4, 8],
    codes: Array,
    scales: Array,
    mins: Array | None = None,
    codebook: Tensor | None = None,
) -> QTensor:
    """Of codes as QTensor keeps them, (O, B, n); scales and mins (O, B) or (O, B, groups)."""
    per_group = _rows(scales)
    n_values = codes[0].size * (8 // bits)
    return QTensor(
        codes=_rows(codes),
        scales=per_group,
        bits=bits,
        group_size=n_values // per_group.shape[1],
        mins=None if mins is None else _rows(mins),
        codebook=codebook,
    )


def _rows(array: Array) -> Tensor:
    """(O, ...) as a matrix (O, -1) that owns its memory."""
    return torch.from_numpy(np.require(array.reshape(len(array), -1), requirements=["C", "W", "O"]))
