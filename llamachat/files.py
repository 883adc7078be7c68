"""Files that are there whole, or as they were."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file, or make it; whoever reads meanwhile, or after a crash, sees all or nothing.

    A link stays one, a file keeps its mode; what is no file (a pipe, a device) is written to.

    Args:
        path: the file.
        content: all of it.
        mode: of a file that is new, less the umask.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with target.open("wb", buffering=0) as stream:
            stream.write(content)
        return
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's new names, where that can be asked for."""
    if os.name == "nt":
        return
    with suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
