"""Stop strings: text that ends a reply and is never shown, even split over tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence


class StopFilter:
    """Passes text on, but holds back whatever may still become a stop string.

    Text that came `before` may be the beginning of one; it is part of no stop string otherwise.
    """

    def __init__(self, stops: Sequence[str], before: str = "") -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = before
        self._take(len(before) - self._open_tail())
        self.stopped = False

    @property
    def held(self) -> str:
        """What is held back now."""
        return self._held

    def feed(self, text: str) -> str:
        """The text that can no longer be part of a stop string; "" once one was found."""
        if self.stopped:
            return ""
        self._held += text
        if (cut := first_stop(self._held, self._stops)) is not None:
            self.stopped = True
            return self._take(cut)
        return self._take(len(self._held) - self._open_tail())

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.stopped else self._take(len(self._held))

    def copy(self) -> StopFilter:
        """Another one at the same place, to see how the text might go on."""
        return copy.copy(self)

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _open_tail(self) -> int:
        """The length of the longest end of the held text that begins some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first: what a stream meets, however split."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
