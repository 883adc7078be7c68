"""torch's libraries, loaded so that other threads go on meanwhile."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path

_LIBRARIES = {"linux": "libtorch.so", "darwin": "libtorch.dylib"}


def preload_torch() -> None:
    """Load what `import torch` would load while it holds the interpreter's lock.

    A function of a library is called without the lock, dlopen too; a module is imported with it.
    Where this fails, importing torch does it all.
    """
    found = importlib.util.find_spec("torch")
    name = _LIBRARIES.get(sys.platform)
    if "torch" in sys.modules or name is None or found is None or found.origin is None:
        return
    path = Path(found.origin).parent / "lib" / name
    with suppress(OSError, AttributeError):
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype = ctypes.c_void_p
        dlopen(os.fsencode(path), os.RTLD_NOW)
