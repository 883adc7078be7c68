"""Loads the shared library of native kernels, which the build puts beside this file. No torch."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

from llamachat import settings

BUILT = Path(__file__).with_name(
    "llamachat_native.dll" if sys.platform == "win32" else "llamachat_native.so"
)


class LibraryMissing(Exception):
    """There are no native kernels here; the text says why."""


def load_library() -> ctypes.CDLL:
    """The library, loaded once: the one that was built, or `settings.native_library()`.

    Raises:
        LibraryMissing: it was not built, is switched off, or cannot be loaded on this machine.
    """
    named = settings.native_library()
    if named == "none":
        raise LibraryMissing("switched off by LLAMACHAT_NATIVE_LIBRARY=none")
    return _load(Path(named).absolute() if named else BUILT)


@cache
def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise LibraryMissing(f"not built: no {path}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMissing(f"{path} cannot be loaded: {error}") from error
