"""A log file of unexpected failures and of what libraries warn about.

It holds nobody's words: of a failure the places in the code, never its message.
"""

from __future__ import annotations

import logging
import platform
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from llamachat import settings

MOST_BYTES = 1 << 18  # of the file, before it is set aside; one that was set aside is kept
_SECRETS = re.compile(r"\bhf_\w+|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)")


def keep_warnings() -> None:
    """From now on what libraries log or warn of goes to the file, not to stderr."""
    settings.quieten_libraries()
    logging.captureWarnings(capture=True)
    logging.getLogger().addHandler(_Lazily(logging.WARNING))
    threading.excepthook = lambda failed: _keep_failure(failed.exc_value)
    sys.unraisablehook = lambda failed: _keep_failure(failed.exc_value)


def record(error: BaseException) -> Path | None:
    """Write down where an unexpected failure came from; returns the file, None if there is none."""
    from llamachat import __version__

    lines = [
        f"{type(error).__name__}; llamachat {__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}",
        *_places(error),
    ]
    entry = logging.LogRecord(
        "llamachat", logging.ERROR, __file__, 0, "%s", ("\n".join(lines),), None
    )
    try:
        _file().emit(entry)
    except OSError:
        return None
    return path()


def path() -> Path:
    """Where the file is, or would be."""
    return settings.data_dir()[0] / "llamachat.log"


def _keep_failure(error: BaseException | None) -> None:
    if error is not None:
        record(error)


def _places(error: BaseException | None) -> Iterator[str]:
    """The stack of an exception and of those that it came from, the last first."""
    while error is not None:
        yield type(error).__name__
        yield from "".join(traceback.format_tb(error.__traceback__)).rstrip().splitlines()
        error = error.__cause__ or error.__context__


class _Lazily(logging.Handler):
    """Writes to the file, which is looked for when there is something to write."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write; what cannot be written is nobody's failure."""
        try:
            _file().emit(record)
        except OSError:
            return


class _Discreet(logging.Formatter):
    """A formatter that leaves secrets out."""

    def format(self, record: logging.LogRecord) -> str:
        """One entry."""
        return _SECRETS.sub("...", super().format(record))


@lru_cache(maxsize=1)
def _file() -> logging.Handler:
    """The file, which only its owner can read.

    Raises:
        OSError: it cannot be opened.
    """
    from logging.handlers import RotatingFileHandler

    class Private(RotatingFileHandler):
        def _open(self) -> TextIOWrapper:
            file = Path(self.baseFilename)
            file.touch(mode=0o600)
            file.chmod(0o600)
            return super()._open()

        def handleError(self, record: logging.LogRecord) -> None:  # a full disk
            """Stay silent."""

    handler: Any = Private(path(), maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(_Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    assert isinstance(handler, logging.Handler)
    return handler
