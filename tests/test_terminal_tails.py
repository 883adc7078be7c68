"""Open beams below a reply: shown on a terminal, taken away when the text goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from programs import SCRIPTED, environment, run

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

import pexpect

ROOM, SHOWN, GONE = "\x1bD\x1bD\x1b[2A\x1b7", "  -1.000  open 1", "\x1b8\x1b[J"


def written(home: Path, question: str, columns: int) -> str:
    child = pexpect.spawn(
        SCRIPTED[0], [SCRIPTED[1], "chat", question, "-q"],
        env=environment(home), dimensions=(30, columns), encoding="utf-8", timeout=30,
    )  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_open_tails_stand_below_the_text_until_it_goes_on(tmp_path: Path, columns: int) -> None:
    question = "beams " + "0123456789" * 10
    found = written(tmp_path, question, columns)
    assert found.count(SHOWN) == found.count(ROOM) == found.count(GONE)
    text = "".join(piece.split("\x1b7")[0] for piece in found.split("\x1b8\x1b[J"))
    assert text.replace("\x1bD\x1bD\x1b[2A", "").strip() == question
    full = len(question) - 2 * (len(question) // columns)  # none where a line is about to wrap
    assert found.count(SHOWN) == full


def test_a_tail_is_cut_to_the_width_of_the_terminal(tmp_path: Path) -> None:
    found = written(tmp_path, "beams a", 12)
    tails = [part.split("\x1b[0m")[0] for part in found.split("\x1b[2m")[1:]]
    assert tails
    assert max(map(len, tails)) <= 11


def test_a_pipe_gets_the_text_alone(tmp_path: Path) -> None:
    found = run((*SCRIPTED, "chat", "beams abc"), tmp_path)
    assert found.stdout == b"beams abc\n"
