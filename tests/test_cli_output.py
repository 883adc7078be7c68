"""Where an answer goes (`-o`), what follows it (`-i`), and events of comparisons."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import SCRIPTED, environment
from scripted import TICKS, open_session

from llamachat.cli import app
from llamachat.terminal import comparison, reply

Call = Callable[..., tuple[int, str, str]]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals and limits")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """`llamachat` in this process: exit code, stdout, stderr; the model repeats what is asked."""
    monkeypatch.setattr(reply, "open_session", open_session)
    monkeypatch.setattr(comparison, "open_session", open_session)
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        pipes = [io.BytesIO(raw) for raw in (stdin, b"", b"")]
        for name, pipe in zip(("stdin", "stdout", "stderr"), pipes, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(pipe, "utf-8", newline="\n"))
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        exit_code = app.run()
        out, err = (pipe.getvalue().decode() for pipe in pipes[1:])
        return exit_code, out, err

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield call
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_the_answer_goes_to_a_file_and_statistics_to_stderr(
    call: Call, tmp_path: Path, flags: list[str]
) -> None:
    code, out, err = call("chat", "Größe", "-v", "-o", "answer", *flags)
    assert (code, out) == (0, "")
    assert "7 tokens" in err
    assert (tmp_path / "answer").read_bytes() == "Größe\n".encode()


def test_json_and_events_go_there_too(call: Call, tmp_path: Path) -> None:
    for flags in (["--json"], ["--json", "--stream"]):
        assert call("chat", "hello", "-o", "answer", *flags)[:2] == (0, "")
        last = (tmp_path / "answer").read_text().splitlines()[-1]
        assert json.loads(last)["text"] == "hello"
    assert call("compare", "hello", "-o", "answer", "--json")[:2] == (0, "")
    assert len(json.loads((tmp_path / "answer").read_text())["runs"]) == 2


def test_a_dash_is_stdout(call: Call, tmp_path: Path) -> None:
    assert call("chat", "hello", "-o", "-") == (0, "hello\n", "")
    assert not (tmp_path / "-").exists()


def test_an_interrupted_answer_replaces_the_file_as_far_as_it_came(
    call: Call, tmp_path: Path
) -> None:
    (tmp_path / "answer").write_text("old")
    assert call("chat", "interrupt the reply", "-o", "answer") == (130, "", "")
    assert (tmp_path / "answer").read_text() == f"{TICKS[:7]}\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code"), [(["hello" * 20, "-c", "64"], 6), (["hello", "-p", "x"], 2)]
)
def test_a_failure_leaves_the_file_as_it_was(
    call: Call, tmp_path: Path, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / "answer").write_text("old")
    assert call("chat", *arguments, "-o", "answer")[:2] == (exit_code, "")
    assert (tmp_path / "answer").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]


@pytest.mark.parametrize(
    ("file", "named"), [("folder", "is a folder"), ("none/answer", "no such folder")]
)
def test_a_file_that_cannot_be_is_told_before_anything_is_loaded(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, named: str
) -> None:
    def load(_: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(reply, "open_session", load)
    (tmp_path / "folder").mkdir()
    code, out, err = call("chat", "hello", "-o", file)
    assert (code, out) == (2, "")
    assert named in err


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_exit_7_and_names_the_file(call: Call) -> None:
    code, out, err = call("chat", "hello", "-o", "/dev/full")
    assert (code, out) == (7, "")
    assert err.startswith("llamachat: /dev/full: No space left on device\n")
    assert len(err.splitlines()) == 2


def test_a_comparison_tells_events_with_the_index_of_their_run(call: Call) -> None:
    specs = ["--with", "greedy", "--with", "random,seed=1"]
    code, out, _ = call("compare", "hello there", *specs, "--json", "--stream")
    first, *events = map(json.loads, out.splitlines())
    assert code == 0
    assert (first["event"], first["specs"]) == ("start", ["greedy", "random,seed=1"])
    done = {event["run"]: event for event in events if event["event"] == "done"}
    assert {run: event["spec"] for run, event in done.items()} == dict(enumerate(first["specs"]))
    for run, event in done.items():
        mine = (it for it in events if it["event"] == "token" and it["run"] == run)
        assert "".join(it["text"] for it in mine) == event["text"]
    (parted,) = (event for event in events if event["event"] == "parted")
    assert (parted["run"], parted["parts_at"]) == (1, 8)


def test_a_failed_comparison_tells_it_as_its_last_event(call: Call) -> None:
    code, out, _ = call("compare", "hello" * 20, "-c", "64", "--json", "--stream")
    last = json.loads(out.splitlines()[-1])
    assert (code, last["event"], last["exit_code"]) == (6, "error", 6)


def test_a_conversation_after_a_pipe_needs_a_terminal(call: Call) -> None:
    code, out, err = call("chat", "-i", stdin=b"hello")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2


@posix
def test_a_conversation_goes_on_from_the_keyboard_after_a_pipe(tmp_path: Path) -> None:
    import pexpect

    command = 'printf \'/line one\\nline two\\n\' | "$0" "$@"'
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", command, *SCRIPTED, "chat", "-i"],
        env=environment(tmp_path, PROMPT_TOOLKIT_NO_CPR="1"),  # type: ignore[arg-type]
        encoding="utf-8",
        timeout=20,
    )
    try:
        child.expect_exact(">>> /line one\\nline two")
        child.expect_exact("/line one\r\nline two\r\n")  # the reply, which repeats it
        child.expect_exact(">>>")
        child.send("recall\r")
        child.expect_exact("line two | recall")
        child.expect_exact(">>>")
        child.send("/exit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 0


@posix
def test_without_a_terminal_of_its_own_a_process_has_no_keyboard(tmp_path: Path) -> None:
    program = "import sys; from llamachat.terminal.keyboard import take_keyboard; take_keyboard()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env=environment(tmp_path),
        start_new_session=True,
    )
    assert "UsageError: a conversation needs a keyboard; /dev/tty" in done.stderr
