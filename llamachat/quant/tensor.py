"""The one logical form of a quantized weight, whatever file it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QTensor:
    """An (O, I) matrix of 4- or 8-bit codes in groups of `group_size` along I.

    value = factor * (scale * v (+ min)), where v is

    - `codebook[code]` with a codebook; with `shifts`, too, that plus `shifts[n]`: n is the number
      in the four lowest bits of the group's float16 scale,
    - the signed code at 8 bits without minimum, the unsigned code (0..255) with one,
    - `code - 8` at 4 bits without minimum, `code` (0..15) with one.

    Attributes:
        codes: 8 bits: (O, I) int8, or uint8 with `mins`; 4 bits: (O, I / 2) uint8, the even
            element in the low nibble.
        scales: (O, G) float16 or float32, as the source has them; G = I / group_size.
        mins: (O, G) like `scales`, or None.
        codebook: (16,) float32, or None.
        shifts: (16,) float32, or None; only with a codebook and without `mins`.
        factor: of all values.
    """

    codes: Tensor
    scales: Tensor
    bits: Literal[4, 8]
    group_size: int
    mins: Tensor | None = None
    codebook: Tensor | None = None
    shifts: Tensor | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        out, groups = self.scales.shape
        per_byte = 8 // self.bits
        assert self.codes.shape == (out, groups * self.group_size // per_byte)
        assert self.mins is None or self.mins.shape == self.scales.shape
        assert self.codebook is None or self.codebook.shape == (16,)
        if self.shifts is not None:
            assert self.shifts.shape == (16,)
            assert self.scales.dtype == torch.float16
            assert self.codebook is not None
            assert self.mins is None
        signed = self.bits == 8 and self.mins is None
        assert self.codes.dtype == (torch.int8 if signed else torch.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the logical matrix."""
        out, groups = self.scales.shape
        return out, groups * self.group_size

    def rows(self, index: Tensor) -> QTensor:
        """The matrix with rows `index` (N,) int64, in that order."""
        mins = None if self.mins is None else self.mins[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], mins=mins)

    def columns(self, start: int, stop: int) -> QTensor:
        """The matrix with columns `start` to `stop`, in smaller groups where a group is cut."""
        group = math.gcd(self.group_size, start, stop)
        groups, per_byte = slice(start // group, stop // group), 8 // self.bits

        def cut(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.group_size // group, 1)[:, groups].contiguous()

        return replace(
            self,
            codes=self.codes[:, start // per_byte : stop // per_byte].contiguous(),
            scales=cut(self.scales),
            mins=None if self.mins is None else cut(self.mins),
            group_size=group,
        )

    def __mul__(self, factor: float) -> QTensor:
        """The matrix times a number."""
        return replace(self, factor=self.factor * factor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (O, I) matrix; products and sums are rounded once each, to `dtype`.

        Levels of a codebook, shifted or not, are taken as float32 has them.

        `dtype` is float32 or float64.
        """
        out, groups = self.scales.shape
        values = self._values().view(out, groups, self.group_size)  # (O, I) -> (O, G, group)
        if self.shifts is not None:
            number = self.scales.view(torch.int16).long() & 15
            values = values + self.shifts.to(number.device)[number].unsqueeze(-1)
        values = values.to(dtype) * self.scales.to(dtype).unsqueeze(-1)
        if self.mins is not None:
            values += self.mins.to(dtype).unsqueeze(-1)
        return (values if self.factor == 1 else values * self.factor).view(self.shape)

    def _values(self) -> Tensor:
        if self.bits == 8:
            return self.codes.float()
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).view(self.shape)
        if self.codebook is not None:
            return self.codebook.to(codes.device)[codes.long()]
        return codes.float() if self.mins is not None else codes.float() - 8
