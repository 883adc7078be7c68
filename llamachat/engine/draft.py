"""Drafts without a second model: what followed the same tokens before may follow them again.

Prompt lookup: Yang et al. 2023 (arXiv 2304.04487); Saxena 2023
(github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

from llamachat.engine.events import Speculation

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_GRAM, SHORTEST_GRAM = 3, 2
NEAR = 8  # tokens that a copy may leave out
PATIENCE = 6  # tokens of its own that it may put in
LEAST_HOPE = 0.45  # of the last token of a draft: a token more in a pass costs 0.1 to 0.3 of it
MEMORY = 0.95  # the weight of a draft when the next is judged


class PromptLookup:
    """The latest earlier place where a text had its last tokens, and what stood behind it.

    A token costs the same however long the text is. A copy that leaves out or puts in a few tokens
    is followed past them. A pass over T tokens costs more than one over a single token, so a
    draft is as long as the hope for its last token allows, by the share that held of those before;
    where that allows none, a long match is asked for another.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        """Begin with the prompt."""
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where a gram ended the last time
        self._next = 0  # the place behind the match
        self._matched = 0  # how many tokens match
        self._patience = 0  # how many more may differ before the place is forgotten
        self._judged, self._held = 4.0, 3.0  # as if three of four drafted tokens had held
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with a token."""
        near = self._ids[self._next : self._next + NEAR] if self._patience else []
        self._ids.append(token)
        if token in near:
            skipped = near.index(token)
            self._next += skipped + 1
            self._matched, self._patience = 1 if skipped else self._matched + 1, PATIENCE
        else:
            self._matched, self._patience = 0, max(0, self._patience - 1)
        for n in range(SHORTEST_GRAM, min(LONGEST_GRAM, len(self._ids)) + 1):
            gram = tuple(self._ids[-n:])
            if self._matched < n and gram in self._after:
                self._next, self._matched, self._patience = self._after[gram], n, PATIENCE
            self._after[gram] = len(self._ids)

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next.

        Where they would run past the end of the text, the end is taken to repeat.
        """
        if not self._matched:
            return []
        hope = self._held / self._judged
        n = int(math.log(LEAST_HOPE) / math.log(hope)) if LEAST_HOPE < hope < 1 else 0
        if self._matched >= LONGEST_GRAM:
            n = max(n, 1)
        n = min(n, limit)
        return list(islice(cycle(self._ids[self._next : self._next + n]), n)) if n > 0 else []

    def judge(self, drafted: int, accepted: int) -> None:
        """Learn what became of a draft."""
        self._judged = MEMORY * self._judged + min(accepted + 1, drafted)
        self._held = MEMORY * self._held + accepted


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
