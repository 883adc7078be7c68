"""`llamachat chat` from the command line to the weights: a real model in real processes."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from programs import LLAMACHAT, run, signalled_at_import, start

CHAT = (*LLAMACHAT, "chat")
Runs = Mapping[str, "CompletedProcess[bytes]"]
PROMPT = "Once upon a time"
GREEDY = ("--strategy", "greedy", "--dtype", "float32", "-n", "40")
DRAWN = ("--temperature", "1.5", "--top-p", "1", "-n", "30", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(data: Path) -> str:
    return str(data / "models" / "stories260K" / "stories260K.gguf")


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All that needs torch, by name; two at a time, since importing it is most of their time."""
    home = tmp_path_factory.mktemp("home")
    configured = tmp_path_factory.mktemp("configured")
    (configured / "config.toml").write_text(
        f"[defaults]\nmodel = {json.dumps(model)}\ntemperature = 0\n", encoding="utf-8"
    )
    damaged = home / "damaged.gguf"
    damaged.write_bytes(Path(model).read_bytes()[:100_000])
    named = {"LLAMACHAT_MODEL": model, "LLAMACHAT_CHAT_SEED": "7"}
    cases: dict[str, tuple[tuple[str, ...], Path, dict[str, Any]]] = {
        "text": (("-m", model, *GREEDY, PROMPT), home, {}),
        "json": (("-m", model, *GREEDY, "--json"), home, {"stdin": PROMPT.encode()}),
        "events": (("-m", model, *GREEDY, "--json", "--stream", "-q", PROMPT), home, {}),
        "seed 7": (("-m", model, *DRAWN, "--seed", "7", PROMPT), home, {}),
        "variables": ((*DRAWN, "--no-stream", PROMPT), home, named),
        "config": (("-n", "5", "--json", PROMPT), configured, {}),
        "too long": (("-m", model, "-c", "64", PROMPT * 30), home, {}),
        "damaged": (("-m", str(damaged), PROMPT), home, {}),
        "stop": (("-m", model, *GREEDY, "--stop", "girl named", PROMPT), home, {}),
    }
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(run, (*CHAT, *arguments), folder, **options)
            for name, (arguments, folder, options) in cases.items()
        }
        return {name: each.result() for name, each in started.items()}


def test_the_answer_alone_goes_to_stdout(runs: Runs) -> None:
    done = runs["text"]
    assert done.returncode == 0
    text = done.stdout.decode()
    assert "there was a little girl named Lily" in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\x1b" not in text


def test_a_base_model_is_announced_on_stderr_unless_quiet(runs: Runs) -> None:
    assert b"no chat template" in runs["text"].stderr
    assert len(runs["text"].stderr.splitlines()) == 1
    assert runs["events"].stderr == b""


def test_json_and_events_say_what_the_text_says(runs: Runs) -> None:
    text = runs["text"].stdout.decode().removesuffix("\n")
    answer = json.loads(runs["json"].stdout)
    events = [json.loads(line) for line in runs["events"].stdout.splitlines()]
    pieces = [event["text"] for event in events if event["event"] == "token"]
    assert answer["text"].rstrip("\n") == "".join(pieces).rstrip("\n") == text.rstrip("\n")
    assert answer["token_ids"] == events[-1]["token_ids"]
    assert answer["completion_tokens"] == len(answer["token_ids"]) == 40
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["load_s"] > 0
    assert len(pieces) > 20


def test_a_seed_makes_an_answer_repeatable(runs: Runs) -> None:
    assert runs["seed 7"].stdout == runs["variables"].stdout
    assert runs["seed 7"].stdout != runs["text"].stdout[: len(runs["seed 7"].stdout)]


def test_variables_name_the_model_and_set_options(runs: Runs) -> None:
    assert runs["variables"].returncode == 0
    assert len(runs["variables"].stdout) > 10


def test_the_config_file_names_the_model_and_sets_the_temperature(runs: Runs, model: str) -> None:
    answer = json.loads(runs["config"].stdout)
    assert answer["model"] == model
    assert answer["strategy"]["name"] == "greedy"


