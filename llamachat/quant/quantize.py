"""int8 and int4 in torch: floats to codes, with a search for the scale and shift of each group.

What the native kernels do (kernels/native/quantize.h), for where they are not to be had.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llamachat.quant.form import CODEBOOK, SHIFT, SHIFTS, Form
from llamachat.quant.tensor import QTensor

TOP = 127.0  # the largest code of 8 bits
REFINEMENTS = 3
CHUNK = 2**22  # values that are searched at once
SCALES = tuple(1 - 0.002 * i for i in range(31))  # of 8 bits: clipping does not pay
AROUND = 3  # shifts on either side that are tried
PARTS = (1.0, 0.92)  # of the scale that clips nothing
LARGEST_F16 = 0x7BFF


def quantize(weight: Tensor, form: Form) -> QTensor:
    """Codes and scales of an (O, I) matrix of finite floats.

    For each group, scales around one that makes its largest value an outer level are tried, at 4
    bits with several shifts. Codes of each have one best scale, by least squares (sum x v / sum
    v^2, of levels v); the best pair is refined and rounded to float16. The result never errs more
    than the scale that the search began with.

    Args:
        weight: I a multiple of the form's group size.
        form: int8 or int4.
    """
    out, columns = weight.shape
    groups = weight.reshape(-1, form.group_size)  # (O G, group)
    n = CHUNK // form.group_size
    found = [_coded(groups[i : i + n].float(), form) for i in range(0, len(groups), n)]
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    codes = codes.view(out, columns)
    if form.bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return of_codes(codes, scales.view(out, -1), form)


def of_codes(codes: Tensor, scales: Tensor, form: Form) -> QTensor:
    """A matrix in one of our forms: codes as QTensor has them, scales (O, G) float16."""
    if form.bits == 8:
        return QTensor(codes, scales, 8, form.group_size)
    codebook, shifts = (torch.tensor(it, dtype=torch.float32) for it in (CODEBOOK, SHIFTS))
    return QTensor(codes, scales, 4, form.group_size, codebook=codebook, shifts=shifts)


def _coded(x: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes (N, group) int8 or uint8, and scales (N, 1) float16, of x (N, group)."""
    levels = _Levels(form, x.device)
    first = x.gather(1, x.abs().argmax(1, keepdim=True)) / levels.first
    search = _Search(x, levels)
    search.consider(first, torch.zeros_like(first))
    best, score, shift = (torch.zeros_like(first) for _ in range(3))
    for scale, moved in levels.candidates(x, first):
        product, square = _sums(x, levels.nearest(x / _or_one(scale), moved))
        found = product.square() / _or_one(square)
        is_better = found > score
        best = torch.where(is_better, product / _or_one(square), best)
        shift = torch.where(is_better, moved, shift)
        score = torch.maximum(found, score)
    for _ in range(REFINEMENTS):
        best = search.consider(best, shift)
    scale = torch.where(first.half() == 0, 0, search.scale)
    moved = torch.where(scale == 0, 0, search.shift)
    return levels.codes(x / _or_one(scale.float()), moved), scale


class _Levels:
    """The multiples of a scale that codes stand for: 16 of a codebook, or integers up to 127."""

    def __init__(self, form: Form, device: torch.device) -> None:
        self.codebook: Tensor | None = None
        self.first = TOP
        if form.bits == 4:
            self.codebook = torch.tensor(CODEBOOK, dtype=torch.float32, device=device)
            self.first = float(CODEBOOK[0])

    def codes(self, z: Tensor, shift: Tensor) -> Tensor:
        """The codes whose levels are nearest to z, int8 or uint8."""
        if self.codebook is None:
            return z.round().clamp(-TOP, TOP).to(torch.int8)
        return _numbers(z - shift, self.codebook).to(torch.uint8)

    def nearest(self, z: Tensor, shift: Tensor) -> Tensor:
        """The levels themselves."""
        if self.codebook is None:
            return z.round().clamp(-TOP, TOP)
        numbers = _numbers(z - shift, self.codebook)
        return self.codebook.index_select(0, numbers.flatten()).view_as(z) + shift

    def candidates(self, x: Tensor, first: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and shifts (N, 1) to try.

        At 4 bits with either sign: shifts around the one under which both the least value and the
        largest are outer levels.
        """
        if self.codebook is None:
            yield from ((first / factor, torch.zeros_like(first)) for factor in SCALES)
            return
        bottom, top = CODEBOOK[0], CODEBOOK[-1]
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        for sign, least, most in ((1, low, high), (-1, -high, -low)):
            fitting = (least / _or_one((most - least) / (top - bottom)) - bottom) / SHIFT
            middle = fitting.round().clamp(AROUND - 8, 7 - AROUND)
            for i in range(-AROUND, AROUND + 1):
                shift = (middle + i) * SHIFT
                whole = torch.maximum(least / (bottom + shift), most / (top + shift))
                yield from ((sign * whole * part, shift) for part in PARTS)


class _Search:
    """The scale and shift (N, 1) of each group that err least, of all that were considered."""

    def __init__(self, x: Tensor, levels: _Levels) -> None:
        self._x, self._levels = x, levels
        self._least = torch.full((len(x), 1), torch.inf, device=x.device)
        self.scale = torch.zeros((len(x), 1), dtype=torch.float16, device=x.device)
        self.shift = torch.zeros((len(x), 1), device=x.device)

    def consider(self, scale: Tensor, shift: Tensor) -> Tensor:
        """Take what errs less; returns the best scales for the codes of these."""
        rounded = _rounded(scale, None if self._levels.codebook is None else shift)
        exact = rounded.float()
        v = self._levels.nearest(self._x / _or_one(exact), shift)
        error = (self._x - exact * v).square().sum(1, keepdim=True)
        is_better = error < self._least
        self.scale = torch.where(is_better, rounded, self.scale)
        self.shift = torch.where(is_better, shift, self.shift)
        self._least = torch.minimum(error, self._least)
        product, square = _sums(self._x, v)
        return product / _or_one(square)


def _numbers(z: Tensor, codebook: Tensor) -> Tensor:
    """Which entries are nearest, int32."""
    bounds = (codebook[:-1] + codebook[1:]) / 2
    return torch.bucketize(z, bounds, right=True, out_int32=True)


def _rounded(scale: Tensor, shift: Tensor | None) -> Tensor:
    """The nearest float16, and if there are shifts, the one whose lowest four bits say which."""
    size = scale.abs().half().view(torch.int16).clamp(max=LARGEST_F16)
    if shift is not None:
        number = (shift / SHIFT).to(torch.int16) + 8
        size = (size - number + 8).div(16, rounding_mode="floor").clamp(min=0) * 16 + number
        size = torch.where(size > LARGEST_F16, size - 16, size)
    return size.view(torch.float16).copysign(scale.half())


def _sums(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (x * v).sum(1, keepdim=True), v.square().sum(1, keepdim=True)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1, divisor)
