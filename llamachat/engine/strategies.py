"""Greedy and sampling: options that start the state of one reply. The options are torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from llamachat.engine.decoding import Choice, Commit, Start
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Greedy:
    """Always the most probable token; ties go to the lowest id."""

    width: ClassVar[int] = 1

    @property
    def seed(self) -> int | None:
        """Nothing is drawn."""
        return None

    def seeded(self, seed: int) -> Greedy:
        """Nothing is drawn."""
        return self

    def start(self, start: Start) -> Single:
        """The state of a new reply."""
        return Single(start)


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw from what temperature, top-k, top-p and min-p leave, in that order.

    Off values: temperature 1, top_k 0, top_p 1, min_p 0. Temperature 0 is greedy. Without a seed
    one is drawn for each reply.

    Raises:
        UsageError: a value is out of its range.
    """

    width: ClassVar[int] = 1

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,  # float32 logits
                "0, or 1e-6 or more",
            ),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")

    def seeded(self, seed: int) -> Sample:
        """The same with this seed, unless it has one."""
        return self if self.seed is not None else replace(self, seed=seed)

    def start(self, start: Start) -> Single:
        """The state of a new reply."""
        return Sampled(start, self) if self.temperature > 0 else Single(start)

    def filter(self, logits: Tensor) -> Tensor:
        """What is left to draw from: (B, V)."""
        from llamachat.engine import filters

        logits = filters.temperature(logits, self.temperature)
        logits = filters.top_k(logits, self.top_k)
        logits = filters.top_p(logits, self.top_p)
        return filters.min_p(logits, self.min_p)


class Single:
    """One reply in one row, the best token at each step."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._ids: list[int] = []

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """(B, V) float32 -> (B,)."""
        return Choice(logits.argmax(-1))

    def accept(self, choice: Choice) -> Commit:
        """Commit the token at once, unless it is a stop id."""
        token = int(choice.tokens[0])
        if token in self._start.stop_ids:
            return Commit((), done=True, finish_reason="stop")
        self._ids.append(token)
        if self._start.ends is not None and self._start.ends(self._ids):
            return Commit((token,), done=True, finish_reason="stop")
        if len(self._ids) >= self._start.max_new_tokens:
            return Commit((token,), done=True, finish_reason="length")
        return Commit((token,), done=False)

    def finish(self) -> Commit:
        """Nothing was held back."""
        return Commit((), done=True, finish_reason="length")


class Sampled(Single):
    """One reply in one row, drawn."""

    def __init__(self, start: Start, options: Sample) -> None:
        from llamachat.engine.random import uniforms

        super().__init__(start)
        self._options = options
        self._uniforms = uniforms(start.key, start.max_new_tokens, start.device)

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """(B, V) float32 -> (B,)."""
        from llamachat.engine import filters

        return Choice(filters.draw(self._options.filter(logits), self._uniforms[step]))
