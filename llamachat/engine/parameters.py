"""The numbers that decoding takes: what switches each of them off, and its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llamachat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number.

    Attributes:
        kind: of number.
        off: the value that changes nothing.
        expected: the range, for people.
        valid: whether a value is in it.
    """

    kind: type[int] | type[float]
    off: float
    expected: str
    valid: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


_MASS = Parameter(float, 1.0, "above 0, at most 1", lambda p: 0 < p <= 1)
_SHARE = Parameter(float, 0.0, "from 0 to 1", lambda p: 0 <= p <= 1)
_CUTOFF = Parameter(float, 0.0, "0 or more, below 1", lambda p: 0 <= p < 1)
_COUNT = Parameter(int, 0, "a whole number, 0 or more", _is_count)
_ADDED = Parameter(float, 0.0, "a finite number", math.isfinite)

FILTERS: Mapping[str, Parameter] = {  # in the order of transformers (and of Meta)
    "temperature": Parameter(
        float, 1.0, "0, or 1e-6 or more", lambda t: t == 0 or 1e-6 <= t < math.inf  # float32 logits
    ),
    "top_k": _COUNT,
    "top_p": _MASS,
    "min_p": _SHARE,
    "typical_p": _MASS,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
}  # fmt: skip
PENALTIES: Mapping[str, Parameter] = {
    "repetition_penalty": Parameter(float, 1.0, "above 0", lambda r: 0 < r < math.inf),
    "frequency_penalty": _ADDED,
    "presence_penalty": _ADDED,
    "no_repeat_ngram_size": _COUNT,
}
PARAMETERS: Mapping[str, Parameter] = {**FILTERS, **PENALTIES}

ORDERS: Mapping[str, tuple[str, ...]] = {
    "hf": tuple(FILTERS),
    "llama.cpp": ("top_k", "typical_p", "top_p", "min_p", "temperature"),  # of 2025-02
}


def check(values: Any, names: Mapping[str, Parameter]) -> None:
    """Refuse an attribute of `values` that is out of its range.

    Raises:
        UsageError: it says which.
    """
    for name, parameter in names.items():
        value = getattr(values, name)
        if not parameter.valid(value):
            raise UsageError(f"{name} is {value}, expected {parameter.expected}")


def check_order(samplers: tuple[str, ...]) -> None:
    """Refuse an order that is empty, or that names something unknown or twice.

    Raises:
        UsageError: it lists what can be named.
    """
    known = f"any of {', '.join(FILTERS)}; or a whole order: {', '.join(ORDERS)}"
    if not samplers:
        raise UsageError("samplers: nothing is named", hint=known)
    for name in samplers:
        if name not in FILTERS:
            raise UsageError(f"samplers: {name!r} is unknown", hint=known)
        if samplers.count(name) > 1:
            raise UsageError(f"samplers: {name} is named twice")
