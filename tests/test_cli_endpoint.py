"""`--endpoint`: a server answers, with the streams and exit codes of a model in this process."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_faults import Api, Response, api_server, delta, failed, said

from llamachat import settings
from llamachat.cli import app

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def api() -> Iterator[Api]:
    with api_server() as server:
        yield server


@pytest.fixture
def run(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A command with `--endpoint`, in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(tmp_path / "data"))
    for name in ("OPENAI_API_KEY", "LLAMACHAT_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    settings.config.cache_clear()

    def run(*arguments: str, endpoint: bool = True) -> tuple[int, str, str]:
        pipes = [io.BytesIO() for _ in range(3)]
        streams = [io.TextIOWrapper(pipe, "utf-8", newline="\n") for pipe in pipes]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        named = ["--endpoint", api.url] if endpoint else []
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments, *named])
        exit_code = app.run()
        out, err = (pipe.getvalue().decode() for pipe in pipes[1:])
        return exit_code, out, err

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in handlers:
        signal.signal(number, handler)
    settings.config.cache_clear()


def test_only_the_text_goes_to_stdout(run: Run) -> None:
    assert run("chat", "Hi") == (0, "Hello\n", "")


def test_json_says_who_answered_and_what_was_counted(run: Run, api: Api) -> None:
    code, out, _ = run("chat", "Hi", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["model"], told["endpoint"], told["token_ids"]) == ("m", api.url, None)
    assert (told["prompt_tokens"], told["completion_tokens"]) == (9, 3)


def test_json_of_a_stream_is_one_event_a_line(run: Run) -> None:
    _, out, _ = run("chat", "Hi", "--json", "--stream")
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "start"
    assert "".join(it["text"] for it in events if it["event"] == "token") == "Hello"
    assert events[-1]["finish_reason"] == "stop"


def test_the_address_may_come_from_the_environment(
    run: Run, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_ENDPOINT", api.url)
    assert run("chat", "Hi", endpoint=False) == (0, "Hello\n", "")


def test_the_address_may_come_from_the_config_file(run: Run, api: Api, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[defaults]\nendpoint = "{api.url}"\nthreads = 2\n')
    assert run("chat", "Hi", endpoint=False) == (0, "Hello\n", "")


def test_an_empty_address_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACHAT_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run("chat", "Hi", "--endpoint", "", "-m", "/no/such/model", endpoint=False)
    assert code == 3
    assert "/no/such/model" in err


def test_the_key_comes_from_a_file(run: Run, api: Api, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    run("chat", "Hi", "--api-key-file", str(tmp_path / "key"))
    assert api.headers["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (failed(401), 4),
        (failed(404), 3),
        (failed(400, "maximum context length is 5"), 6),
        (failed(500), 7),
        (Response([delta("half")], cut=True), 7),
    ],
)
def test_failures_have_the_exit_codes_of_a_model_here(
    run: Run, api: Api, response: Response, code: int
) -> None:
    api.responses = [response]
    assert run("chat", "Hi")[0] == code


def test_text_that_came_before_a_cut_is_written(run: Run, api: Api) -> None:
    api.responses = [Response([delta("half of "), delta("it")], cut=True)]
    code, out, err = run("chat", "Hi")
    assert (code, out) == (7, "half of it\n")
    assert "broke off" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantize", "int4"], ["--threads", "2"], ["--speculate", "4"], ["--lora", "x"],
        ["--typical-p", "0.5"], ["--strategy", "beam:4"], ["--stop-loops", "3"],
    ],
)  # fmt: skip
def test_flags_that_a_server_cannot_follow_are_named(run: Run, api: Api, flags: list[str]) -> None:
    code, out, err = run("chat", "Hi", *flags)
    assert (code, out, api.asked) == (2, "", [])
    assert flags[0] in err


def test_a_session_goes_on_with_the_server(run: Run, api: Api) -> None:
    run("chat", "One?", "--session", "it")
    run("chat", "Two?", "--session", "it")
    assert [it["content"] for it in api.asked[1]["messages"]] == ["One?", "Hello", "Two?"]


def test_specs_are_compared(run: Run, api: Api) -> None:
    api.responses = [said("same", " a"), said("same", " b")]
    code, out, _ = run("compare", "Hi", "--json")
    assert code == 0
    assert [it["text"] for it in json.loads(out)["runs"]] == ["same a", "same b"]


def test_another_form_of_the_weights_is_refused(run: Run) -> None:
    code, _, err = run("compare", "Hi", "--with", "greedy,quantize=int4")
    assert code == 2
    assert "quantize=int4" in err


def test_speed_is_what_the_server_counts(run: Run, api: Api) -> None:
    parts = [step for _ in range(4) for step in (0.05, delta("x"))]
    api.responses = [
        said("x", counted=(100, 1)),
        Response([*parts, *said(counted=(50, 4)).steps]),
    ]
    code, out, err = run("bench", "-p", "0", "-n", "4", "-r", "2", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["test"], row["prompt_tokens"]) == ("tg4", 50)
    assert 10 < row["avg_ts"] < 22  # 3 tokens in 0.15 s
    assert row["ttft_s"] >= 0.05
    assert all(it["max_tokens"] == 4 for it in api.asked[1:])


def test_a_server_needs_no_torch(api: Api, tmp_path: Path) -> None:
    from programs import run as start

    program = (
        "import sys; from llamachat.cli import app; code = app.run(); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    ended = start((sys.executable, "-c", program, "chat", "Hi", "--endpoint", api.url), tmp_path)
    assert (ended.returncode, ended.stdout) == (0, b"Hello\n")
