"""Ends by a signal. POSIX."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

LOST = """
import os, sys, time
from contextlib import suppress
from llamachat.cli.app import guarded

@guarded
def command():
    with suppress(SystemExit):  # as an event loop may lose it
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(60)
    while True:
        time.sleep(60)

command()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_end_that_is_lost_on_its_way_comes_soon(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(int(number))], capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, b"", b"")
