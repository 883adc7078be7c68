"""Models by name: what exists (`catalog`), what is on disk (`store`), whether it fits (`fit`).

`hub` asks the Hugging Face Hub, `repository` says what to fetch, `download` brings the bytes,
`hub_cache` keeps them as other tools do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Notice: TypeAlias = Callable[[str], None]  # one line for people to read
Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all


def told_size(n_bytes: int) -> str:
    """A size as the Hub and disks have it, in decimal units: "4.2 MB", "16.1 GB"."""
    unit, name = (1e9, "GB") if n_bytes >= 1e9 else (1e6, "MB")
    return f"{n_bytes / unit:,.1f} {name}"
