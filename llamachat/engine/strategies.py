"""Greedy and sampling: options that start the state of one reply. The options are torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from llamachat.engine import parameters
from llamachat.engine.decoding import Choice, Commit, Penalties, Start
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.engine.filters import Left


@dataclass(frozen=True, slots=True)
class Greedy(Penalties):
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
        return Single(start, self)


@dataclass(frozen=True, slots=True)
class Sample(Penalties):
    """Draw from what the filters leave, which run in the order of `samplers` after the penalties.

    Off values: temperature 1, top_k 0, top_p 1, min_p 0, typical_p 1, epsilon_cutoff 0,
    eta_cutoff 0. A filter that `samplers` leaves out does not run. Temperature 0 is greedy. Without
    a seed one is drawn for each reply.

    Raises:
        UsageError: a value is out of its range.
    """

    width: ClassVar[int] = 1

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    samplers: tuple[str, ...] = parameters.ORDERS["hf"]
    seed: int | None = None

    def __post_init__(self) -> None:
        Penalties.__post_init__(self)  # a class with slots has no super() here
        parameters.check(self, parameters.FILTERS)
        parameters.check_order(self.samplers)
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")

    @property
    def draws(self) -> bool:
        """Whether it is not greedy."""
        return self.temperature > 0 or "temperature" not in self.samplers

    def seeded(self, seed: int) -> Sample:
        """The same with this seed, unless it has one."""
        return self if self.seed is not None else replace(self, seed=seed)

    def start(self, start: Start) -> Single:
        """The state of a new reply."""
        return Sampled(start, self) if self.draws else Single(start, self)

    def left(self, logits: Tensor) -> Left:
        """What the filters leave of logits (B, V)."""
        from llamachat.engine.filters import FILTERS, Left

        left = Left(logits)
        for name in self.samplers:
            value = getattr(self, name)
            if value != parameters.FILTERS[name].off:
                left = FILTERS[name](left, value)
        return left


class Single:
    """One reply in one row, the best token at each step."""

    def __init__(self, start: Start, penalties: Penalties) -> None:
        self._start = start
        self._ids = list(start.begun)
        self._finish_reason = "length"
        self._history = History(start, penalties)

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """(B, V) float32 -> (B,)."""
        choice = self._chosen(self._history.process(logits), step)
        self._history.append(choice.tokens)
        return choice

    def _chosen(self, logits: Tensor, step: Tensor) -> Choice:
        logprobs = logits.log_softmax(-1) if self._start.logprobs else None
        return Choice(self._best(logits), logprobs=logprobs)

    def _best(self, logits: Tensor) -> Tensor:
        if self._start.best is not None:
            return self._start.best(logits)
        from llamachat.kernels.reference import best

        return best(logits)

    def accept(self, choice: Choice) -> Commit:
        """Commit the token at once, unless it is a stop id."""
        token = int(choice.tokens[0])
        if token in self._start.stop_ids:
            self._finish_reason = "stop"
            return Commit((), done=True, finish_reason="stop")
        self._ids.append(token)
        if self._start.ends is not None and self._start.ends(self._ids):
            self._finish_reason = "stop"
            return Commit((token,), done=True, finish_reason="stop")
        if len(self._ids) >= self._start.continued + self._start.max_new_tokens:
            return Commit((token,), done=True, finish_reason="length")
        return Commit((token,), done=False)

    def finish(self) -> Commit:
        """All that was accepted: nothing was held back."""
        return Commit(tuple(self._ids), done=True, finish_reason=self._finish_reason)


class Sampled(Single):
    """One reply in one row, drawn."""

    def __init__(self, start: Start, options: Sample) -> None:
        from llamachat.engine.random import uniforms

        super().__init__(start, options)
        self._options = options
        self._uniforms = uniforms(start.key, start.continued + start.max_new_tokens, start.device)

    def _chosen(self, logits: Tensor, step: Tensor) -> Choice:
        from llamachat.engine import filters

        left = self._options.left(logits)
        tokens = left.token(filters.draw(left.logits, self._uniforms[step]))
        if not self._start.logprobs:
            return Choice(tokens)
        return Choice(tokens, logprobs=left.dense(logits.shape[-1]).log_softmax(-1))


class History:
    """The ids of each row, prompt and reply, on the device, and what they do to logits."""

    def __init__(self, start: Start, penalties: Penalties) -> None:
        import torch

        from llamachat.engine.processors import Processors

        self._processors = Processors(penalties, start)
        self._ids = torch.tensor([start.prompt], dtype=torch.int64, device=start.device)

    def process(self, logits: Tensor) -> Tensor:
        """Logits (B, V) as the penalties leave them."""
        return self._processors.process(self._ids, logits)

    def append(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Take the tokens (B,) that were chosen, before the host knows them.

        Row i goes on from what row parents[i] was; without `parents` (B,) from its own.
        """
        import torch

        if not self._processors.is_off:
            ids = self._ids if parents is None else self._ids[parents]
            self._ids = torch.cat([ids, tokens.unsqueeze(-1)], dim=-1)
