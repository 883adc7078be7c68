"""What nobody foresaw is one line and a log; what libraries say stays off the terminal."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
from programs import LLAMACHAT, SCRIPTED, environment, run

from llamachat.errors import TransferError, WillNotFitError
from llamachat.terminal.failure import understood

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and folders")
SECRET = "hf_abcdefgh"


def program(body: str) -> tuple[str, ...]:
    """`llamachat` with a model of which `body` is the loading."""
    lines = "\n    ".join(body.splitlines())
    source = (
        f"import sys; sys.path.insert(0, {str(Path(SCRIPTED[1]).parent)!r})\n"
        "from llamachat.terminal import opening\n"
        f"def broken(run, front=None):\n    {lines}\n"
        "opening.open_session = broken\n"
        "from llamachat.__main__ import main\n"
        "main()\n"
    )
    return (sys.executable, "-c", source)


def test_an_unexpected_failure_is_two_lines_and_a_private_log_without_words(
    tmp_path: Path,
) -> None:
    broken = program(f"try: 1 / 0\nexcept ZeroDivisionError: raise KeyError('{SECRET} my words')")
    done = run((*broken, "chat", "my question"), tmp_path)
    log = tmp_path / "data" / "llamachat.log"
    assert (done.returncode, done.stdout) == (1, b"")
    message, hint = done.stderr.decode().splitlines()
    assert message.startswith("llamachat: unexpected KeyError")
    assert f"a log was written to {log}" in hint
    text = log.read_text()
    assert "KeyError" in text
    assert "ZeroDivisionError" in text
    assert "app.py" in text
    assert not any(word in text for word in (SECRET + " my words'", "my question"))
    if os.name != "nt":
        assert log.stat().st_mode & 0o777 == 0o600
    assert b"Traceback" in run((*broken, "chat", "hello", "-v"), tmp_path).stderr


def test_what_libraries_log_and_warn_of_goes_to_the_log_without_secrets(tmp_path: Path) -> None:
    noisy = program(
        "import logging, threading, warnings\n"
        f"warnings.warn('deprecated {SECRET}')\n"
        "logging.getLogger('transformers').warning('too long')\n"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "from scripted import open_session\n"
        "return open_session(run)"
    )
    done = run((*noisy, "chat", "hello"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")
    text = (tmp_path / "data" / "llamachat.log").read_text()
    assert all(words in text for words in ("deprecated ...", "too long", "ZeroDivisionError"))
    assert SECRET not in text


def test_the_log_does_not_grow_without_end(tmp_path: Path) -> None:
    many = program(
        "import logging\nfor i in range(9000): logging.warning('x' * 100)\nraise OSError"
    )
    run((*many, "chat", "hello"), tmp_path)
    sizes = [file.stat().st_size for file in (tmp_path / "data").glob("llamachat.log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 1 << 18


@posix
def test_a_data_folder_that_cannot_be_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    done = run((*program("raise KeyError"), "chat", "x"), tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert run((*SCRIPTED, "chat", "hello"), tmp_path).stdout == b"hello\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_no_memory_left_is_exit_5(error: Exception) -> None:
    assert isinstance(understood(error), WillNotFitError)


def test_a_failure_of_the_disk_is_exit_7_and_names_the_file() -> None:
    found = understood(OSError(errno.EIO, "Input/output error", "/some/file"))
    assert isinstance(found, TransferError)
    assert str(found) == "/some/file: Input/output error"
    assert understood(error := ValueError("x")) is error


@posix
def test_a_conversation_outlives_every_failure_and_ends_with_its_terminal(tmp_path: Path) -> None:
    import pexpect

    failing = program(
        "from scripted import open_session\n"
        "opened, errors = open_session(run, front), [MemoryError(), KeyError('x')]\n"
        "generate = opened.model.engine.generate\n"
        "def fail(*args, **kwargs):\n"
        "    if errors: raise errors.pop()\n"
        "    return generate(*args, **kwargs)\n"
        "opened.model.engine.generate = fail\n"
        "return opened"
    )
    (tmp_path / "config.toml").write_text("[ui]\nmarkdown = false\n", "utf-8")
    child = pexpect.spawn(
        failing[0],
        [*failing[1:], "chat"],
        env=environment(tmp_path, PROMPT_TOOLKIT_NO_CPR="1"),  # type: ignore[arg-type]
        encoding="utf-8",
        timeout=20,
    )
    for told in ("unexpected KeyError", "out of memory", "\x1b[?2004lthree\r\n"):
        child.expect_exact(">>>")
        child.send("three\r")
        child.expect_exact(told)
    child.expect_exact(">>>")
    os.close(child.child_fd)
    child.closed = True
    child.wait()
    assert child.exitstatus == 128 + signal.SIGHUP


@posix
@pytest.mark.parametrize("command", [(*SCRIPTED, "chat", "hello"), (*LLAMACHAT, "list")])
def test_a_working_folder_that_is_gone_is_one_message(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && "$@"'
    done = run(("/bin/sh", "-c", script, str(gone), *command), tmp_path)
    assert (done.returncode, done.stdout) == (7, b"")
    assert done.stderr.decode().splitlines()[0] == "llamachat: the working folder is gone"


@posix
def test_nothing_at_all_in_the_environment_is_enough(tmp_path: Path) -> None:
    import subprocess

    known = {name: environment(tmp_path).get(name, "") for name in ("PATH", "LD_LIBRARY_PATH")}
    known |= {"HOME": "/nonexistent", "LLAMACHAT_CONFIG": str(tmp_path / "none")}
    done = subprocess.run(
        (*SCRIPTED, "chat", "Größe"), env=known, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "Größe\n", b"")
