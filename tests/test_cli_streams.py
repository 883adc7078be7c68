"""Pipes, terminals, signals and what is behind the three streams, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from programs import LLAMACHAT, SCRIPTED, environment, run, signalled_at_import, start
from scripted import TICKS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX streams and signals")

ASK = (*SCRIPTED, "chat")
FULL = Path("/dev/full")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: the person's, and the program's."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_a_reply_is_written_as_it_comes(tmp_path: Path) -> None:
    with start((*ASK, "slowly"), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert process.stdout.read(5) == b"tick "
        assert process.poll() is None
        process.kill()


def test_a_reader_that_leaves_early_ends_it_quietly(tmp_path: Path) -> None:
    with start((*ASK, "slowly"), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        assert process.stdout.read(5) == b"tick "
        process.stdout.close()
        assert process.wait(10) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--all"], ["--version"]])
def test_a_reader_that_was_never_there_is_no_failure(arguments: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run((*LLAMACHAT, *arguments), tmp_path, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "command",
    [(*ASK, "hello"), (*ASK, "hello", "--json"), (*LLAMACHAT, "list", "--all"), (*LLAMACHAT, "-h")],
    ids=["text", "json", "list", "help"],
)
def test_a_full_disk_is_exit_7_with_one_message(command: tuple[str, ...], tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        done = run(command, tmp_path, stdout=full)
    assert done.returncode == 7
    message, *hints = done.stderr.decode().splitlines()
    assert message == "llamachat: stdout: No space left on device"
    assert len(hints) == 1


@pytest.mark.parametrize(
    ("redirection", "exit_code", "out", "messages"),
    [
        ("hello <&-", 0, b"hello\n", 0),
        ("<&-", 2, b"", 2),
        ("hello >&-", 7, b"", 2),
        ("hello 2>&-", 0, b"hello\n", 0),
        ("hello --no-such-flag 2>&-", 2, b"", 0),
        ("hello <&- >&- 2>&-", 7, b"", 0),
    ],
)
def test_closed_streams_are_survived(
    tmp_path: Path, redirection: str, exit_code: int, out: bytes, messages: int
) -> None:
    done = run(("/bin/sh", "-c", f'"$@" {redirection}', "sh", *ASK), tmp_path)
    assert (done.returncode, done.stdout) == (exit_code, out)
    assert len(done.stderr.splitlines()) == messages


def test_a_locale_without_utf8_does_not_matter(tmp_path: Path) -> None:
    question = "Größe ✓ 漢字"
    for locale in ({"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = run(ASK, tmp_path, stdin=question.encode(), **locale)
        assert (done.returncode, done.stdout.decode()) == (0, f"{question}\n")


def test_a_pipe_that_stays_open_is_announced_after_two_seconds(tmp_path: Path) -> None:
    with start((*ASK, "hello"), tmp_path) as process:
        time.sleep(4)
        out, err = process.communicate(b"", timeout=10)
    assert (process.returncode, out) == (0, b"hello\n")
    assert len(err.splitlines()) == 1
    assert b"still open" in err


def test_no_prompt_on_a_terminal_with_stdout_elsewhere_is_exit_2(
    terminal: tuple[int, int], tmp_path: Path
) -> None:
    done = run(ASK, tmp_path, stdin=terminal[1])
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"llamachat: no prompt")


def test_an_answer_on_a_terminal_cannot_control_it(
    terminal: tuple[int, int], tmp_path: Path
) -> None:
    done = run((*ASK, "escapes"), tmp_path, stdout=terminal[1])
    assert done.returncode == 0
    assert os.read(terminal[0], 1000) == b"safe\\x1b]0;owned\\x07\\x1b[2J\\x9b31mtext\r\n"


@pytest.mark.parametrize("moment", ["read slowly", "slowly"])
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_reply_with_what_was_said_and_its_code(
    tmp_path: Path, moment: str, number: signal.Signals, exit_code: int
) -> None:
    with start((*ASK, moment, "-v"), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        said = process.stdout.read(5) if moment == "slowly" else time.sleep(2) or b""
        process.send_signal(number)
        said += process.stdout.read()
        assert process.wait(10) == exit_code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    text = said.decode().removesuffix("\n")
    assert TICKS.startswith(text)
    assert said.endswith(b"\n") == bool(text)


@pytest.mark.parametrize(("number", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_the_program_starts_leaves_at_once(
    tmp_path: Path, number: str, exit_code: int
) -> None:
    done = run((*signalled_at_import("llamachat.cli.chat", number), "--help"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, b"", b"")


@pytest.mark.parametrize("ending", ["it ends", "SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_is_left_behind(tmp_path: Path, ending: str) -> None:
    """The template's sandbox is a process of its own, and has no terminal to tell it to end."""
    limit = "25" if ending == "it ends" else "9999"
    with start((*ASK, "slowly", "-n", limit), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert process.stdout.read(1) == b"t"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 1
        if ending != "it ends":
            process.send_signal(getattr(signal, ending))
        process.wait(10)
    assert ends(workers[0], within_s=5)


def test_a_template_without_end_does_not_outlive_a_killed_program(tmp_path: Path) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    program = (
        "from llamachat.chat.sandbox import Sandbox\n"
        "sandbox = Sandbox(time_limit_s=1)\n"
        "sandbox.render('', {})\n"
        "print('ready', flush=True)\n"
        f"sandbox.render({endless!r}, {{}})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment(tmp_path)
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (worker,) = psutil.Process(process.pid).children()
        time.sleep(0.3)
        process.kill()
    assert worker.is_running()
    assert ends(worker, within_s=10)


def ends(process: psutil.Process, *, within_s: float) -> bool:
    """Whether a process that is not our child ends; nobody may have asked how it did."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
