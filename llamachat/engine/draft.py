"""Drafts without a second model: what followed the same tokens before may follow them again.

Prompt lookup: Yang et al. 2023 (arXiv 2304.04487); Saxena 2023
(github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

from llamachat.engine.events import Speculation

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_GRAM, SHORTEST_GRAM = 3, 2
MOST_NEEDED = 16  # so that a stretch that is copied word for word is always found again


class PromptLookup:
    """The latest earlier place where a text had its last tokens, and what stood behind it.

    A token costs the same however long the text is. A pass over T tokens costs more than one over
    a single token, about a quarter for each, so a draft has one token less than the match that it
    goes on from: it doubles while drafts hold. Each that fails from its first token makes the next
    wait for a longer match.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        """Begin with the prompt."""
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where a gram ended the last time
        self._next = 0  # the place behind the match
        self._matched = 0  # how many tokens match
        self._needed = SHORTEST_GRAM
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with a token."""
        goes_on = self._matched > 0 and self._ids[self._next] == token
        self._next, self._matched = (self._next + 1, self._matched + 1) if goes_on else (0, 0)
        self._ids.append(token)
        for n in range(SHORTEST_GRAM, min(LONGEST_GRAM, len(self._ids)) + 1):
            gram = tuple(self._ids[-n:])
            if self._matched < n and gram in self._after:
                self._next, self._matched = self._after[gram], n
            self._after[gram] = len(self._ids)

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next.

        Where they would run past the end of the text, the end is taken to repeat.
        """
        if self._matched < self._needed:
            return []
        n = max(0, min(self._matched - 1, limit))
        return list(islice(cycle(self._ids[self._next : self._next + n]), n))

    def judge(self, drafted: int, accepted: int) -> None:
        """Learn what became of a draft."""
        if accepted == drafted:
            self._needed = SHORTEST_GRAM
        elif accepted == 0:
            self._needed = min(self._needed + 1, MOST_NEEDED)


class Drafts:
    """The drafts of one reply, at most `longest` tokens each; 0 makes none.

    Attributes:
        drafted: tokens that were run before they were chosen.
        accepted: those that then were chosen.
    """

    def __init__(self, prompt: Iterable[int], longest: int) -> None:
        self.drafted = self.accepted = 0
        self._longest = longest
        self._lookup = PromptLookup(prompt if longest else ())
        self._ahead: deque[tuple[int, Tensor]] = deque()  # tokens that were run, and their logits
        self._length = 0  # of the last draft

    @property
    def speculation(self) -> Speculation | None:
        """What came of them; None where none are made."""
        return Speculation(self.drafted, self.accepted) if self._longest else None

    def take(self, token: int) -> Tensor | None:
        """`token` was chosen: the logits (1, V) that follow it, if it was drafted."""
        if not self._longest:
            return None
        self._lookup.add(token)
        if not self._ahead or self._ahead[0][0] != token:
            return None
        self.accepted += 1
        return self._ahead.popleft()[1]

    def propose(self, room: int) -> list[int]:
        """At most `room` tokens to run beside the one that was chosen last."""
        if self._length:
            self._lookup.judge(self._length, self._length - len(self._ahead))
        draft = self._lookup.draft(min(room, self._longest))
        self._length = len(draft)
        self.drafted += len(draft)
        return draft

    def ran(self, draft: Sequence[int], logits: Tensor) -> None:
        """The proposed tokens (T,) were run: logits (T, V)."""
        self._ahead = deque(zip(draft, logits.unsqueeze(1), strict=True))
