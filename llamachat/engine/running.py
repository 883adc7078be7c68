"""One reply on its way: what its strategy chooses from logits, as events."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamachat.engine.arriving import Arriving, check_numbers
from llamachat.engine.decoding import Branch, Choice, Commit, Decoding, Start
from llamachat.engine.events import Done, Probabilities, Speculation, Tails, Token
from llamachat.engine.loops import LoopDetector
from llamachat.engine.probabilities import probabilities

E = TypeVar("E")


class Running:
    """One reply.

    Attributes:
        start: what it began with.
        is_over: whether it has come to its end.
        commit: what its last step settled.
    """

    def __init__(
        self,
        start: Start,
        decoding: Decoding,
        *,
        logprobs: int = 0,
        stop_loops: int = 0,
        scored: bool = False,
    ) -> None:
        """Begin.

        Args:
            start: see `Start`.
            decoding: how to choose.
            logprobs: with every token come its probabilities and those of so many alternatives.
            stop_loops: it is over once it repeats itself so many times; 0 for never.
            scored: with every token comes its log-probability, which several rows have, too.
        """
        self.start = start
        self.is_over = start.max_new_tokens <= 0
        self.commit = Commit((), done=False)
        self._strategy = decoding.start(start)
        self._loops = LoopDetector(stop_loops) if stop_loops else None
        self._looped = False
        self._logprobs = logprobs
        self._known: Probabilities | None = None
        self._scores = Scores() if scored else None
        self._n_chosen = 0
        self._n_given = start.continued
        self._arriving: Arriving | None = None
        device = torch.device(start.device)
        self._beside = None if device.type == "cpu" else torch.Stream(device)

    @property
    def left(self) -> int:
        """Steps that it may still take."""
        return self.start.max_new_tokens - self._n_chosen

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The rows of its next step, by those that it has; once it is over, one to keep."""
        if self.is_over:
            return (Branch(0),)
        return self.commit.rows or tuple(Branch(0, token) for token in self.commit.ids)

    @property
    def ids(self) -> list[int]:
        """The prompt, and the reply as it would end here."""
        said = self._strategy.finish().ids[self.start.continued :]
        return [*self.start.prompt, *said]

    @torch.inference_mode()  # without it 1.4 times slower: some fifty small operations
    def choose(self, logits: Tensor) -> Tensor | None:
        """Choose by logits (B, V) of its rows, without waiting for a GPU.

        Returns:
            The tokens (B,) that are run next, unless it is over; None: `accept` tells.
        """
        step = torch.tensor(self.start.continued + self._n_chosen)
        if logits.is_cpu:
            check_numbers(logits.amax())
        choice = self._strategy.choose(logits, step)
        self._arriving = Arriving(logits, choice, self._beside)
        return choice.tokens if choice.parents is None else None

    def accept(self) -> Iterator[Token | Tails]:
        """Take the step that was chosen.

        Raises:
            DamagedFileError: the logits are not numbers.
        """
        self.commit = commit = self._strategy.accept(self._arrived())
        self._n_chosen += 1
        yield from self._given(commit.ids)
        self._looped = not commit.done and any(map(self._loops_with, commit.ids))
        self.is_over = commit.done or self._looped or self.left <= 0
        if self._scores is not None and not self.is_over:
            self._scores.go_on(self.branches)
        if commit.tails and not self.is_over:
            yield Tails(commit.tails)

    @torch.inference_mode()
    def _arrived(self) -> Choice:
        assert self._arriving is not None
        choice, logits = self._arriving.choice, self._arriving.logits
        arrived = self._arriving.get()
        self._known = probabilities(logits, choice, self._logprobs)
        if self._scores is not None:
            self._scores.add(logits, choice)
        return arrived

    def rest(self) -> Iterator[Token]:
        """What it held back, if it ends here."""
        if not self._looped:
            yield from self._given(self._strategy.finish().ids[self._n_given :])

    def end(self, speculation: Speculation | None = None) -> Iterator[Token | Done]:
        """End it here, if it has not ended: what it held back, and why it ends."""
        self.is_over = True
        yield from self.rest()
        reason = "loop" if self._looped else self._strategy.finish().finish_reason
        yield Done(reason or "stop", speculation)

    def _given(self, ids: Sequence[int]) -> Iterator[Token]:
        for token in ids:
            self._n_given += 1
            scores = self._scores
            yield Token(token, self._known, None if scores is None else scores.give(token))

    def _loops_with(self, token: int) -> bool:
        return self._loops is not None and self._loops.add(token)


class Scores:
    """The model's own log-probabilities of all that was considered: what is given is among it."""

    def __init__(self) -> None:
        # A tree: the place of a beginning and the token after it -> their place, its logprob.
        self._after: dict[tuple[int, int], tuple[int, float]] = {}
        self._rows = [0]
        self._given = 0

    def add(self, logits: Tensor, choice: Choice) -> None:
        """The candidates of a step over logits (B, V)."""
        if choice.parents is None:
            rows = torch.arange(len(logits), device=logits.device)
        else:
            rows = choice.parents.clamp(max=len(logits) - 1)  # all begin with the prompt's row
        logprobs = logits[rows, choice.tokens] - logits.logsumexp(-1)[rows]
        found = zip(rows.tolist(), choice.tokens.tolist(), logprobs.tolist(), strict=True)
        for row, token, logprob in found:
            self._after.setdefault((self._rows[row], token), (len(self._after) + 1, logprob))

    def go_on(self, branches: Sequence[Branch]) -> None:
        """These are the rows now."""
        self._rows = [
            self._rows[branch.parent]
            if branch.token is None
            else self._after[self._rows[branch.parent], branch.token][0]
            for branch in branches
        ]

    def give(self, token: int) -> float:
        """The log-probability of the token that is given next."""
        self._given, logprob = self._after[self._given, token]
        return logprob


def indexed(index: int, events: Iterable[E]) -> Generator[tuple[int, E], None, Any]:
    """Each event with the index; returns what the events return."""
    iterator = iter(events)
    while True:
        try:
            event = next(iterator)
        except StopIteration as end:
            return end.value
        yield index, event


def running(
    start: Start,
    decoding: Decoding,
    *,
    logprobs: int = 0,
    stop_loops: int = 0,
    scored: bool = False,
) -> Running:
    """A reply whose draws are keyed by the seed of its decoding, or by one that is drawn now."""
    decoding = decoding.seeded(secrets.randbits(32))
    start = replace(start, key=(decoding.seed or 0, *start.key[1:]))
    return Running(start, decoding, logprobs=logprobs, stop_loops=stop_loops, scored=scored)
