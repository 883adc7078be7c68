"""A line can be typed while the model loads; what needs the model waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

import fcntl
import termios

import pexpect
from programs import SCRIPTED, environment, run, signalled_at_import
from terminals import CTRL_C, CTRL_D, ESCAPES, Open, Terminal

OPENED = "slow was opened"


@pytest.fixture
def slow(open_terminal: Open) -> Terminal:
    """A terminal whose model takes two seconds."""
    terminal = open_terminal("-m", "slow")
    terminal.wait()
    return terminal


def test_what_takes_long_to_import_is_not_needed_for_the_first_prompt(tmp_path: Path) -> None:
    program = (
        "import llamachat.cli.app, llamachat.terminal.conversation, sys;"
        "print({'torch', 'rich', 'huggingface_hub', 'pydantic', 'llamachat.chat.templates'}"
        " & sys.modules.keys())"
    )
    found = run((sys.executable, "-c", program), tmp_path)
    assert found.stdout.split() == [b"set()"], found.stderr


@pytest.mark.parametrize("module", ["pydantic", "numpy", "jinja2"])
def test_flags_are_read_without_what_takes_long_to_import(tmp_path: Path, module: str) -> None:
    without = signalled_at_import(module, "SIGKILL")
    ended = run((*without, "chat", "-m", "any", "-q", "-p", ""), tmp_path)
    assert ended.returncode == 2
    assert b"the prompt is empty" in ended.stderr


def until_told(terminal: Terminal, text: str) -> str:
    """Wait until stderr has a text; returns all that it had."""
    for _ in range(1000):
        told = terminal.errors.read_text("utf-8")
        if text in told:
            return told
        time.sleep(0.01)
    pytest.fail(f"{text!r} is not in {told!r}")


def recalled(terminal: Terminal, keys: str) -> str:
    """Type two questions of which the last asks for both; returns its answer."""
    terminal.child.send(keys)
    terminal.child.expect(r"[^\n]* \| recall\r\n")
    return ESCAPES.sub("", terminal.child.after or "").strip()


def test_messages_that_are_typed_early_are_sent_in_order_when_the_model_is_there(
    slow: Terminal,
) -> None:
    assert recalled(slow, "hello\rrecall\r") == "hello | recall"
    assert OPENED in slow.told()


def test_what_is_being_typed_when_the_model_comes_stays(slow: Terminal) -> None:
    slow.child.send("rec")
    until_told(slow, OPENED)
    assert recalled(slow, "all\rrecall\r") == "recall | recall"


def test_commands_that_need_no_model_do_not_wait_for_it(slow: Terminal) -> None:
    slow.ask("/help")
    slow.ask("/hlep")
    told = slow.told()
    assert "/undo" in told
    assert "did you mean /help?" in told
    assert OPENED not in told
    assert slow.leave("/exit\r") == 0


def test_a_model_that_cannot_be_loaded_ends_the_conversation(open_terminal: Open) -> None:
    terminal = open_terminal("-m", "broken")
    terminal.child.send("hello\r")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 9
    _, *error = terminal.told().splitlines()
    assert error == ["llamachat: scripted.gguf: no tensors", "  hint: fetch it again"]


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 5)])
def test_a_question_is_asked_at_the_prompt_and_what_was_typed_is_no_answer(
    open_terminal: Open, answer: str, status: int
) -> None:
    terminal = open_terminal("-m", "large")
    terminal.wait()
    terminal.child.send("yes-please")
    terminal.child.expect_exact("go on all the same? [y/N]")
    terminal.child.send(f"{answer}\r")
    if status == 0:
        until_told(terminal, "large was opened")
        terminal.child.expect_exact("yes-please")
        terminal.child.send(CTRL_C)
        assert terminal.leave() == 0
    else:
        terminal.child.expect(pexpect.EOF)
        terminal.child.close()
        assert terminal.child.exitstatus == status


def test_ctrl_c_while_loading_clears_the_line_and_then_says_how_to_leave(slow: Terminal) -> None:
    slow.child.send("never mind")
    slow.child.expect_exact("never mind")
    slow.child.send(CTRL_C)
    slow.child.send(CTRL_C)
    assert OPENED not in until_told(slow, "/exit leaves")
    assert recalled(slow, "recall\rrecall\r") == "recall | recall"


def test_ctrl_c_takes_back_what_was_typed_early(slow: Terminal) -> None:
    slow.ask("hello")
    slow.child.send(CTRL_C)
    assert OPENED not in until_told(slow, "[not sent]")
    assert recalled(slow, "recall\rrecall\r") == "recall | recall"


def test_ctrl_d_leaves_while_the_model_loads(slow: Terminal) -> None:
    assert slow.leave(CTRL_D) == 0
    assert OPENED not in slow.told()


def test_a_terminated_conversation_ends_while_the_model_loads(slow: Terminal) -> None:
    os.killpg(os.getpgid(slow.child.pid), signal.SIGTERM)
    slow.child.expect(pexpect.EOF)
    assert OPENED not in slow.told()


@pytest.mark.parametrize("model", [(), ("-m", "slow")], ids=["ready", "loading"])
def test_a_terminal_that_closes_ends_the_conversation(
    tmp_path: Path, model: tuple[str, ...]
) -> None:
    ours, its = os.openpty()
    process = subprocess.Popen(
        [*SCRIPTED, "chat", *model],
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment(tmp_path),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    shown = b""
    while b">>>" not in shown:
        shown += os.read(ours, 1024)
    os.close(ours)
    assert process.wait(10) == 129
    assert not (tmp_path / "data" / "llamachat.log").exists()


@pytest.fixture
def early(open_terminal: Open) -> Terminal:
    """A terminal on which nothing was drawn yet; its model takes two seconds."""
    return open_terminal("-m", "slow")


def test_an_end_of_input_before_the_prompt_ends_the_conversation(early: Terminal) -> None:
    assert early.leave(CTRL_D) == 0
    assert OPENED not in early.told()


def test_a_message_that_is_sent_before_the_prompt_is_answered_before_the_end(
    early: Terminal,
) -> None:
    early.child.send("hello\rrecall\r" + CTRL_D)
    early.child.expect_exact("hello\r\nrecall")  # one message
    assert early.leave("") == 0
    assert OPENED in early.told()
    assert "recall" in (early.child.before or "").split("... recall")[-1]


def test_ctrl_d_twice_leaves_what_was_typed_early_unsent(slow: Terminal) -> None:
    slow.child.send("hello\r")
    assert slow.leave(CTRL_D + CTRL_D) == 0
    assert OPENED not in slow.told()
