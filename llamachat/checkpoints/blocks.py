"""GGUF blocks to tensors: the bits are rearranged, never rounded.

Layouts: ggml/src/ggml-common.h, their meaning: `dequantize_row_*` in ggml/src/ggml-quants.c
(llama.cpp, February 2025). Shapes: O rows, I values a row, B blocks a row, n bytes or codes a
block. A scale that ggml computes as a product (float16 times a small integer) is float32 here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llamachat.checkpoints.gguf_types import BlockType
from llamachat.checkpoints.stored import Place, as_read
from llamachat.quant.tensor import QTensor

# Unsigned words are only shifted and masked, for which the sign makes no difference.
_TYPES = {
    "<f4": torch.float32, "<f2": torch.float16, "<u2": torch.int16, "<u4": torch.int32,
    "|u1": torch.uint8, "|i1": torch.int8,
}  # fmt: skip
CONTIGUOUS = torch.contiguous_format
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# kvalues_iq4nl of ggml-common.h
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def read_blocks(
    raw: memoryview, kind: BlockType, shape: tuple[int, ...], place: Place = as_read
) -> Tensor | QTensor:
    """The tensor whose bytes are exactly `raw`, in memory of its own, where `place` brings them.

    `shape` is (I,) or (O, I), for a quantized type always (O, I).
    """
    found = _bytes(raw)
    placed = place(found)
    if not kind.is_quantized:
        own = placed.clone() if placed is found else placed
        return own.view(_FLOATS[kind.name]).view(shape)
    blocks = placed.view(shape[0], -1, kind.layout.itemsize)  # (O, B, n)
    return _READERS[kind.name](_Blocks(blocks, kind))


def _bytes(raw: memoryview) -> Tensor:
    """(n,) uint8 over the same memory, which is only read: torch asks for more than that."""
    if not len(raw):
        return torch.empty(0, dtype=torch.uint8)
    address = np.frombuffer(raw, np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_uint8 * len(raw)).from_address(address), dtype=torch.uint8)


class _Blocks:
    """Blocks of one type; an item is a field of all: (O, B), or (O, B, n) of those with several."""

    def __init__(self, raw: Tensor, kind: BlockType) -> None:
        self._raw = raw
        self._fields = dict(kind.layout.fields or {})

    def __getitem__(self, name: str) -> Tensor:
        kind, start = self._fields[name][:2]
        field = self._raw[..., start : start + kind.itemsize].clone(memory_format=CONTIGUOUS)
        values = field.view(_TYPES[kind.base.str])
        return values if kind.shape else values.squeeze(-1)


def _read_q8_0(blocks: _Blocks) -> QTensor:
    return _qtensor(8, blocks["q"], blocks["d"])


def _read_q4_0(blocks: _Blocks) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=16), blocks["d"])


def _read_q4_1(blocks: _Blocks) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=16), blocks["d"], blocks["m"])


def _read_q5_0(blocks: _Blocks) -> QTensor:
    return _qtensor(8, _five_bit_codes(blocks).view(torch.int8) - 16, blocks["d"])


def _read_q5_1(blocks: _Blocks) -> QTensor:
    return _qtensor(8, _five_bit_codes(blocks), blocks["d"], blocks["m"])


def _read_q2_k(blocks: _Blocks) -> QTensor:
    codes = _split(blocks["q"], (0, 2, 4, 6), run=32)
    scales = _products(blocks["d"], blocks["s"] & 15)
    return _qtensor(4, _packed(codes), scales, -_products(blocks["m"], blocks["s"] >> 4))


def _read_q3_k(blocks: _Blocks) -> QTensor:
    codes = _split(blocks["q"], (0, 2, 4, 6), run=32) | _split(blocks["h"], range(8), run=32) << 2
    low = _split(blocks["s"][..., :8], (0, 4), run=8)
    high = _split(blocks["s"][..., 8:], (0, 2, 4, 6), run=4)
    scales = _products(blocks["d"], (low | high << 4).view(torch.int8) - 32)
    return _qtensor(4, _packed(codes + 4), scales)  # ggml subtracts 4, a QTensor 8


def _read_q4_k(blocks: _Blocks) -> QTensor:
    return _qtensor(4, _repacked(blocks["q"], run=32), *_scales_and_mins(blocks))


def _read_q5_k(blocks: _Blocks) -> QTensor:
    codes = _split(blocks["q"], (0, 4), run=32) | _split(blocks["h"], range(8), run=32) << 4
    return _qtensor(8, codes, *_scales_and_mins(blocks))


def _read_q6_k(blocks: _Blocks) -> QTensor:
    codes = _split(blocks["q"], (0, 4), run=64) | _split(blocks["h"], (0, 2, 4, 6), run=32) << 4
    return _qtensor(8, codes.view(torch.int8) - 32, _products(blocks["d"], blocks["s"]))


def _read_iq4_nl(blocks: _Blocks) -> QTensor:
    codes = _repacked(blocks["q"], run=16)
    return _qtensor(4, codes, blocks["d"], codebook=torch.tensor(_IQ4_VALUES, dtype=torch.float32))


def _read_iq4_xs(blocks: _Blocks) -> QTensor:
    codes = _repacked(blocks["q"], run=16)
    low = _split(blocks["s"], (0, 4), run=1)
    high = _split_word(blocks["h"], range(0, 16, 2), mask=3)
    scales = _products(blocks["d"], (low | high << 4).view(torch.int8) - 32)
    return _qtensor(4, codes, scales, codebook=torch.tensor(_IQ4_VALUES, dtype=torch.float32))


_READERS: dict[str, Callable[[_Blocks], QTensor]] = {
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


def _split(packed: Tensor, shifts: Iterable[int], *, run: int) -> Tensor:
    """Each run of bytes to as many runs of codes as there are shifts: (O, B, n * shifts)."""
    rows, blocks, _ = packed.shape
    by = [*shifts]
    runs = packed.view(torch.uint8).view(rows, blocks, -1, run)
    mask = 2 ** (8 // len(by)) - 1
    return torch.stack([runs >> shift & mask for shift in by], dim=-2).view(rows, blocks, -1)


def _split_word(words: Tensor, shifts: Iterable[int], *, mask: int) -> Tensor:
    """One code for each shift of a wide integer: (O, B) -> (O, B, shifts) uint8."""
    return torch.stack([(words >> shift & mask).to(torch.uint8) for shift in shifts], dim=-1)


def _repacked(packed: Tensor, *, run: int) -> Tensor:
    """Bytes that hold values (i, i + run) to bytes that hold (2i, 2i + 1): (O, B, n) both."""
    rows, blocks, n = packed.shape
    pairs = packed.view(torch.int16).view(rows, blocks, -1, run // 2)
    low = pairs & 0x0F | pairs >> 4 & 0xF0
    high = pairs >> 4 & 0x0F | pairs >> 8 & 0xF0
    return torch.stack((low.to(torch.uint8), high.to(torch.uint8)), dim=-2).view(rows, blocks, n)


def _packed(codes: Tensor) -> Tensor:
    """Two codes to a byte, the even one low: (O, B, n) -> (O, B, n / 2)."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _five_bit_codes(blocks: _Blocks) -> Tensor:
    high = _split_word(blocks["h"], range(32), mask=1)
    return _split(blocks["q"], (0, 4), run=16) | high << 4


def _scales_and_mins(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """The eight scales and minima of 6 bits in a block's 12 bytes (`get_scale_min_k4`)."""
    first, second, third = torch.split(blocks["s"], 4, dim=-1)
    scales = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), dim=-1)
    mins = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), dim=-1)
    return _products(blocks["d"], scales), -_products(blocks["m"], mins)


def _products(factors: Tensor, integers: Tensor) -> Tensor:
    """float16 (O, B) times small integers (O, B, n), rounded once: (O, B, n) float32."""
    return factors.float().unsqueeze(-1) * integers


def _qtensor(
    bits: Literal[4, 8],
    codes: Tensor,
    scales: Tensor,
    mins: Tensor | None = None,
    codebook: Tensor | None = None,
) -> QTensor:
    """Of codes as QTensor keeps them, (O, B, n); scales and mins (O, B) or (O, B, groups)."""
    per_group = scales.flatten(1)
    n_values = codes[0].numel() * (8 // bits)
    return QTensor(
        codes=codes.flatten(1),
        scales=per_group,
        bits=bits,
        group_size=n_values // per_group.shape[1],
        mins=None if mins is None else mins.flatten(1),
        codebook=codebook,
    )
