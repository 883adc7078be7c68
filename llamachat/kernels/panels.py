"""From logical weights to the panels that native kernels read (native/abi.h has the layout)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from llamachat.kernels import abi
from llamachat.quant.tensor import QTensor

ROWS, BLOCK = 16, 32
LARGEST_SCALE = 14  # float16 ends at 2^16: what is kept of float32 scales lies below 2^14


class Memory(Protocol):
    """Where panels are put."""

    def take(self, n_bytes: int) -> Tensor:
        """(n_bytes,) uint8, aligned to a cache line."""
        ...

    def fill(self, rows: Tensor, struct: abi.Panels) -> None:
        """Put rows of codes or values into the panels that the structure describes."""
        ...


@dataclass(frozen=True, slots=True)
class Panels:
    """One part of a weight; `struct` points into the tensors.

    Attributes:
        struct: for the library.
        codes: uint8, as abi.h has them.
        scales: float16 (panels, G, 16), or None for floats.
        mins: like `scales`, or None.
    """

    struct: abi.Panels
    codes: Tensor
    scales: Tensor | None
    mins: Tensor | None

    @property
    def n_bytes(self) -> int:
        """What a product reads."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.mins) if t is not None)


def pack(part: Tensor | QTensor, memory: Memory) -> Panels:
    """Panels of an (O, I) matrix.

    Scales that are not float16 are rounded to it, relative to a power of two that is common to
    all; a codebook is rounded to 8 bits. A group that is no multiple of 32 columns is divided into
    groups of 16. Where even that is not possible, or where no form has such levels, values are kept
    as float32.
    """
    if isinstance(part, QTensor) and not (divides(part) and has_levels(part)):
        part = part.dequantize()
    if not isinstance(part, QTensor):
        return _floats(part, memory)
    group, scales, mins = regrouped(part)
    book, factor = book_of(part.codebook)
    scales = scales.float() * factor if factor != 1 else scales
    unit = unit_of(scales, mins)
    rows, cols = part.shape
    n_panels, n_blocks = -(-rows // ROWS), -(-cols // BLOCK)
    codes = memory.take(n_panels * n_blocks * BLOCK * ROWS * part.bits // 8)
    panels = _panels(
        "q4" if part.bits == 4 else "q8",
        (rows, cols),
        codes,
        _kept(_by_panel(scales, unit, group, cols), memory),
        None if mins is None else _kept(_by_panel(mins, unit, group, cols), memory),
        group=group,
        unit=unit * part.factor,
        book=book,
        shift=step_of(part.shifts),
    )
    memory.fill(part.codes.contiguous(), panels.struct)
    return panels


def _panels(
    form: str,
    shape: tuple[int, int],
    codes: Tensor,
    scales: Tensor | None = None,
    mins: Tensor | None = None,
    *,
    group: int = 0,
    unit: float = 1.0,
    book: list[int] | None = None,
    shift: int = 0,
) -> Panels:
    struct = abi.Panels(
        codes=codes.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        mins=None if mins is None else mins.data_ptr(),
        rows=shape[0],
        cols=shape[1],
        form=abi.FORMS[form],
        group=group,
        has_book=book is not None,
        shift=shift,
        unit=unit,
    )
    if book is not None:
        struct.book[:] = book
    return Panels(struct, codes, scales, mins)


def _floats(values: Tensor, memory: Memory) -> Panels:
    form = str(values.dtype).removeprefix("torch.")
    rows, cols = values.shape
    n_values = -(-rows // ROWS) * ROWS * cols
    codes = memory.take(n_values * values.element_size())
    panels = _panels(form, (rows, cols), codes)
    memory.fill(values.contiguous(), panels.struct)
    return panels


def divides(part: QTensor) -> bool:
    """Whether its groups can be cut into groups of 16 columns."""
    return part.group_size % 16 == 0 or part.scales.shape[1] == 1


def has_levels(part: QTensor) -> bool:
    """A codebook and minima do not go together; shifts are whole steps, as the codebook is."""
    if part.shifts is None:
        return part.codebook is None or part.mins is None
    steps = torch.arange(-8, 8) * step_of(part.shifts)
    return torch.equal(part.shifts, steps.float()) and book_of(part.codebook)[1] == 1


def step_of(shifts: Tensor | None) -> int:
    """From one shift to the next; 0 for none."""
    return 0 if shifts is None else int(shifts[9].clamp(0, 127))


def regrouped(part: QTensor) -> tuple[int, Tensor, Tensor | None]:
    """The group and scales and mins (O, G): 16, or a multiple of 32 columns."""
    group, scales, mins = part.group_size, part.scales, part.mins
    if scales.shape[1] == 1:  # of a whole row, whose end is padded with zeros
        return -(-group // BLOCK) * BLOCK, scales, mins
    if group % BLOCK == 0 or group == 16:
        return group, scales, mins
    times = group // 16
    repeated = None if mins is None else mins.repeat_interleave(times, 1)
    return 16, scales.repeat_interleave(times, 1), repeated


def book_of(codebook: Tensor | None) -> tuple[list[int] | None, float]:
    """The codebook at 8 bits, and what scales are multiplied with for it."""
    if codebook is None:
        return None, 1.0
    most = float(codebook.abs().max())
    if most <= 127 and torch.equal(codebook, codebook.round()):
        return [int(v) for v in codebook.tolist()], 1.0
    return [int(v) for v in (codebook * (127 / most)).round().tolist()], most / 127


def unit_of(scales: Tensor, mins: Tensor | None) -> float:
    """A power of two that float16 scales are relative to; 1 if they are float16 already."""
    kept = [scales] if mins is None else [scales, mins]
    if all(t.dtype == torch.float16 for t in kept):
        return 1.0
    most = max(float(t.float().abs().max()) for t in kept)
    if not 0 < most < torch.inf:
        return 1.0
    exponent = int(torch.frexp(torch.tensor(most)).exponent)  # most <= 2^exponent
    return float(2.0 ** max(exponent - LARGEST_SCALE, -120))


def _by_panel(scales: Tensor, unit: float, group: int, cols: int) -> Tensor:
    """(O, G) -> (panels, G, 16) float16, zeros in rows and groups that are only padding."""
    n_groups = 2 * -(-cols // BLOCK) if group == 16 else scales.shape[1]
    if unit != 1:
        scales = scales.float() / unit
    scales = pad(scales.half(), (0, n_groups - scales.shape[1], 0, -scales.shape[0] % ROWS))
    return scales.view(-1, ROWS, n_groups).transpose(1, 2).contiguous()


def _kept(scales: Tensor, memory: Memory) -> Tensor:
    """The same in memory that weights are kept in."""
    return memory.take(scales.nbytes).view(scales.dtype).view(scales.shape).copy_(scales)
