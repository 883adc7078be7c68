"""One tensor in one file, as a header describes it before anything of it is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llamachat.checkpoints.names import Shape
from llamachat.errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' words: torch's


class Stored(Protocol):
    """A tensor that can be read; knowing of it costs no torch."""

    @property
    def path(self) -> Path:
        """The file that it is in."""
        ...

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> str:
        """In safetensors' words: "F32", "BF16"..."""
        ...

    def read(self) -> Tensor:
        """The values, contiguous."""
        ...


def check_floats(stored: Mapping[str, Stored], names: Iterable[str]) -> None:
    """Refuse what no weight is made of.

    Raises:
        DamagedFileError: one of `names` has values of another type.
    """
    for name in names:
        if (dtype := stored[name].dtype) not in FLOATS:
            raise DamagedFileError(f"{name}: type {dtype}, expected {', '.join(FLOATS)}")


def commonest_type(stored: Iterable[Stored]) -> str:
    """The type of most values: "BF16"..."""
    n_values: Counter[str] = Counter()
    for tensor in stored:
        n_values[tensor.dtype] += math.prod(tensor.shape)
    return max(n_values, key=n_values.__getitem__, default="no weights")
