"""What `bench` is asked to measure. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Literal

from llamachat.errors import UsageError

_COUNT = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of work, by the names of llama-bench.

    Attributes:
        kind: "pp", a prompt of `n` tokens that is read at once; "tg", `n` tokens one by one.
        n: tokens that are timed.
        depth: tokens of context before them that are not.
    """

    kind: Literal["pp", "tg"]
    n: int
    depth: int = 0

    @property
    def name(self) -> str:
        """For example "pp512" or "tg128@d2048"."""
        return f"{self.kind}{self.n}" + (f"@d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Setup:
    """A model as it is loaded for some tests; `threads` None is the default of `load`."""

    model: str
    quantize: str
    threads: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Every load, in one place, the tests after each, and how often a test is repeated."""

    setups: tuple[Setup, ...]
    tests: tuple[Workload, ...]
    repetitions: int
    device: str = "auto"
    tensor_parallel: int = 1

    @property
    def models(self) -> tuple[str, ...]:
        """Each one once."""
        return tuple(dict.fromkeys(setup.model for setup in self.setups))

    @property
    def ctx_size(self) -> int:
        """Tokens of context that the largest test fills."""
        return max(test.depth + test.n for test in self.tests)


def plan(
    models: str,
    *,
    quantize: str = "auto",
    threads: str | None = None,
    n_prompt: str = "512",
    n_gen: str = "128",
    depth: str = "0",
    repetitions: int = 5,
    device: str = "auto",
    tensor_parallel: int = 1,
) -> Plan:
    """Every combination of values that are lists by commas, as on the command line.

    Raises:
        UsageError: a list has no or no valid values, or there is nothing to measure.
    """
    if repetitions < 1:
        raise UsageError(f"--repetitions is {repetitions}, expected 1 or more")
    counts = None if threads is None else _numbers("--threads", threads, least=1)
    setups = product(_values("--model", models), _values("--quantize", quantize), counts or (None,))
    prompts, replies = _numbers("--n-prompt", n_prompt), _numbers("--n-gen", n_gen)
    tests = tuple(
        test
        for held in _numbers("--depth", depth)
        for test in (
            *(Workload("pp", n, held) for n in prompts if n),
            *(Workload("tg", n, held) for n in replies if n),
        )
    )
    if not tests:
        raise UsageError("--n-prompt and --n-gen are both 0: there is nothing to measure")
    loads = tuple(Setup(*values) for values in setups)
    return Plan(loads, tests, repetitions, device, tensor_parallel)


def _values(flag: str, text: str) -> tuple[str, ...]:
    values = tuple(value.strip() for value in text.split(","))
    if not all(values):
        raise UsageError(f"{flag} is {text!r}, expected values with commas between")
    return values


def _numbers(flag: str, text: str, *, least: int = 0) -> tuple[int, ...]:
    values = _values(flag, text)
    if not all(_COUNT.fullmatch(v) and int(v) >= least for v in values):
        raise UsageError(f"{flag} is {text!r}, expected numbers from {least} with commas between")
    return tuple(int(value) for value in values)
