"""A process that runs a model together with others is lost, or stops."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from programs import environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
LEADER = str(Path(__file__).with_name("sharded_phases.py"))
SOON_S = 5


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=100_000)


@contextmanager
def leading(
    folder: Path, phase: str, home: Path
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """The first process, in that phase, and the other."""
    leader = subprocess.Popen(
        [sys.executable, LEADER, str(folder), phase],
        env=environment(home, TMPDIR=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    other = None
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == f"{phase}\n"
        while other is None:
            assert leader.poll() is None
            children = psutil.Process(leader.pid).children()
            other = next(
                (it for it in children if "llamachat.loading.follower" in _words(it)), None
            )
            time.sleep(0.01)
        yield leader, other
    finally:
        for it in (leader, other):
            with suppress(psutil.Error):
                if it is not None:
                    it.kill()
        leader.communicate()


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.mark.parametrize("phase", ["load", "prefill", "queued", "idle"])
def test_a_killed_process_ends_all_with_one_line(folder: Path, phase: str, tmp_path: Path) -> None:
    with leading(folder, phase, tmp_path) as (leader, other):
        other.kill()
        out, errors = leader.communicate(timeout=SOON_S)
    assert (leader.returncode, out) == (1, "")
    said = "process 1 of the 2 that run the model together ended by signal 9"
    assert errors == f"llamachat: {said}\n"
    assert not [*tmp_path.glob("llamachat-ranks-*")]


@pytest.mark.parametrize("phase", ["decode", "queued"])
def test_a_process_that_is_stopped_for_long_ends_all(
    folder: Path, phase: str, tmp_path: Path
) -> None:
    with leading(folder, phase, tmp_path) as (leader, other):
        other.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        other.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert leader.poll() is None
        other.send_signal(signal.SIGSTOP)
        out, errors = leader.communicate(timeout=3 + SOON_S)
    assert (leader.returncode, out) == (1, "")
    said = "process 1 of the 2 that run the model together was stopped for 3 s"
    assert errors == f"llamachat: {said}\n"


def test_after_a_pass_that_failed_in_the_first_process_there_are_no_others(
    folder: Path, tmp_path: Path
) -> None:
    with leading(folder, "failed", tmp_path) as (leader, other):
        out, _ = leader.communicate(timeout=2 * SOON_S)
        other.wait(SOON_S)
    assert leader.returncode == 0
    lost = "one of the 2 processes that run the model together has ended"
    assert out.splitlines() == ["failed", lost]
    assert not [*tmp_path.glob("llamachat-ranks-*")]


def test_the_others_end_with_the_first(folder: Path, tmp_path: Path) -> None:
    with leading(folder, "idle", tmp_path) as (leader, other):
        leader.kill()
        other.wait(SOON_S)
    assert not [*tmp_path.glob("llamachat-ranks-*")]
