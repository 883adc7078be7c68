"""The input line: pastes, the editor, history, completion, the toolbar."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from llamachat.chat.templates import Message
from llamachat.terminal.completion import LineCompleter
from llamachat.terminal.history import PrivateHistory
from llamachat.terminal.toolbar import fitted


def completed(line: str) -> list[str]:
    """What Tab offers after a line."""
    return [it.text for it in LineCompleter().get_completions(Document(line), CompleteEvent())]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("/sys", ["system"]),
        ("/set top", ["top_k", "top_p"]),
        ("/set strategy b", ["beam"]),
        ("/set temperature d", ["default"]),
        ("/strategy top", ["top-k", "top-p"]),
        ("/compare greedy be", ["beam"]),
        ("/help und", ["undo"]),
        ("/show nothing ", []),
        ("/undo ", []),
        ("set", []),
        ("/nothing ", []),
    ],
)
def test_each_word_is_completed_as_its_command_says(line: str, offered: Sequence[str]) -> None:
    assert completed(line) == offered


def test_a_path_is_completed_after_its_sign(tmp_path: Path) -> None:
    (tmp_path / "a prompt.txt").touch()
    assert completed(f"/system @{tmp_path}/a p") == ["rompt.txt"]
    assert completed(f"/system {tmp_path}/a") == []


def test_conversations_are_completed_by_name_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(tmp_path))
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "a trip.jsonl").touch()
    assert completed("/load a t") == ["a trip"]
    assert completed(f"/load {tmp_path}/sess") == ["ions"]


def test_blocks_of_code_are_completed_by_number() -> None:
    reply = "```\none\n```\n\n```\ntwo\n```\n"
    session = SimpleNamespace(messages=(Message("assistant", reply),))
    conversation: Any = SimpleNamespace(session=session)
    offered = LineCompleter(conversation).get_completions(Document("/copy "), CompleteEvent())
    assert [it.text for it in offered] == ["1", "2"]
    assert completed("/copy ") == []


@pytest.mark.parametrize(
    "text",
    [
        "nul \0 escape \x1b[2J",
        "one\ntwo\n\n  three\t",
        "+ # is in the file, too",
        "漢字 🎉 \u2028 \r",
    ],
)
def test_what_was_typed_comes_back_whole(tmp_path: Path, text: str) -> None:
    PrivateHistory(tmp_path / "history").store_string(text)
    PrivateHistory(tmp_path / "history").store_string("last")
    assert list(PrivateHistory(tmp_path / "history").load_history_strings()) == ["last", text]


def test_what_is_no_text_or_a_book_does_no_harm(tmp_path: Path) -> None:
    history = PrivateHistory(tmp_path / "history")
    history.store_string("\udcff surrogate")
    history.store_string("x" * 1_000_000)
    assert list(history.load_history_strings()) == ["? surrogate"]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "ctx 1 812/4 096 · 14.2 tok/s · top-p 0.9"),
        (40, "ctx 1 812/4 096 · 14.2 tok/s · top-p 0.9"),
        (39, "ctx 1 812/4 096 · 14.2 tok/s"),
        (20, "ctx 1 812/4 096"),
        (5, "ctx 1 812/4 096"),
    ],
)
def test_a_narrow_toolbar_drops_what_matters_least(columns: int, shown: str) -> None:
    assert fitted(["ctx 1 812/4 096", "14.2 tok/s", "top-p 0.9"], columns) == shown


if sys.platform != "win32":
    from terminals import CTRL_C, SENT, Open

    @pytest.mark.parametrize("columns", [40, 80, 200])
    def test_a_paste_is_one_message_with_its_tabs_and_is_not_sent_by_its_last_newline(
        open_terminal: Open, columns: int
    ) -> None:
        terminal = open_terminal(columns=columns)
        terminal.wait()
        block = "".join(f"{i}\tx\r\n" for i in range(20))
        terminal.child.send(f"\x1b[200~{block}\x1b[201~end")
        terminal.child.expect_exact("end")
        terminal.send("\r")
        assert terminal.wait().lstrip("\n") == "".join(f"{i}\tx\n" for i in range(20)) + "end\n"

    @pytest.mark.parametrize("begun", ["", "hello"])
    def test_the_editor_writes_a_message_and_has_its_own_ctrl_c(
        open_terminal: Open, tmp_path: Path, begun: str
    ) -> None:
        editor = tmp_path / "editor"
        editor.write_text(
            '#!/bin/sh\ntrap \'echo " and goodbye" >>"$1"; exit 0\' INT\n'
            "echo editing\nwhile :; do sleep 0.05; done\n"
        )
        editor.chmod(0o755)
        terminal = open_terminal(VISUAL=str(editor))
        terminal.wait()
        terminal.child.send(f"{begun}\x18\x05")
        terminal.child.expect_exact("editing")
        terminal.child.send(CTRL_C)
        terminal.child.expect_exact("goodbye")
        terminal.send("\r")
        assert "goodbye" in terminal.wait()
        terminal.ask("/show prompt")
        assert f"user\n{begun} and goodbye<" in terminal.told()

    def test_bytes_that_are_no_text_are_replaced(open_terminal: Open) -> None:
        terminal = open_terminal()
        terminal.wait()
        os.write(terminal.child.child_fd, b"a\xff\r")
        terminal.child.expect_exact(SENT)
        assert terminal.wait().lstrip("\n").startswith("a\ufffd")
        assert "replaced" in terminal.told()
        assert terminal.ask("fine") == "fine"
