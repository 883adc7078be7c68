"""`--tensor-parallel` of the commands that load a model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import LLAMACHAT, environment, run

from llamachat import settings
from llamachat.cli import app

COMMANDS = {
    "chat": ("chat", "hi", "--device", "cpu", "-m"),
    "compare": ("compare", "hi", "--device", "cpu", "-m"),
    "bench": ("bench", "--device", "cpu", "-m"),
    "eval": ("eval", "--text", __file__),
    "serve": ("serve", "--port", "0", "--device", "cpu", "-m"),
}


@pytest.fixture
def llamachat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """The program in this process: its exit code, and what it wrote to stderr."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings.config.cache_clear()

    def program(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        return app.run(), capfd.readouterr().err

    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield program
    settings.config.cache_clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_takes_it(
    llamachat: Callable[..., tuple[int, str]], folder: str, command: str
) -> None:
    if command == "serve":
        pytest.importorskip("starlette")
    exit_code, said = llamachat(*COMMANDS[command], folder, "--tensor-parallel", "3")
    assert exit_code == 2
    assert said.startswith("llamachat: --tensor-parallel 3 does not divide")


def test_a_server_is_not_told_how_to_share_its_model(
    llamachat: Callable[..., tuple[int, str]],
) -> None:
    url = "http://127.0.0.1:9/v1"
    exit_code, said = llamachat("chat", "hi", "--endpoint", url, "--tensor-parallel", "2")
    assert exit_code == 2
    assert "--tensor-parallel and --endpoint contradict each other" in said


def test_bench_measures_a_model_that_two_processes_share(folder: str, tmp_path: Path) -> None:
    flags = ("-p", "0", "-n", "2", "-r", "1", "-t", "1", "--device", "cpu", "--json")
    done = run((*LLAMACHAT, "bench", "-m", folder, "--tensor-parallel", "2", *flags), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [it["tensor_parallel"] for it in json.loads(done.stdout)] == [2]
