"""What a float weight can be turned into: names, group sizes and bits. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FormName = Literal["int8", "int4", "nf4", "fp4", "llm-int8"]
FORM_NAMES: tuple[FormName, ...] = get_args(FormName)
GROUP_SIZES = (32, 64, 128)  # that users may choose
BITSANDBYTES = ("nf4", "fp4", "llm-int8")  # quantized by that library, in its own groups


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight is stored.

    Attributes:
        name: "int8" and "int4" are ours: symmetric, float16 scales, at 4 bits a codebook. The
            others are bitsandbytes' own.
        group_size: columns that share a scale, of int8 and int4; nf4 and fp4 have blocks of 64 over
            the flattened matrix, llm-int8 one scale a row.
        nested: of nf4 and fp4: scales are at 8 bits, too ("double quantization").
    """

    name: FormName
    group_size: int = 32
    nested: bool = False

    @property
    def bits(self) -> int:
        """Of one code: 4 or 8."""
        return 8 if self.name in ("int8", "llm-int8") else 4
