"""Which tensors of a quantized folder make which weight, checked before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import Shape, iter_weights, shown
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import DamagedFileError

PARTS = ("codes", "scales", "mins", "codebook", "shifts")
ROPE_FREQS = "rope_freqs"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}

Kept = tuple[str, Shape]  # type and shape of a tensor in the file


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of the file: `bits` and `group_size` are None where it is not quantized."""

    name: str
    shape: Shape
    n_bytes: int
    bits: int | None = None
    group_size: int | None = None

    @property
    def n_values(self) -> int:
        """Of the matrix or vector."""
        return math.prod(self.shape)

    @property
    def bits_per_value(self) -> float:
        """All bytes count: scales and codebooks, too."""
        return self.n_bytes * 8 / self.n_values


def layouts(stored: Mapping[str, Kept], config: ModelConfig) -> tuple[StoredWeight, ...]:
    """Every weight that the config asks for, as the file has it, and nothing besides.

    Args:
        stored: the file's tensors, but for the one that is of the header.
        config: lazily compared: a damaged one may ask for two thousand million layers.

    Raises:
        DamagedFileError: a tensor is missing, unknown, or not what the config asks for.
    """
    unread = set(stored)
    weights = []
    shapes = ((weight.hf, weight.shape) for weight in iter_weights(config))
    for name, shape in shapes:
        weights.append(_layout(stored, name, shape))
        unread -= {name, *(f"{name}.{part}" for part in PARTS)}
    if ROPE_FREQS in unread:
        weights.append(_layout(stored, ROPE_FREQS, (config.rope_pairs,)))
        unread.remove(ROPE_FREQS)
    if unread:
        raise DamagedFileError(f"{shown(min(unread))}: the config says there is no such tensor")
    return tuple(weights)


def _layout(stored: Mapping[str, Kept], name: str, shape: Shape) -> StoredWeight:
    found = {part: stored[key] for part in PARTS if (key := f"{name}.{part}") in stored}
    if name in stored:
        dtype = stored[name][0] if stored[name][0] in FLOATS else "F32"
        expect(name, stored[name], (dtype, shape))
        for part in found:
            raise DamagedFileError(f"{name}.{part}: expected none beside {name}")
        return StoredWeight(name, shape, _n_bytes(stored[name]))
    if len(shape) != 2 or not {"codes", "scales"} <= found.keys():
        raise DamagedFileError(f"{name} is missing")
    out, columns = shape
    bits = 8 if found["codes"][1] == shape else 4
    groups = found["scales"][1][-1] if found["scales"][1] else 0
    if groups < 1 or columns % groups or (columns * bits) % 8:
        raise DamagedFileError(f"{name}.scales: {groups} a row of {columns} values")
    scales = (found["scales"][0] if found["scales"][0] == "F16" else "F32", (out, groups))
    expected = {
        "codes": ("U8" if bits == 4 or "mins" in found else "I8", (out, columns * bits // 8)),
        "scales": scales,
        "mins": scales,
        "codebook": ("F32", (16,)),
        "shifts": ("F32", (16,)),
    }
    if bits == 8 and "codebook" in found:
        raise DamagedFileError(f"{name}.codebook: expected none beside codes of 8 bits")
    if "shifts" in found and ("codebook" not in found or "mins" in found or scales[0] != "F16"):
        raise DamagedFileError(f"{name}.shifts: expected none but of a codebook and F16 scales")
    for part, kept in found.items():
        expect(f"{name}.{part}", kept, expected[part])
    n_bytes = sum(map(_n_bytes, found.values()))
    return StoredWeight(name, shape, n_bytes, bits, columns // groups)


def expect(name: str, found: Kept | None, expected: Kept) -> None:
    """Compare a tensor's type and shape.

    Raises:
        DamagedFileError: they are others, or it is not there.
    """
    if found != expected:
        raise DamagedFileError(f"{name}: {_text(found)}, expected {_text(expected)}")


def _text(kept: Kept | None) -> str:
    return f"{kept[0]} {' x '.join(map(str, kept[1]))}" if kept else "missing"


def _n_bytes(kept: Kept) -> int:
    return _ITEM_BYTES[kept[0]] * math.prod(kept[1])
