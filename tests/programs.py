"""Real processes of the program, away from the user's own files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LLAMACHAT = (sys.executable, "-m", "llamachat")
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted.py")))
OURS = ("LLAMACHAT_", "HF_", "PIP_", "NO_COLOR", "FORCE_COLOR", "OMP_", "COLUMNS", "TERM")


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's environment without what the program reads; its folders are in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    folders = {
        "LLAMACHAT_CONFIG": "config.toml",
        "LLAMACHAT_CACHE_DIR": "cache",
        "LLAMACHAT_DATA_DIR": "data",
        "HF_HUB_CACHE": "hub",
    }
    ours = {name: str(home / folder) for name, folder in folders.items()}
    steady = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    return kept | ours | steady | changes


def start(command: tuple[str, ...], home: Path, **changes: str) -> subprocess.Popen[bytes]:
    """A process whose three streams are pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(home, **changes)
    )


def run(
    command: tuple[str, ...], home: Path, *, stdin: Any = b"", stdout: Any = None, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    """A process that has ended. `stdin`: bytes, or an open file."""
    source: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(
        command,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        env=environment(home, **changes),
        timeout=60,
        check=False,
        **source,
    )


def signalled_at_import(module: str, number: str) -> tuple[str, ...]:
    """`llamachat` as a program that gets a signal when it comes to import a module."""
    program = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.{number})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from llamachat.__main__ import main\n"
        "main()\n"
    )
    return (sys.executable, "-c", program)
