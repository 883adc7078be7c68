"""From logical weights to what the kernels read (weights.cuh has the layout)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llamachat.kernels.cuda import structures
from llamachat.kernels.panels import book_of, divides, has_levels, regrouped, step_of, unit_of
from llamachat.quant.tensor import QTensor

BLOCK, UNIT_BYTES = 32, 16
MIN, FINE = 8, 16  # flags of a form
PLAIN4, BOOK4, PLAIN8 = range(3)  # its kinds
FLOATS = {torch.float16: 3, torch.bfloat16: 4, torch.float32: 5}
WHOLE_ROW = 30  # a shift: one group
Place = Callable[[Tensor], Tensor]  # to the GPU


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a weight in one form; `struct` points into the tensors.

    Attributes:
        struct: for the kernels.
        codes: (O, bytes) uint8, or floats (O, I padded to 32 columns).
        scales: float16 (O, G), or None for floats.
        mins: like `scales`, or None.
        shape: (O, I).
    """

    struct: structures.Part
    codes: Tensor
    scales: Tensor | None
    mins: Tensor | None
    shape: tuple[int, int]

    @property
    def form(self) -> int:
        """Its kind and flags."""
        return int(self.struct.form)

    @property
    def n_bytes(self) -> int:
        """What a product reads."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.mins) if t is not None)


@dataclass(frozen=True, slots=True)
class Packed:
    """Parts stacked along O, and a bias (O,) float32 or None."""

    parts: tuple[Part, ...]
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def n_bytes(self) -> int:
        """What a product reads."""
        return sum(part.n_bytes for part in self.parts) + (
            0 if self.bias is None else self.bias.nbytes
        )


def pack(parts: Sequence[Tensor | QTensor], bias: Tensor | None, place: Place) -> Packed:
    """Bring parts to the GPU, each in the form it came in.

    What is rounded is said in panels.py: the forms are the same.
    """
    packed = tuple(_part(part, place) for part in parts)
    first = 0
    for part in packed:
        part.struct.first = first
        first += -(-part.shape[0] // BLOCK)
    shape = sum(part.shape[0] for part in packed), packed[0].shape[1]
    return Packed(packed, None if bias is None else place(bias).float(), shape)


def _part(part: Tensor | QTensor, place: Place) -> Part:
    if isinstance(part, QTensor):
        part = _moved(part, place)
    if isinstance(part, QTensor) and not (divides(part) and has_levels(part)):
        part = part.dequantize()
    if not isinstance(part, QTensor):
        return _floats(place(part))
    group, scales, mins = regrouped(part)
    book, factor = book_of(part.codebook)
    scales = scales.float() * factor if factor != 1 else scales
    unit = unit_of(scales, mins)
    shift, scales, mins = _grouped(group, scales, mins, part.shape[1])
    order = None if book is None else sorted(range(16), key=book.__getitem__)
    codes = _codes(part, order)
    kept = _half(scales, unit)
    kept_mins = None if mins is None else _half(mins, unit)
    kind = PLAIN8 if part.bits == 8 else PLAIN4 if book is None else BOOK4
    form = kind | (0 if mins is None else MIN) | (FINE if group == 16 else 0)
    struct = structures.Part(
        codes=codes.data_ptr(),
        scales=kept.data_ptr(),
        mins=None if kept_mins is None else kept_mins.data_ptr(),
        stride=codes.stride(0),
        unit=unit * part.factor,
        rows=part.shape[0],
        units=codes.shape[1] // UNIT_BYTES,
        groups=kept.shape[1],
        shift=shift,
        step=step_of(part.shifts),
        form=form,
    )
    if book is not None and order is not None:
        pairs = [book[i] for i in order[::2]], [book[i] for i in order[1::2]]
        struct.book[:] = [*pairs[0], *pairs[1]]
        struct.summands[:] = [
            v for values in zip(*map(_summands, *pairs), strict=True) for v in values
        ]
    return Part(struct, codes, kept, kept_mins, part.shape)


def _floats(values: Tensor) -> Part:
    values = values if values.dtype in FLOATS else values.float()
    rows, cols = values.shape
    padded = _padded(values, BLOCK)
    stride = padded.stride(0) * padded.element_size()
    struct = structures.Part(
        codes=padded.data_ptr(),
        stride=stride,
        unit=1.0,
        rows=rows,
        units=stride // UNIT_BYTES,
        form=FLOATS[values.dtype],
    )
    return Part(struct, padded, None, None, (rows, cols))


def _moved(part: QTensor, place: Place) -> QTensor:
    """Codes and their scales on the GPU, what all groups share on the host."""
    mins, book, shifts = part.mins, part.codebook, part.shifts
    return replace(
        part,
        codes=place(part.codes),
        scales=place(part.scales),
        mins=None if mins is None else place(mins),
        codebook=None if book is None else book.cpu(),
        shifts=None if shifts is None else shifts.cpu(),
    )


def _grouped(
    group: int, scales: Tensor, mins: Tensor | None, cols: int
) -> tuple[int, Tensor, Tensor | None]:
    """Scales and mins of groups of 16, or of 32 << shift columns, as many as blocks need."""
    if scales.shape[1] == 1 and group != 16:
        return WHOLE_ROW, scales, mins
    if group == 16:
        shift, times = 0, 1
        n_groups = 2 * -(-cols // BLOCK)
    else:
        blocks = group // BLOCK
        is_power = blocks & (blocks - 1) == 0
        shift, times = (int(math.log2(blocks)), 1) if is_power else (0, blocks)
        n_groups = scales.shape[1] * times

    def widened(values: Tensor) -> Tensor:
        many = values.repeat_interleave(times, 1)
        return pad(many, (0, n_groups - many.shape[1]))

    return shift, widened(scales), None if mins is None else widened(mins)


def _half(values: Tensor, unit: float) -> Tensor:
    return (values if unit == 1 else values.float() / unit).half().contiguous()


def _summands(even: int, odd: int) -> tuple[int, int]:
    """(a, b) with a + sign(b) = even and sign(a) + b = odd; sign is 0 or -1.

    Neighbours in a sorted codebook are of one sign, or small: nothing exceeds 8 bits.
    """
    for sign in (0, -1):
        first = even - sign
        second = odd - (-1 if first < 0 else 0)
        if (second < 0) == (sign < 0):
            return first, second
    raise AssertionError(f"{even} and {odd} have no summands")


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Rows of so many columns more that they are a multiple; not copied where they are."""
    missing = -rows.shape[1] % multiple
    return pad(rows, (0, missing)) if missing else rows.contiguous()


def _codes(part: QTensor, order: Sequence[int] | None) -> Tensor:
    """(O, bytes): padded to 32 columns, nibbles in the order that weights.cuh has.

    Args:
        part: codes of 4 or 8 bits.
        order: of a codebook's entries by size, of which the even ones come first.
    """
    codes = part.codes.view(torch.uint8)
    if part.bits == 8:
        codes = codes ^ 0x80 if part.mins is not None else codes  # code - 128
        return _padded(codes, BLOCK)
    codes = _padded(codes, UNIT_BYTES)
    if order is not None:
        if list(order) != list(range(16)):
            rank = torch.tensor([order.index(code) for code in range(16)], dtype=torch.uint8)
            both = (rank.view(1, 16) | rank.view(16, 1) << 4).flatten().to(codes.device)
            codes = both[codes.int()]
        return (codes & 0xEE) >> 1 | (codes & 0x11) << 3
    four = codes.view(len(codes), -1, 4)
    nibbles = torch.stack((four & 15, four >> 4), dim=-1).flatten(2)  # (O, words, 8), in order
    return (nibbles[..., :4] | nibbles[..., 4:] << 4).reshape(codes.shape).contiguous()
