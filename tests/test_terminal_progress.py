"""Signs of life on stderr."""

from __future__ import annotations

import os

import pytest

from llamachat.terminal import progress
from llamachat.terminal.failure import Notices
from llamachat.terminal.progress import download_progress


def test_a_download_that_is_done_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with download_progress(quiet=False) as progress:
        assert progress is not None
        for done in (0, 40_000_000, 93_000_000, 93_000_000):
            progress(done, 93_000_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llamachat: 93 of 93 MB")


def test_a_quiet_download_has_nobody_to_tell() -> None:
    with download_progress(quiet=True) as progress:
        assert progress is None


def test_what_is_said_while_a_model_loads_has_a_line_of_its_own(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    with progress.loading(Notices()) as notice:
        notice("compiling kernels: 3/8")
    written = capfd.readouterr().err.split("\n")
    assert "loading…" in written[0]
    assert [line.split("\r\033[K")[-1] for line in written] == [
        "llamachat: compiling kernels: 3/8",
        "",
    ]
