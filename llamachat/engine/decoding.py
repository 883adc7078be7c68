"""How the next token is chosen: frozen options, and the contract of what they start.

Options are torch-free: flags, `compare`, JSON and transcripts hold them. State belongs to one
reply. `choose` works on tensors only and may be captured in a graph; `accept` reads the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llamachat.engine.parameters import PENALTIES, check
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Start:
    """What a strategy needs to know about the reply it begins.

    Attributes:
        prompt: the ids before the first that will be chosen.
        stop_ids: ids that end the reply and are not part of it.
        max_new_tokens: the reply ends after so many ids beyond the prompt.
        key: (seed, turn, attempt), which with the step decides every draw.
        device: where logits will be.
        ends: whether a reply so far ends here (stop strings, tested on ids).
        logprobs: whether choices carry log-probabilities.
        continued: how many of the prompt's last ids are the reply's own; steps count them.
        best: of logits (B, V) the ids (B,) of the largest (`Kernels.best`); None: by torch.
    """

    prompt: tuple[int, ...]
    stop_ids: frozenset[int]
    max_new_tokens: int
    key: tuple[int, int, int]
    device: str = "cpu"
    ends: Callable[[Sequence[int]], bool] | None = None
    logprobs: bool = False
    continued: int = 0
    best: Callable[[Tensor], Tensor] | None = None

    @property
    def begun(self) -> tuple[int, ...]:
        """The reply's own ids in the prompt."""
        return self.prompt[len(self.prompt) - self.continued :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """What a reply so far does to the next logits, however a token is then chosen.

    Attributes:
        repetition_penalty: divides positive logits and multiplies negative ones of ids that the
            prompt or the reply has; 1 is off.
        frequency_penalty: is subtracted for each time that the reply has an id; 0 is off.
        presence_penalty: is subtracted once from ids that the reply has; 0 is off.
        no_repeat_ngram_size: no run of so many ids comes twice in prompt and reply; 0 is off.
        bad_words: runs of ids that are never completed. A stop id alone is no bad word.
        logit_bias: (id, what is added to its logit).

    Raises:
        UsageError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check(self, PENALTIES)
        for word in self.bad_words:
            if not word or min(word) < 0:
                raise UsageError(f"bad_words: found {word}, expected ids of 0 or more")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise UsageError(
                    f"logit_bias: found {token}={bias}, expected an id and a finite number",
                    hint="-100 bans a token, 100 forces it",
                )
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise UsageError("logit_bias names an id twice")

    @property
    def is_off(self) -> bool:
        """Whether logits stay as they are."""
        numbers = all(getattr(self, name) == one.off for name, one in PENALTIES.items())
        return numbers and not self.bad_words and not self.logit_bias


@dataclass(frozen=True, slots=True)
class Choice:
    """What one step over B rows offers: N candidates, the best (or first drawn) of each row first.

    Attributes:
        tokens: (N,); N is B unless rows compete.
        parents: (N,) the row that each goes on from. None: its own, and unless the reply is over
            each token is run next.
        scores: (N,) log-probability of each candidate's whole reply.
        logprobs: (B, V) of what was chosen from, after penalties and filters; -inf for what they
            removed. There if `Start.logprobs` asked for it.
    """

    tokens: Tensor
    parents: Tensor | None = None
    scores: Tensor | None = None
    logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tail:
    """A continuation that is still open, after the ids that were committed, and its score."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Branch:
    """A row of the next step: the row it goes on from, and the token to run there.

    Without a token it is only kept: what was run may be the reply yet.
    """

    parent: int
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """What a step has settled.

    Attributes:
        ids: what can no longer change, after all that was committed before.
        done: whether the reply is over.
        finish_reason: why it is.
        tails: the open continuations, the best first; none where all is committed.
        rows: what is run next, rows to keep last; empty: `ids`, in the only row.
    """

    ids: tuple[int, ...]
    done: bool
    finish_reason: str | None = None
    tails: tuple[Tail, ...] = ()
    rows: tuple[Branch, ...] = ()


class Strategy(Protocol):
    """The state of one reply."""

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        """Choose from logits (B, V) float32 at step (); tensors only, no host read."""
        ...

    def accept(self, choice: Choice) -> Commit:
        """Take a choice, in order; may lag one step behind `choose`."""
        ...

    def finish(self) -> Commit:
        """End the reply here, if it has not ended: its best form, whole, from its first id."""
        ...


class Decoding(Protocol):
    """Frozen options of one way to decode: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def width(self) -> int:
        """Rows that one reply needs (beams; otherwise 1)."""
        ...

    @property
    def seed(self) -> int | None:
        """What every draw is keyed by; None: one is drawn for each reply."""
        ...

    def seeded(self, seed: int) -> Decoding:
        """The same with this seed, unless it has one or draws nothing."""
        ...

    def start(self, start: Start) -> Strategy:
        """The state of a new reply."""
        ...


def check_one_row(decoding: Decoding, *, draft: int = 0, logprobs: int = 0) -> None:
    """Refuse with several rows what only one row can have.

    Raises:
        UsageError: it names both.
    """
    asked = {"drafts (--speculate)": draft, "log-probabilities (--logprobs, /probs)": logprobs}
    for name, value in asked.items():
        if value and decoding.width > 1:
            raise UsageError(
                f"{name} and beams (--num-beams) contradict each other",
                hint="leave one of them out",
            )


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse a prompt that a model cannot run.

    Raises:
        UsageError: it has no tokens, or some that are not in the vocabulary.
    """
    if not ids:
        raise UsageError("there is nothing to run: the prompt has no tokens")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UsageError(f"ids {min(ids)} to {max(ids)} are not all in 0 to {vocab_size - 1}")
