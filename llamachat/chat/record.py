"""How a reply was made: enough to make it again, and to see that it is the same. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamachat.chat.events import FinishReason, Timings


@dataclass(frozen=True, slots=True, eq=False)
class Ids:
    """A sequence that begins with the first `same` ids of another one; only `new` is held."""

    new: tuple[int, ...]
    same: int = 0
    base: Ids | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.same + len(self.new)

    def whole(self) -> list[int]:
        """All of them."""
        pieces: list[tuple[int, ...]] = []
        at, end = self, len(self)
        while True:  # a loop: a long conversation is a long chain
            pieces.append(at.new[: max(0, end - at.same)])
            if at.base is None:
                break
            at, end = at.base, min(end, at.same)
        return [token for piece in reversed(pieces) for token in piece]

    def followed_by(self, ids: Sequence[int]) -> Ids:
        """These, and then others."""
        return Ids(tuple(ids), len(self), self)


def after(base: Ids | None, ids: Sequence[int]) -> Ids:
    """A sequence as what it has beyond the beginning that it shares with `base`."""
    if base is None:
        return Ids(tuple(ids))
    same = common(base.whole(), ids)
    return Ids(tuple(ids[same:]), same, base)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are the same."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


@dataclass(frozen=True, slots=True)
class Terms:
    """What of a session decides replies, beside how it decodes.

    Attributes:
        run: the model and how it is run, ready for JSON.
        max_new_tokens: see `ChatSession`.
        stop: see `ChatSession`.
        stop_loops: see `ChatSession`.
        date: the moment that the template was told, in ISO 8601; None: it does not ask.
    """

    run: Mapping[str, Any]
    max_new_tokens: int | None
    stop: tuple[str, ...]
    stop_loops: int
    date: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of a reply: what one call of the engine made of it.

    Attributes:
        prompt: what came before the reply.
        start: the first of the reply's ids that was chosen here; those before were there.
        end: after the last one that is still in the reply.
        strategy: see `describe`: every value, and the order of filters.
        seed: with `turn` and `attempt` the key of every draw; None: nothing was drawn.
        turn: of the conversation, from 0.
        attempt: 0 before the first `regenerate`.
        max_new_tokens: see `ChatSession`.
        stop: strings that ended it.
        stop_loops: see `ChatSession`.
        finish_reason: how it ended; None where what followed was replaced by another choice.
        forgotten: oldest turns that the context had no room for.
        timings: how long it took.
        time: when it was over, in ISO 8601.
        date: see `Terms`.
        note: what the prompt said instead of what was forgotten.
        quantize: the form of the weights, if not that of the run.
    """

    prompt: Ids
    start: int
    end: int
    strategy: Mapping[str, Any]
    seed: int | None
    turn: int
    attempt: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    stop_loops: int
    finish_reason: FinishReason | None
    forgotten: int
    timings: Timings
    time: str
    date: str | None = None
    note: str | None = None
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a message beyond its text.

    Attributes:
        ids: a reply's, those of a stop string included.
        text: what the ids were shown as; a message that says something else was edited.
        parts: how they came about, in order; ids in none of them were given, not chosen.
        finish_reason: how the reply ended.
        run: see `Terms`.
        extra: what a file says besides.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    parts: tuple[Part, ...] = ()
    finish_reason: FinishReason | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> Ids | None:
        """The last prompt and the reply to it."""
        return self.parts[-1].prompt.followed_by(self.ids) if self.parts else None

    def cut(self, length: int) -> Record:
        """That of the first `length` ids."""
        parts = tuple(
            part if part.end <= length else replace(part, end=length, finish_reason=None)
            for part in self.parts
            if part.start < length
        )
        return replace(self, ids=self.ids[:length], parts=parts)
