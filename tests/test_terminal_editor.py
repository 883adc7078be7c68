"""Texts in an editor, in a pseudo-terminal: the editor is a program that changes its file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

from terminals import CTRL_C, Open


def editor(folder: Path, script: str) -> str:
    """A program that runs a shell script on its file."""
    path = folder / "my editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return f"'{path}' -w"


def test_the_last_question_is_changed_and_asked_anew(open_terminal: Open, tmp_path: Path) -> None:
    command = editor(tmp_path, 'ls -l "$2" > "$0.mode"; sed -i s/two/three/ "$2"')
    terminal = open_terminal("-q", VISUAL=command, EDITOR="false")
    terminal.wait()
    terminal.ask("one")
    terminal.ask("two")
    assert terminal.ask("/edit") == "three"
    assert (tmp_path / "my editor.mode").read_text().startswith("-rw-------")
    assert terminal.ask("recall") == "one | three | recall"
    terminal.ask("/undo 2")
    assert terminal.ask("recall") == "one | two | recall"


def test_the_last_reply_is_changed_and_nothing_is_said(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal("-q", EDITOR=editor(tmp_path, 'echo uno > "$2"'))
    terminal.wait()
    terminal.ask("one")
    assert terminal.ask("/edit-reply") == ""
    terminal.ask("/show prompt")
    assert "assistant\nuno<|im_end|>" in terminal.told()


@pytest.mark.parametrize("script", ["true", "echo new > $2; false", ": > $2", "kill -INT $$; true"])
def test_a_text_that_is_left_as_it_was_changes_nothing(
    open_terminal: Open, tmp_path: Path, script: str
) -> None:
    terminal = open_terminal("-q", EDITOR=editor(tmp_path, script), TMPDIR=str(tmp_path))
    terminal.wait()
    terminal.ask("one")
    assert terminal.ask("/edit") == ""
    assert terminal.told() == "The question stays as it was.\n"
    assert not list(tmp_path.glob("llamachat-*"))
    assert terminal.ask("recall") == "one | recall"


def test_ctrl_c_in_the_editor_is_the_editors(open_terminal: Open, tmp_path: Path) -> None:
    script = 'trap "echo got it > $2; exit 0" INT; echo ready; while :; do sleep 0.1; done'
    terminal = open_terminal("-q", EDITOR=editor(tmp_path, script))
    terminal.wait()
    terminal.ask("one")
    terminal.send("/edit\r")
    terminal.child.expect_exact("ready")
    terminal.child.send(CTRL_C)
    assert terminal.wait().strip("\n").endswith("got it")
    assert terminal.told() == ""


def test_an_editor_that_is_missing_is_said_in_one_line(open_terminal: Open) -> None:
    terminal = open_terminal("-q", EDITOR="no-such-editor")
    terminal.wait()
    terminal.ask("one")
    assert terminal.ask("/edit") == ""
    assert "no-such-editor: No such file or directory" in terminal.told()


def test_what_was_written_is_kept_where_it_cannot_be_asked(
    open_terminal: Open, tmp_path: Path
) -> None:
    command = editor(tmp_path, 'head -c 9000 /dev/zero | tr "\\0" x > "$2"')
    terminal = open_terminal("-q", EDITOR=command, TMPDIR=str(tmp_path))
    terminal.wait()
    terminal.ask("one")
    terminal.ask("/edit")
    assert "what you wrote is kept in" in terminal.told()
    (kept,) = tmp_path.glob("llamachat-*")
    assert kept.read_text() == "x" * 9000
    assert terminal.ask("recall") == "one | recall"
