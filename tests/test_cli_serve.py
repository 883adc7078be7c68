"""`llamachat serve` as a process: where it says it is, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from programs import LLAMACHAT, run, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
LONG = {"prompt": "abc", "max_tokens": 600, "logit_bias": {"257": -100}, "stream": True}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@contextmanager
def served(folder: Path, home: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address."""
    command = (*LLAMACHAT, "serve", "-m", str(folder), "--port", "0", "-t", "1")
    with start(command, home) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline().decode()
            found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", line)
            assert found, line
            yield process, found[1]
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_once_the_replies_that_run_are_whole(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with served(folder, tmp_path) as (process, url):
        request = Request(
            f"{url}/v1/completions", json.dumps(LONG).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=30) as response:
            first = response.readline()
            process.send_signal(number)
            lines = [first, *response.read().split(b"\n")]
        assert process.wait(15) == code
        data = [line[6:].strip() for line in lines if line.startswith(b"data: ")]
        assert data[-1] == b"[DONE]"
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_how_to_decode_comes_from_the_config_file_unless_a_client_says(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(
        '[defaults]\nstrategy = "greedy"\nlogit_bias = ["64=1000"]\n'
    )
    with served(folder, tmp_path) as (_, url):
        said: list[dict[str, Any]] = [{}, {"logit_bias": {"65": 1000}}, {"strategy": "top-k:1"}]
        assert [_completion(url, it) for it in said] == ["aaaa", "bbbb", "aaaa"]


def _completion(url: str, said: dict[str, Any]) -> str:
    body = json.dumps({"prompt": "abc", "max_tokens": 4, **said}).encode()
    request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return str(json.load(response)["choices"][0]["text"])


def test_an_address_in_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run((*LLAMACHAT, "serve", "--port", port), tmp_path)
    assert done.returncode == 7
    assert f"127.0.0.1, port {port}: ".encode() in done.stderr
