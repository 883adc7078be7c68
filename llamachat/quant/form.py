"""What a float weight can be turned into: names, group sizes and bits. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FormName = Literal["int8", "int4", "nf4", "fp4", "llm-int8"]
FORM_NAMES: tuple[FormName, ...] = get_args(FormName)
BITSANDBYTES = ("nf4", "fp4", "llm-int8")  # quantized by that library, in its own groups
GROUP_SIZES = (32, 64, 128)  # of int8 and int4, that users may choose
SMALLEST_GROUP, LARGEST_GROUP = 16, 256

# Levels of int4, times the group's scale. Lloyd's algorithm (S. Lloyd, Least squares quantization
# in PCM, 1982) found them for groups of 32 Gaussian values under a search for the scale alone, from
# those of IQ4_NL; they are rounded to 8 bits.
CODEBOOK = (-127, -102, -82, -65, -49, -35, -22, -10, 1, 13, 25, 38, 52, 68, 86, 110)

# A group's levels need not lie around zero: a multiple of SHIFT is added to all of them, which the
# four lowest bits of the group's float16 scale say. The seven that are left round a scale by 0.4 %
# at most; codes of 4 bits err by 7 %.
SHIFT = 4
SHIFTS = tuple(SHIFT * n for n in range(-8, 8))


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight is stored.

    Attributes:
        name: "int8" and "int4" are ours: float16 scales, at 4 bits `CODEBOOK` and `SHIFTS`. The
            others are bitsandbytes' own.
        group_size: columns that share a scale, of int8 and int4: a multiple of 16 up to 256 that
            divides them. nf4 and fp4 have blocks of 64 over the flattened matrix, llm-int8 one
            scale a row.
        nested: of nf4 and fp4: scales are at 8 bits, too ("double quantization").
    """

    name: FormName
    group_size: int = 32
    nested: bool = False

    @property
    def bits(self) -> int:
        """Of one code: 4 or 8."""
        return 8 if self.name in ("int8", "llm-int8") else 4

    @property
    def bits_per_weight(self) -> float:
        """With scales: float16, or of bitsandbytes at most float32 of 64 values."""
        return self.bits + (32 / 64 if self.name in BITSANDBYTES else 16 / self.group_size)
