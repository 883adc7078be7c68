"""Conversations that outlive their process: real processes on a pseudo-terminal, kills included."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import SCRIPTED, run

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

import pexpect
import psutil
from terminals import Open, Terminal

from llamachat.chat.saved import locked
from llamachat.cli import app


def folder(home: Path) -> Path:
    return home / "data" / "sessions"


def contents(path: Path) -> list[str]:
    lines = map(json.loads, path.read_bytes().splitlines())
    return [line["content"] for line in lines if "role" in line]


def the_file(home: Path) -> Path:
    (path,) = folder(home).glob("*.jsonl")
    return path


def program(terminal: Terminal) -> psutil.Process:
    """The process on the terminal, which may be the child of a shell."""
    process = psutil.Process(terminal.child.pid)
    return next(iter(process.children()), process)


def ended(terminal: Terminal) -> int:
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    return int(terminal.child.exitstatus or 0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def test_what_was_said_before_a_kill_is_there_afterwards(open_terminal: Open, home: Path) -> None:
    terminal = open_terminal()
    terminal.wait()
    terminal.ask("one")
    terminal.ask("\x16\x1bstrange 漢字 \x16\x07")
    terminal.send("slowly\r")
    terminal.child.expect_exact("tick")
    program(terminal).kill()
    ended(terminal)
    again = open_terminal("-C")
    again.wait()
    assert "2 turns." in again.told()
    assert again.ask("recall").startswith("one | ")
    assert contents(the_file(home))[:2] == ["one", "one"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_of_a_reply_keeps_what_was_said(
    open_terminal: Open, home: Path, number: int, code: int
) -> None:
    terminal = open_terminal()
    terminal.wait()
    terminal.send("slowly\r")
    terminal.child.expect_exact("tick tick")
    program(terminal).send_signal(number)
    assert ended(terminal) == code
    question, reply = contents(the_file(home))
    assert question == "slowly"
    assert reply.startswith("tick tick")
    assert "Traceback" not in terminal.told()


def test_two_processes_do_not_write_one_file(open_terminal: Open, home: Path) -> None:
    first, second = open_terminal("--session", "a"), open_terminal("--session", "a")
    for terminal in (first, second):
        terminal.wait()
    first.told()
    first.ask("one")
    second.ask("two")
    assert [contents(folder(home) / f"{name}.jsonl")[0] for name in ("a", "a-2")] in (
        ["one", "two"], ["two", "one"],
    )  # fmt: skip


def test_a_terminal_that_closes_loses_nothing(open_terminal: Open, home: Path) -> None:
    terminal = open_terminal("--session", "a")
    terminal.wait()
    terminal.ask("one")
    process = program(terminal)
    terminal.child.close(force=False)
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    assert contents(folder(home) / "a.jsonl") == ["one", "one"]
    again = open_terminal("--session", "a")
    again.wait()
    assert again.ask("recall") == "one | recall"


def test_commands_save_load_list_and_export(
    open_terminal: Open, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    terminal = open_terminal("--no-save")
    terminal.wait()
    terminal.ask("one")
    assert not folder(home).exists()
    terminal.ask("/save first")
    terminal.ask("/save second")
    terminal.ask("two")
    terminal.ask("/undo")
    terminal.ask("three")
    terminal.ask("/load first")
    assert terminal.ask("recall") == "one | recall"
    terminal.told()
    terminal.ask("/load second")
    terminal.ask("/sessions")
    terminal.ask("/export md talk.md")
    terminal.ask("/export md talk.md")
    told = terminal.told()
    assert "second: 2 turns" in told
    assert "second  " in told
    assert "exists" in told
    assert contents(folder(home) / "second.jsonl") == ["one", "one", "three", "three"]
    assert (
        (home / "talk.md").read_text("utf-8").startswith("## You\n\none\n\n## Assistant\n\none\n")
    )


def test_one_answer_is_kept_only_in_a_conversation_that_is_named(home: Path) -> None:
    run((*SCRIPTED, "chat", "one"), home)
    assert not folder(home).exists()
    run((*SCRIPTED, "chat", "one", "--session", "a"), home)
    again = (*SCRIPTED, "chat", "recall", "-C")
    assert run(again, home).stdout == b"one | recall\n"
    (line,) = run((*again, "--json", "--no-save"), home).stdout.splitlines()
    assert json.loads(line)["text"] == "one | recall | recall"
    assert len(contents(folder(home) / "a.jsonl")) == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two conversations; nothing in it is changed."""
    home = tmp_path_factory.mktemp("home")
    run((*SCRIPTED, "chat", "What is\x1b[2J this?", "--session", "a"), home)
    run((*SCRIPTED, "chat", "漢字", "--session", "b", "-s", "Be brief."), home)
    return home


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """`llamachat` with arguments, in this process: its exit code, stdout and stderr."""
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(saved / "data"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        code = app.run()
        return (code, *capsys.readouterr())

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    yield call
    for number, handler in handlers:
        signal.signal(number, handler)


def test_saved_conversations_are_listed_and_shown(call: Call) -> None:
    code, out, _ = call("sessions", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", "b", "a"]
    listed = json.loads(call("sessions", "list", "--json")[1])
    assert [(it["name"], it["title"]) for it in listed] == [
        ("b", "漢字"),
        ("a", "What is\x1b[2J this?"),
    ]
    shown = json.loads(call("sessions", "show", "b", "--json")[1])
    assert [it["role"] for it in shown["messages"]] == ["system", "user", "assistant"]
    assert call("sessions", "show", "b")[1] == "[system] Be brief.\n\n>>> 漢字\n\n漢字\n"
    exported = call("sessions", "export", "json", "b")[1]
    assert json.loads(exported)[1] == {"role": "user", "content": "漢字"}


def test_replay_shows_what_was_said_and_the_ids_of_every_prompt(call: Call, saved: Path) -> None:
    path = str(folder(saved) / "b.jsonl")
    assert call("replay", path)[1] == call("sessions", "show", "b")[1]
    reply = json.loads(call("replay", "b", "--json")[1])["messages"][2]
    assert bytes(reply["token_ids"]).decode() == "漢字"
    assert bytes(i for i in reply["parts"][0]["prompt"] if i < 256).startswith(b"system\nBe brief.")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("sessions", "show", "nobody"), 2, "no such conversation"),
        (("sessions", "rm", "a"), 2, "--yes"),
        (("sessions", "rm", "nobody", "--yes"), 2, "no such conversation"),
        (("sessions", "export", "pdf", "a"), 2, "expected md or json"),
        (("replay", "../nothing"), 2, "no such conversation"),
        (("chat", "x", "-C", "--session", "a"), 2, "contradict"),
        (("chat", "x", "--session", "a\nb"), 2, "cannot be called"),
    ],
)
def test_what_cannot_be_done_is_said(
    call: Call, arguments: tuple[str, ...], code: int, told: str
) -> None:
    ended_with, _, err = call(*arguments)
    assert (ended_with, told in err) == (code, True)


def test_a_conversation_is_removed_if_no_process_has_it(call: Call, saved: Path) -> None:
    shutil.copy(folder(saved) / "a.jsonl", folder(saved) / "c.jsonl")
    lock = locked(folder(saved) / "c.jsonl")
    assert lock is not None
    assert call("sessions", "rm", "c", "--yes")[0] == 2
    lock.release()
    assert call("sessions", "rm", "c", "--yes")[0] == 0
    assert {path.name for path in folder(saved).glob("*.jsonl")} == {"a.jsonl", "b.jsonl"}


def test_commands_on_saved_conversations_do_without_torch(saved: Path) -> None:
    program = (
        "import sys; from llamachat.cli import app\n"
        "for words in (['sessions', 'list'], ['sessions', 'show', 'a'], ['replay', 'a'],\n"
        "              ['sessions', 'export', 'md', 'a']):\n"
        "    sys.argv[1:] = words; assert app.run() == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run((sys.executable, "-c", program), saved).returncode == 0
