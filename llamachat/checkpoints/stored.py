"""One tensor in one file, as a header describes it before anything of it is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llamachat.checkpoints.names import Shape
from llamachat.errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

Place = Callable[["Tensor"], "Tensor"]  # brings what was read to where it is worked on: to a GPU
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


def as_read(tensor: Tensor) -> Tensor:
    """The place of what stays where it is."""
    return tensor


def check_floats(stored: Mapping[str, Stored], names: Iterable[str]) -> None:
    """Refuse what no weight is made of.

    Raises:
        DamagedFileError: one of `names` has values of another type.
    """
    for name in names:
        if (dtype := stored[name].dtype) not in FLOATS:
            raise DamagedFileError(f"{name}: type {dtype}, expected {', '.join(FLOATS)}")


def check_finite(name: str, tensor: Tensor | QTensor) -> None:
    """Refuse what no weight is: one such value makes all that comes after it meaningless.

    Reads floats once (14 GB/s on one core), of a quantized weight what its codes are scaled with.

    Raises:
        DamagedFileError: a value is infinite or not a number.
    """
    from torch import Tensor

    parts = (
        [tensor] if isinstance(tensor, Tensor) else [tensor.scales, tensor.mins, tensor.codebook]
    )
    for part in parts:
        if part is None or not part.numel():
            continue
        low, high = (float(value) for value in part.aminmax())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DamagedFileError(f"{name}: values from {low:g} to {high:g}, expected finite ones")


def commonest_type(stored: Iterable[Stored]) -> str:
    """The type of most values: "BF16"..."""
    n_values: Counter[str] = Counter()
    for tensor in stored:
        n_values[tensor.dtype] += math.prod(tensor.shape)
    return max(n_values, key=n_values.__getitem__, default="no weights")


def header_types(start: bytes, name: str) -> Mapping[str, str]:
    """The type of each tensor of a safetensors file, from its first bytes; empty if too few.

    Format: eight bytes with the length of a JSON object (github.com/huggingface/safetensors).

    Raises:
        DamagedFileError: they begin no such file.
    """
    n_bytes = int.from_bytes(start[:8], "little")
    if n_bytes > len(start) - 8:
        return {}
    try:
        tensors = json.loads(start[8 : 8 + n_bytes])
        return {key: str(it["dtype"]) for key, it in tensors.items() if key != "__metadata__"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{name}: its header is no JSON object of tensors") from error
