"""What was loaded and when, and what that took beside what was forecast. Torch-free."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from llamachat import settings
from llamachat.library.results import append, newest_lines

MOST_BYTES = 1 << 20  # of the file, before it begins anew
NEWEST = 200  # that are looked at


@dataclass(frozen=True, slots=True)
class Load:
    """One load.

    Attributes:
        time: seconds since 1970.
        path: what was loaded.
        quantize: the form that it was run in.
        forecast_bytes: of memory at most, beside the program.
        measured_bytes: the same, measured.
    """

    time: float
    path: str
    quantize: str
    forecast_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Of the forecast, relative to what was measured: 0.1 is a tenth too much."""
        return self.forecast_bytes / self.measured_bytes - 1


def keep(path: Path, quantize: str, forecast_bytes: int, measured_bytes: int) -> None:
    """Remember a load, if the cache folder can be written."""
    load = Load(time.time(), str(path), quantize, forecast_bytes, measured_bytes)
    with suppress(OSError):
        file = _file()
        if file.exists() and file.stat().st_size > MOST_BYTES:
            file.unlink()
        append(file, asdict(load))


def newest(n: int = NEWEST) -> list[Load]:
    """The last loads, the newest first."""
    found = []
    for line in newest_lines(_file(), n):
        with suppress(TypeError, ValueError):  # of another version
            load = Load(**line)
            if load.measured_bytes > 0 and load.time > 0:
                found.append(load)
    return found


def last_used() -> dict[str, float]:
    """When each path was last loaded, in seconds since 1970."""
    return {load.path: load.time for load in reversed(newest())}


def _file() -> Path:
    return settings.cache_dir()[0] / "loads.jsonl"
