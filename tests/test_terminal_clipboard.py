"""Text on its way to the clipboard, by escapes that terminals and tmux understand."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

from screens import screen
from terminals import Open

from llamachat.terminal.clipboard import copy

TEXT = "Größe\n\x1b[2J漢字"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_terminal_gets_the_text_by_osc_52() -> None:
    with screen(80) as terminal:
        assert copy(TEXT) is None
    assert terminal.written == f"\x1b]52;c;{encoded(TEXT)}\x07"


def test_tmux_that_cannot_be_asked_is_told_to_pass_it_on() -> None:
    with screen(80, TMUX="/nowhere,1,0", PATH="/nowhere") as terminal:
        assert copy(TEXT) is None
    assert terminal.written == f"\x1bPtmux;\x1b\x1b]52;c;{encoded(TEXT)}\x07\x1b\\"


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"TERM": "dumb"}, "TERM=dumb"),
        ({"TERM": "linux"}, "TERM=linux"),
        ({"TERM_PROGRAM": "Apple_Terminal"}, "Apple's Terminal"),
        ({"STY": "1.pts-0"}, "screen"),
    ],
)
def test_a_terminal_that_takes_none_is_left_alone(variables: dict[str, str], name: str) -> None:
    with screen(80, **variables) as terminal:
        assert str(copy(TEXT)).startswith(name)
    assert terminal.written == ""


def test_a_text_that_terminals_cut_is_not_sent() -> None:
    with screen(80) as terminal:
        assert "too long" in str(copy("x" * 75_001))
        assert copy("x" * 75_000) is None
    assert terminal.written.count("\x1b") == 1


def test_without_a_terminal_there_is_nobody_to_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no terminal" in str(copy(TEXT))
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_tmux_as_it_comes_takes_the_text(tmp_path: Path) -> None:
    tmux = ("tmux", "-L", f"llamachat-copy{os.getpid()}", "-f", "/dev/null")
    program = "from llamachat.terminal.clipboard import copy; import time; copy('ümläut\\n')"
    (tmp_path / "copies.py").write_text(f"{program}; time.sleep(60)", "utf-8")
    subprocess.run([*tmux, "new-session", "-d", sys.executable, tmp_path / "copies.py"], check=True)
    try:
        for _ in range(100):
            found = subprocess.run([*tmux, "show-buffer"], capture_output=True, check=False)
            if found.stdout:
                break
            time.sleep(0.1)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    assert found.stdout.decode() == "ümläut\n"


def test_a_conversation_copies_and_says_what(open_terminal: Open) -> None:
    terminal = open_terminal()
    terminal.wait()
    terminal.ask('"""say\n```sh\nls\n```"""')
    terminal.told()
    terminal.send("/copy 1\r")
    terminal.child.expect_exact(f"\x1b]52;c;{encoded('ls' + chr(10))}\x07")
    terminal.wait()
    assert terminal.told() == "Copied block 1 of 1, sh, 1 line\n"


def test_markdown_is_rendered_in_a_conversation_unless_switched_off(
    open_terminal: Open, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[ui]\nmarkdown = true\n", "utf-8")
    terminal = open_terminal()
    terminal.wait()
    assert terminal.ask("**bold**").endswith("bold")
    terminal.ask("/markdown off")
    assert terminal.ask("**bold**") == "**bold**"
