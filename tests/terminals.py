"""A person's end of a pseudo-terminal on which the program runs with a scripted model. POSIX."""

from __future__ import annotations

import re
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
from programs import SCRIPTED, environment

READING, SENT = "\x1b[?2004h", "\x1b[?2004l"  # a line is being typed; it was sent
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
CTRL_C, CTRL_D, ALT_ENTER, CTRL_J = "\x03", "\x04", "\x1b\r", "\n"


class Terminal:
    """A person's end of a terminal on which `llamachat chat` runs; replies come as they are."""

    def __init__(self, home: Path, *flags: str, columns: int = 80, **variables: str) -> None:
        self.errors = home / "stderr"
        if not (config := home / "config.toml").exists():
            config.write_text("[ui]\nmarkdown = false\n", "utf-8")
        self.child = pexpect.spawn(
            "/bin/sh",
            ["-c", f'"$@" 2>>"{self.errors}"', "sh", *SCRIPTED, "chat", *flags],
            env=environment(home, PROMPT_TOOLKIT_NO_CPR="1", **variables),  # type: ignore[arg-type]
            dimensions=(30, columns),
            encoding="utf-8",
            timeout=15,
        )
        self.child.delaybeforesend = None
        self.child.delayafterclose = self.child.delayafterterminate = 0.01

    def wait(self) -> str:
        """Wait until a line can be typed; returns what was written since the last was sent."""
        self.child.expect_exact(READING)
        return ESCAPES.sub("", self.child.before or "")

    def send(self, keys: str) -> None:
        """Type keys, and wait until they are a message."""
        self.child.send(keys)
        self.child.expect_exact(SENT)

    def ask(self, line: str) -> str:
        """Type a line; returns what the model says to it."""
        self.send(f"{line}\r")
        return self.wait().strip("\n")

    def told(self) -> str:
        """What was written to stderr since this was last called."""
        text = self.errors.read_text("utf-8")
        self.errors.write_text("")
        return text

    def leave(self, keys: str = CTRL_D) -> int:
        """Type keys that end the program; returns its exit code."""
        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus or 0)


Open = Callable[..., Terminal]


def wait_for_keys(child: pexpect.spawn[str]) -> None:
    """Wait until the program takes each key as it is typed, no longer whole lines."""
    while termios.tcgetattr(child.fileno())[3] & termios.ICANON:
        time.sleep(0.01)
