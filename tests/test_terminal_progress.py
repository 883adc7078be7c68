"""Signs of life on stderr, where no person watches."""

from __future__ import annotations

import pytest

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
