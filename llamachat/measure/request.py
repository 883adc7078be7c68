"""What `eval` is asked to measure, and what is required of it. Torch-free."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamachat.errors import CheckFailedError, UsageError

# What can be required, and where a result has it.
_ALONE = {
    "perplexity": ("perplexity",),
    "stderr": ("stderr",),
    "bits_per_weight": ("bits_per_weight",),
    "size_bytes": ("size_bytes",),
}
_AGAINST = {
    "kl": ("kl", "mean"),
    "kl.mean": ("kl", "mean"),
    "kl.stderr": ("kl", "stderr"),
    "kl.median": ("kl", "median"),
    "kl.p99": ("kl", "p99"),
    "kl.max": ("kl", "max"),
    "rms_dp_percent": ("rms_dp_percent",),
    "top1": ("top1_agreement",),
    "perplexity_ratio": ("perplexity_ratio", "value"),
}
_FIGURES = _ALONE | _AGAINST
_RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_REQUIREMENT = re.compile(r"\s*([\w.]+)\s*([<>]=?)\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Requirement:
    """A bound on one figure, such as kl < 0.01."""

    figure: str
    relation: str
    bound: float

    @property
    def is_relative(self) -> bool:
        """Whether the figure is one of a comparison."""
        return self.figure in _AGAINST

    def missed_by(self, result: Mapping[str, Any]) -> str | None:
        """What was found instead, or None where the requirement holds."""
        found: Any = result
        for key in _FIGURES[self.figure]:
            found = found[key]
        if found is not None and _RELATIONS[self.relation](found, self.bound):
            return None
        shown = "unknown" if found is None else f"{found:.6g}"
        return f"{self.figure} is {shown}, required {self.relation} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Attributes:
        model: an alias, org/name, or a path.
        against: the reference, named the same way, or "none" for the model's own file; it runs
            unpacked to float32 in plain torch. None for no reference.
        ctx_size: tokens of a window.
        chunks: at most so many windows; None for all that the text has.
        quantize: this and the next five as for `load`, of the model.
        required: of the result.
        force: load what is forecast not to fit in memory, too.

    Raises:
        UsageError: a requirement needs a reference, and there is none.
    """

    model: str
    against: str | None = None
    ctx_size: int = 512
    chunks: int | None = None
    quantize: str = "auto"
    kv_cache: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    tensor_parallel: int = 1
    required: tuple[Requirement, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        if self.against is None and (of := [it.figure for it in self.required if it.is_relative]):
            raise UsageError(
                f"--require {of[0]} needs --against",
                hint="--against none compares with the model's own weights, unpacked",
            )

    @property
    def reference(self) -> str | None:
        """The name of the reference."""
        return self.model if self.against == "none" else self.against

    def check(self, result: Mapping[str, Any]) -> None:
        """Hold a result against what is required.

        Raises:
            CheckFailedError: some of it is missed; each is named with both numbers.
        """
        if missed := [miss for it in self.required if (miss := it.missed_by(result))]:
            raise CheckFailedError("; ".join(missed))


def requirement(text: str) -> Requirement:
    """A requirement as people write it: "kl<0.01".

    Raises:
        UsageError: it is none, or of no figure that is known.
    """
    match = _REQUIREMENT.fullmatch(text)
    try:
        figure, relation, bound = match.groups() if match else ("", "", "")
        parsed = Requirement(figure, relation, float(bound))
    except ValueError:
        raise UsageError(f"--require is {text!r}, expected such as 'kl<0.01'") from None
    if figure not in _FIGURES:
        raise UsageError(f"--require knows no {figure!r}", hint=f"known: {', '.join(_FIGURES)}")
    return parsed
