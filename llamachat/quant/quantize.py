"""int8 and int4 in torch: floats to codes, with a search for the scale of each group.

What the native kernels do (kernels/native/quantize.h), for where they are not to be had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamachat.quant.form import CODEBOOK, Form
from llamachat.quant.tensor import QTensor

TOP = 127.0  # the largest code of 8 bits
REFINEMENTS = 3
CHUNK = 2**22  # values that are searched at once


def quantize(weight: Tensor, form: Form) -> QTensor:
    """Codes and scales of an (O, I) matrix of finite floats.

    For each group, inverse scales around the one that makes its largest value an outer level are
    tried. Codes of each have one best scale, by least squares (sum x v / sum v^2, of levels v);
    the best pair is refined and rounded to float16. The result never errs more than the scale
    that the search began with.

    Args:
        weight: I a multiple of the form's group size.
        form: int8 or int4.
    """
    out, columns = weight.shape
    codebook = torch.tensor(CODEBOOK, dtype=torch.float32) if form.bits == 4 else None
    levels = _Levels(codebook)
    groups = weight.float().reshape(-1, form.group_size)  # (O G, group)
    n = CHUNK // form.group_size
    chunks = [groups[i : i + n] for i in range(0, len(groups), n)]
    scales = [_scales(chunk, levels) for chunk in chunks]
    pairs = zip(chunks, scales, strict=True)
    codes = torch.cat([levels.codes(x / _or_one(scale)) for x, scale in pairs]).view(out, columns)
    if codebook is not None:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return QTensor(
        codes=codes,
        scales=torch.cat(scales).view(out, -1).half(),
        bits=8 if codebook is None else 4,
        group_size=form.group_size,
        codebook=codebook,
    )


class _Levels:
    """The multiples of a scale that codes stand for: 16 of a codebook, or integers up to 127."""

    def __init__(self, codebook: Tensor | None) -> None:
        self._codebook = codebook
        self._bounds = None if codebook is None else (codebook[:-1] + codebook[1:]) / 2
        self.outer = (TOP,) if codebook is None else (float(codebook[0]), float(codebook[-1]))
        steps = torch.arange(-30, 1) * 0.002 if codebook is None else torch.arange(-12, 9) * 0.02
        self.factors: list[float] = (1 + steps).tolist()

    def codes(self, z: Tensor) -> Tensor:
        """The codes whose levels are nearest to z, int8 or uint8."""
        if self._bounds is None:
            return z.round().clamp(-TOP, TOP).to(torch.int8)
        return torch.bucketize(z, self._bounds, right=True, out_int32=True).to(torch.uint8)

    def nearest(self, z: Tensor) -> Tensor:
        """The levels themselves."""
        codes = self.codes(z)
        return codes.float() if self._codebook is None else self._codebook[codes.long()]


def _scales(x: Tensor, levels: _Levels) -> Tensor:
    """The best scale of each group: x (N, group) -> (N, 1), float32 values that float16 has."""
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    first = (largest / levels.outer[0]).half().float()
    best, score = torch.zeros_like(largest), torch.zeros_like(largest)
    for outer in levels.outer:
        for factor in levels.factors:
            product, square = _sums(x, levels.nearest(x * (outer / _or_one(largest) * factor)))
            found = product.square() / _or_one(square)
            best = torch.where(found > score, product / _or_one(square), best)
            score = torch.maximum(found, score)
    kept, least = first, _error(x, first, levels)
    for _ in range(REFINEMENTS):
        scale = best.half().float()
        error = _error(x, scale, levels)
        kept, least = torch.where(error < least, scale, kept), torch.minimum(error, least)
        product, square = _sums(x, levels.nearest(x / _or_one(scale)))
        best = product / _or_one(square)
    return torch.where(first == 0, 0, kept)


def _sums(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (x * v).sum(1, keepdim=True), v.square().sum(1, keepdim=True)


def _error(x: Tensor, scale: Tensor, levels: _Levels) -> Tensor:
    """The sum of squared errors of each group."""
    v = levels.nearest(x / _or_one(scale))
    return (x - scale * v).square().sum(1, keepdim=True)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1, divisor)