def test_a_prompt_longer_than_the_context_is_exit_6_with_both_numbers(runs: Runs) -> None:
    done = runs["too long"]
    assert (done.returncode, done.stdout) == (6, b"")
    message = done.stderr.decode().splitlines()[-2]
    numbers = [int(word.strip(",")) for word in message.split() if word.strip(",").isdecimal()]
    assert 64 in numbers
    assert max(numbers) > 64


def test_a_damaged_file_is_exit_9_with_its_name_and_the_tensors(runs: Runs) -> None:
    done = runs["damaged"]
    assert (done.returncode, done.stdout) == (9, b"")
    assert b"damaged.gguf: token_embd.weight" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_stop_string_split_over_tokens_does_not_leak(runs: Runs) -> None:
    whole, cut = runs["text"].stdout.decode(), runs["stop"].stdout.decode()
    assert cut.rstrip("\n") == whole[: whole.index("girl named")]


@pytest.mark.parametrize(
    ("module", "number", "exit_code"),
    [("torch", "SIGTERM", 143), ("torch.nn", "SIGINT", 130), ("llamachat.loading", "SIGINT", 130)],
)
def test_a_signal_while_loading_leaves_at_once_and_quietly(
    model: str, tmp_path: Path, module: str, number: str, exit_code: int
) -> None:
    program = signalled_at_import(module, number)
    done = run((*program, "chat", "-q", "-m", model, "-n", "1", PROMPT), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, b"", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_at_some_point_of_loading_is_exit_130_and_leaves_nothing(
    model: str, tmp_path: Path
) -> None:
    with start((*CHAT, "-q", "-m", model, "-n", "1", PROMPT), tmp_path) as process:
        assert process.stdin is not None
        process.stdin.close()
        time.sleep(0.9)
        process.send_signal(signal.SIGINT)
        process.stdin = None
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("said_bytes", [1, 60])
def test_an_interrupted_answer_stays_and_ends_with_one_newline(
    model: str, tmp_path: Path, said_bytes: int
) -> None:
    arguments = ("-q", "-m", model, "--seed", "1", "-n", "480", PROMPT)
    with start((*CHAT, *arguments), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        said = process.stdout.read(said_bytes)
        process.send_signal(signal.SIGINT)
        process.stdin = None
        rest, err = process.communicate(timeout=30)
    text = (said + rest).decode()
    assert (process.returncode, err) == (130, b"")
    assert len(said) == said_bytes
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_what_is_wrong_before_loading_is_told_before_torch_is_imported(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("[defaults\n")
    (tmp_path / "hot").mkdir()
    (tmp_path / "hot" / "config.toml").write_text("[defaults]\ntemperature = 'hot'\n")
    greedy = ("-m", model, "--strategy", "greedy", "--top-p", "0.5")
    beams = ("-m", model, "--strategy", "beam:2", "--json")
    cases = [
        (("-m", "no-such-model"), "home", 3, ["no-such-model"]),
        (("-m", "org/no-such-model"), "home", 3, ["org/no-such-model", "pull"]),
        (("-m", str(tmp_path / "missing.gguf")), "home", 3, ["missing.gguf"]),
        (greedy, "home", 2, ["--strategy greedy", "--top-p 0.5"]),
        ((*beams, "--speculate", "4"), "home", 2, ["--speculate", "--num-beams"]),
        ((*beams, "--logprobs", "4"), "home", 2, ["--logprobs", "--num-beams"]),
        (("-m", model, "--temperature", "-1"), "home", 2, ["temperature", "-1"]),
        (("-m", model), "broken", 2, ["config.toml"]),
        (("-m", model), "hot", 2, ["config.toml", "temperature", "hot"]),
    ]
    for arguments, home, exit_code, named in cases:
        done = run(
            (sys.executable, "-X", "importtime", *CHAT[1:], *arguments, "hi"), tmp_path / home
        )
        lines = [line for line in done.stderr.decode().splitlines() if "import time:" not in line]
        assert (done.returncode, done.stdout) == (exit_code, b""), lines
        assert len(lines) <= 2
        assert all(name in " ".join(lines) for name in named), lines
        assert "| torch\n" not in done.stderr.decode(), arguments
