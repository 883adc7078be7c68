"""Replies that say the same over and over."""

from __future__ import annotations

import numpy as np

LONGEST_BLOCK = 512
FEWEST_TOKENS = 32  # of a loop: rows of dashes and the like are none


class LoopDetector:
    """Whether the last ids say a block of up to 512 again, `times` times after the first."""

    def __init__(self, times: int) -> None:
        periods = np.arange(1, LONGEST_BLOCK + 1)
        self._needed = np.maximum(times * periods, FEWEST_TOKENS - periods)
        self._recent = np.full(LONGEST_BLOCK, -1)  # the newest first
        self._repeated = np.zeros(LONGEST_BLOCK, np.int64)  # of the last ids, by period

    def add(self, token: int) -> bool:
        """The ids go on with `token`; whether they loop now."""
        self._repeated = (self._repeated + 1) * (self._recent == token)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._repeated >= self._needed).any())
