"""Models by name: what exists (`catalog`), what is on disk (`store`), how to fetch it (`hub`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Notice: TypeAlias = Callable[[str], None]  # one line for people to read
Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all
