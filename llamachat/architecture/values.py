"""Values of foreign configs: read and checked, or shown in messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from llamachat.errors import DamagedFileError

Number = TypeVar("Number", int, float)


def brief(value: object) -> str:
    """A value from a foreign file, whatever it is, on one short line."""
    return " ".join(reprlib.repr(value).split())


def number(
    values: Mapping[str, Any], key: str, kind: type[Number], default: Number | None = None
) -> Number:
    """A positive number.

    Args:
        values: the config.
        key: its name there.
        kind: a whole one, at most 2**31 - 1, or any.
        default: what a missing one means; None: it must be there.

    Raises:
        DamagedFileError: it is missing, or something else.
    """
    value = values.get(key)
    if value is None:
        value = default
    expected, largest = (
        ("a whole number from 1 to 2147483647", 2**31 - 1)
        if kind is int
        else ("a positive number", 1e30)
    )
    if value is None:
        raise DamagedFileError(f"{key} is missing, expected {expected}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= largest or kind(value) != value:
        raise DamagedFileError(f"{key} is {brief(value)}, expected {expected}")
    return kind(value)


def flag(values: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """True or false; a missing one is the default.

    Raises:
        DamagedFileError: it is not.
    """
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DamagedFileError(f"{key} is {brief(value)}, expected true or false")
    return value


def table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; a missing one is empty.

    Raises:
        DamagedFileError: it is not.
    """
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DamagedFileError(f"{key} is {brief(value)}, expected an object")
    return value


def expect(values: Mapping[str, Any], key: str, expected: str) -> None:
    """See to it that a value is one name.

    Raises:
        DamagedFileError: it is not.
    """
    found = values.get(key)
    if not isinstance(found, str) or found != expected:
        raise DamagedFileError(f"{key} is {brief(found)}, expected {expected!r}")


def expect_bitsandbytes(quantization: Mapping[str, Any]) -> None:
    """See to it that what quantized the weights is bitsandbytes.

    Raises:
        DamagedFileError: it is not.
    """
    if quantization.get("quant_method") != "bitsandbytes":
        raise DamagedFileError(
            f"quantization_config is {brief(quantization)}, expected none or bitsandbytes's",
            hint="take the model's float or GGUF files, and --quantize",
        )
