"""Settings on the command line: who decides what, `llamachat config`, help and completion."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import LLAMACHAT, environment, run
from scripted import open_session

from llamachat import settings
from llamachat.cli import app
from llamachat.cli.manual import CODES, ENDINGS, EXAMPLES
from llamachat.terminal import reply
from llamachat.terminal.opening import Opened, Run

COMMANDS = [name for name, _ in app.COMMANDS]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the config file is."""
    return tmp_path / "config.toml"


@pytest.fixture
def opened() -> list[Opened]:
    """The sessions that were opened."""
    return []


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path, opened: list[Opened]
) -> Iterator[Call]:
    """`llamachat` in this process, with a model that repeats what is asked."""

    def opening(run: Run) -> Opened:
        opened.append(open_session(run))
        return opened[-1]

    monkeypatch.setattr(reply, "open_session", opening)
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(file))
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("LLAMACHAT_MODEL", raising=False)

    def call(*arguments: str) -> Ended:
        settings.config.cache_clear()
        pipes = [io.BytesIO() for _ in range(3)]
        for name, pipe in zip(("stdin", "stdout", "stderr"), pipes, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(pipe, "utf-8", newline="\n"))
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        exit_code = app.run()
        return Ended(exit_code, *(pipe.getvalue().decode() for pipe in pipes[1:]))

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield call
    for number, handler in handlers:
        signal.signal(number, handler)
    settings.config.cache_clear()


def test_the_file_sets_what_no_flag_and_no_variable_does(
    call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[defaults]\nmax-new-tokens = 2\n")
    assert call("chat", "hello").out == "he\n"
    monkeypatch.setenv("LLAMACHAT_CHAT_MAX_NEW_TOKENS", "3")
    assert call("chat", "hello").out == "hel\n"
    assert call("chat", "hello", "-n", "4").out == "hell\n"


def test_a_models_own_settings_come_before_those_of_all(call: Call, file: Path) -> None:
    file.write_text("[defaults]\nmax_new_tokens = 2\n[models.mine]\nmax_new_tokens = 3\n")
    assert call("chat", "hello").out == "he\n"
    assert call("chat", "hello", "-m", "mine").out == "hel\n"


def test_the_settings_of_chat_are_those_of_compare(call: Call, file: Path) -> None:
    file.write_text("[defaults]\nquiet = 3\n")
    ended = call("compare", "hello")
    assert (ended.exit_code, ended.out) == (2, "")
    assert f"{file}, line 2: quiet is 3" in ended.err


def test_every_value_tells_who_said_it(
    call: Call, file: Path, monkeypatch: pytest.MonkeyPatch, opened: list[Opened]
) -> None:
    file.write_text("[defaults]\nmin_p = 0.3\n[models.mine]\ntop_k = 4\nstop_loops = 3\n")
    monkeypatch.setenv("LLAMACHAT_CHAT_TOP_P", "0.2")
    call("chat", "hello", "-m", "mine", "--typical-p", "0.1", "-n", "3")
    options = opened[0].session.options
    origins = {name: origin for name, (_, origin) in options.values().items()}
    assert {name: origins[name] for name in ("typical_p", "top_p", "min_p", "top_k")} == {
        "typical_p": "flag",
        "top_p": "LLAMACHAT_CHAT_TOP_P",
        "min_p": "config.toml",
        "top_k": "config.toml [models.mine]",
    }
    assert origins["temperature"] == "generation_config.json"
    assert options.origin("max_new_tokens") == "flag"
    assert options.origin("stop_loops") == "config.toml [models.mine]"


def test_a_variable_yields_to_a_flag_that_contradicts_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CHAT_TOP_P", "0.5")
    assert call("chat", "hello", "--strategy", "greedy").exit_code == 0
    assert call("chat", "hello", "--strategy", "greedy", "--top-p", "0.5").exit_code == 2


def test_a_flag_of_the_system_message_wins_over_the_other_one_in_the_file(
    call: Call, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "rules").write_text("From a file.")
    file.write_text("[defaults]\nsystem = 'Of all.'\n")
    assert call("chat", "system").out == "Of all.\n"
    assert call("chat", "system", "--system-file", str(tmp_path / "rules")).out == "From a file.\n"
    file.write_text(f"[defaults]\nsystem_file = '{tmp_path / 'rules'}'\n")
    assert call("chat", "system", "-s", "Now.").out == "Now.\n"


def test_a_variable_that_cannot_be_read_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CHAT_TOP_K", "many")
    ended = call("chat", "hello")
    assert ended.exit_code == 2
    assert "LLAMACHAT_CHAT_TOP_K" in ended.err
    assert len(ended.err.splitlines()) == 2


def test_every_option_of_every_command_has_the_variable_that_help_promises() -> None:
    import typer

    program: Any = typer.main.get_command(app.app)
    for name in COMMANDS:
        command = program.commands[name]
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                variable = f"LLAMACHAT_{name.upper()}_{option.name.upper()}"
                flag = option.opts[0].lstrip("-").upper().replace("-", "_")
                named = option.envvar or variable
                assert named == f"LLAMACHAT_{name.upper()}_{flag}"


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"[defaults", "line 1"), (b"[defaults]\nsed = 1", "did you mean seed?"), (b"\xff", "utf-8")],
)
def test_a_file_that_is_wrong_is_exit_2_but_help_still_helps(
    call: Call, file: Path, content: bytes, named: str
) -> None:
    file.write_bytes(content)
    ended = call("chat", "hello")
    assert (ended.exit_code, ended.out) == (2, "")
    assert str(file) in ended.err
    assert named in ended.err
    assert len(ended.err.splitlines()) <= 2
    assert call("chat", "--help").exit_code == 0


def test_a_file_that_cannot_be_read_is_exit_2(call: Call, file: Path) -> None:
    file.mkdir()
    ended = call("chat", "hello")
    assert (ended.exit_code, ended.out) == (2, "")
    assert str(file) in ended.err


def test_config_shows_where_it_is_and_keeps_what_is_set(call: Call, file: Path) -> None:
    assert call("config", "path").out == f"{file}\n"
    ended = call("config", "set", "temperature", "0.25")
    assert (ended.exit_code, ended.out) == (0, "")
    assert file.read_text() == "[defaults]\ntemperature = 0.25\n"
    ended = call("config", "set", "temprature", "1")
    assert (ended.exit_code, ended.out) == (2, "")
    assert "did you mean temperature?" in ended.err


def test_config_shows_every_setting_with_who_decides_it(
    call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        "[defaults]\nmodel = 'mine'\ntop_k = 7\n[models.other]\ntop_k = 8\n[ui]\ntoolbar = false\n"
    )
    monkeypatch.setenv("LLAMACHAT_CHAT_MIN_P", "0.2")
    shown = json.loads(call("config", "show", "--json").out)
    told = {name: (it["value"], it["origin"]) for name, it in shown["settings"].items()}
    assert told["model"] == ("mine", "config.toml")
    assert told["top_k"] == (7, "config.toml")
    assert told["min_p"] == (0.2, "LLAMACHAT_CHAT_MIN_P")
    assert told["top_p"] == (0.9, "built in")
    assert told["quantize"] == ("auto", "built in")
    assert shown["ui"]["toolbar"] is False
    assert shown["path"] == str(file)
    of_other = call("config", "show", "-m", "other").out
    assert re.search(r"^top_k +8 +config\.toml \[models\.other\]$", of_other, re.MULTILINE)
    assert re.search(r"^ui\.toolbar +false$", of_other, re.MULTILINE)


@pytest.mark.parametrize("arguments", [("config", "show"), ("chat", "--help")])
def test_settings_and_help_are_shown_without_torch(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command = (sys.executable, "-X", "importtime", *LLAMACHAT[1:], *arguments)
    done = run(command, tmp_path)
    assert done.returncode == 0
    assert not re.search(rb"\|\s+(torch|numpy)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_and_exit_codes(call: Call, command: str) -> None:
    ended = call(*command.split(), "--help")
    assert ended.exit_code == 0
    examples = [line.strip() for line in ended.out.splitlines()]
    assert all(line in examples for line in EXAMPLES[command])
    told = " ".join(ended.out.split())
    assert all(f"{code} {CODES[code]}" in told for code in ENDINGS[command])


def test_every_command_has_examples() -> None:
    assert {*COMMANDS, *(f"config {name}" for name, _ in app.SETTINGS), "", "config"} <= {*EXAMPLES}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chat -m smollm2-1", {"smollm2-135m", "smollm2-1.7b", "smollm2-1-of-mine"}),
        ("show org", {"org/name:model.gguf"}),
        ("compare --quantize int", {"int8", "int4"}),
        ("chat --session a-", {"a-trip"}),
        ("sessions show a", {"a-trip"}),
        ("config set temp", {"temperature", "template"}),
    ],
)
def test_a_shell_completes_names_without_torch(
    tmp_path: Path, words: str, expected: set[str]
) -> None:
    (tmp_path / "config.toml").write_text("[aliases]\nsmollm2-1-of-mine = 'org/name'\n")
    add_model(tmp_path / "hub" / "models--org--name")
    (tmp_path / "data" / "sessions").mkdir(parents=True)
    (tmp_path / "data" / "sessions" / "a-trip.jsonl").touch()
    asked = {
        "_LLAMACHAT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"llamachat {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = subprocess.run(
        (sys.executable, "-X", "importtime", *LLAMACHAT[1:]),
        capture_output=True,
        encoding="utf-8",
        env=environment(tmp_path, **asked),
        check=True,
    )
    assert {*done.stdout.split()} == expected
    assert not re.search(r"\|\s+(torch|numpy)$", done.stderr, re.MULTILINE)


def add_model(folder: Path) -> None:
    """A repository in the cache of the Hub with a file that looks like a model."""
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.gguf").write_text("x")
