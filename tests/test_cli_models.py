"""`list`, `show`, `where`, `rm`, `pull`, `tokenize`, `doctor`: outputs, exit codes, no torch."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import LLAMACHAT, environment, run

from llamachat import __version__, settings
from llamachat.cli import app

COMMIT = "c" * 40
REPO = "tiny/llama"


@pytest.fixture(scope="module")
def gguf(data: Path) -> str:
    return str(data / "models" / "stories260K" / "stories260K.gguf")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A model in the Hub's cache, small and whole."""
    folder = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("weights")
    return snapshot


Command = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def llamachat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """A command in this process: its exit code, and what it wrote to stdout and stderr."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings.config.cache_clear()

    def llamachat(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        pipes = [io.BytesIO(raw) for raw in (stdin, b"", b"")]
        for name, pipe in zip(("stdin", "stdout", "stderr"), pipes, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(pipe, "utf-8", newline="\n"))
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        exit_code = app.run()
        return exit_code, pipes[1].getvalue().decode(), pipes[2].getvalue().decode()

    yield llamachat
    settings.config.cache_clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands_and_the_exit_codes(
    llamachat: Command, arguments: list[str]
) -> None:
    exit_code, out, err = llamachat(*arguments)
    assert (exit_code, err) == (0, "")
    for name in ("chat", "pull", "list", "show", "where", "rm", "tokenize", "doctor"):
        assert f"\n  {name} " in out
    words = " ".join(out.split())
    assert all(f"{code} " in words for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130))
    assert "download " not in out


@pytest.mark.parametrize("name", ["chat", "pull", "list", "show", "where", "rm", "tokenize"])
def test_every_command_explains_itself(llamachat: Command, name: str) -> None:
    exit_code, out, _ = llamachat(name, "-h")
    assert exit_code == 0
    assert out.startswith(f"Usage: llamachat {name} ")


@pytest.mark.parametrize(
    ("alias", "name"), [("run", "chat"), ("download", "pull"), ("remove", "rm")]
)
def test_other_programs_names_of_a_command_are_understood(
    llamachat: Command, alias: str, name: str
) -> None:
    assert llamachat(alias, "-h") == llamachat(name, "-h")


def test_the_version_is_told(llamachat: Command) -> None:
    assert llamachat("--version") == (0, f"llamachat {__version__}\n", "")


def test_an_unknown_command_is_exit_2_with_the_nearest(llamachat: Command) -> None:
    exit_code, out, err = llamachat("lits")
    assert (exit_code, out) == (2, "")
    assert "'lits'" in err
    assert "'list'" in err
    assert len(err.splitlines()) == 2


def test_nothing_on_disk_is_no_failure(llamachat: Command) -> None:
    exit_code, out, err = llamachat("list")
    assert (exit_code, out) == (0, "")
    assert "pull" in err
    assert llamachat("list", "--json")[:2] == (0, "[]\n")


def test_list_shows_what_is_on_disk(llamachat: Command, installed: Path) -> None:
    exit_code, out, err = llamachat("list")
    assert (exit_code, err) == (0, "")
    headings, row_shown = out.splitlines()
    assert headings.split()[:3] == ["name", "family", "params"]
    assert row_shown.split()[:2] == [REPO, "0.0391M"]
    assert row_shown.endswith(str(installed))
    (row,) = json.loads(llamachat("list", "--json")[1])
    assert (row["name"], row["path"], row["installed"]) == (REPO, str(installed), True)


def test_list_all_shows_the_catalog_besides(llamachat: Command, installed: Path) -> None:
    names = [line.split()[0] for line in llamachat("list", "--all")[1].splitlines()[1:]]
    assert {REPO, "smollm2-135m"} <= set(names)
    rows = json.loads(llamachat("list", "--all", "--json")[1])
    assert [row["name"] for row in rows] == names


@pytest.mark.parametrize(
    ("asked", "has", "has_not"),
    [
        (["--max-size", "1b"], "smollm2-360m", "llama3-8b"),
        (["--family", "llama 3.1"], "llama3.1-405b", "llama3-8b"),
        (["--licence", "apache"], "tinyllama", "llama-7b"),
        (["--gated"], "llama3-8b", "tinyllama"),
        (["--not-gated"], "tinyllama", "llama3-8b"),
    ],
    ids=str,
)
def test_list_all_shows_what_is_asked_for_alone(
    llamachat: Command, asked: list[str], has: str, has_not: str
) -> None:
    names = {row["name"] for row in json.loads(llamachat("list", "--all", "--json", *asked)[1])}
    assert has in names
    assert has_not not in names


def test_a_size_that_is_none_is_exit_2(llamachat: Command) -> None:
    assert llamachat("list", "--max-size", "big")[0] == 2


def test_list_all_tells_size_context_licence_and_consent(llamachat: Command) -> None:
    lines = {line.split()[0]: line for line in llamachat("list", "--all")[1].splitlines()}
    assert lines["llama-2-7b-chat"].split() == [
        "llama-2-7b-chat", "Llama", "2", "6.74B", "not", "on", "disk", "4,096", "llama2", "gated",
        "meta-llama/Llama-2-7b-chat-hf",
    ]  # fmt: skip
    rows = {row["name"]: row for row in json.loads(llamachat("list", "--all", "--json")[1])}
    assert rows["chinese-alpaca-7b"] == {
        "name": "chinese-alpaca-7b",
        "repo": "hfl/chinese-alpaca-lora-7b",
        "installed": False,
        "also": [],
        "family": "Chinese-Alpaca",
        "params": 6_885_494_784,
        "context": 2048,
        "licence": "LLaMA research only",
        "gated": False,
        "template": "chinese-alpaca",
        "defaults": {"temperature": 0.2, "top_k": 40, "top_p": 0.9},
        "base": "llama-7b",
    }


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "-m", "luotuo-7b", "--offline", "Hello"),
        ("eval", "luotuo-7b", "--text", __file__),
        ("bench", "-m", "luotuo-7b"),
        ("quantize", "luotuo-7b", "--to", "int8"),
        ("merge", "luotuo-7b", "x", "-o", "out"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_a_part_of_a_model_alike(
    llamachat: Command, command: tuple[str, ...]
) -> None:
    exit_code, out, err = llamachat(*command)
    assert (exit_code, out) == (2, "")
    assert "luotuo-7b is no whole model" in err
    assert "llamachat merge llama-7b DIR" in err


def test_an_unknown_template_is_exit_2_with_the_names(llamachat: Command) -> None:
    exit_code, out, err = llamachat("chat", "--template", "vicunna", "--offline", "Hello")
    assert (exit_code, out) == (2, "")
    assert "did you mean vicuna?" in err
    assert "chinese-alpaca-2" in err


def test_where_is_the_path_and_nothing_else(llamachat: Command, installed: Path, gguf: str) -> None:
    assert llamachat("where", REPO) == (0, f"{installed}\n", "")
    assert llamachat("where", gguf) == (0, f"{gguf}\n", "")


@pytest.mark.parametrize("command", ["where", "show", "rm", "tokenize", "pull"])
def test_a_model_that_is_not_there_is_exit_3(llamachat: Command, command: str) -> None:
    exit_code, out, err = llamachat(command, "smolm2-135m", stdin=b"text")
    assert (exit_code, out) == (3, "")
    assert "smolm2-135m" in err
    assert "smollm2-135m" in err.splitlines()[1]


def test_pull_of_what_is_on_disk_fetches_nothing(llamachat: Command, installed: Path) -> None:
    assert llamachat("pull", REPO) == (0, f"{installed}\n", "")


def test_pull_offline_of_what_is_not_is_exit_3(llamachat: Command) -> None:
    exit_code, out, err = llamachat("pull", "smollm2-135m", "--offline")
    assert (exit_code, out) == (3, "")
    assert "network" in err


def test_rm_asks_and_will_not_where_nobody_can_answer(llamachat: Command, installed: Path) -> None:
    exit_code, out, err = llamachat("rm", REPO, stdin=b"y\n")
    assert (exit_code, out) == (2, "")
    assert "--yes" in err
    assert installed.exists()


def test_rm_yes_deletes_and_says_how_much(llamachat: Command, installed: Path) -> None:
    exit_code, out, err = llamachat("rm", REPO, REPO, "--yes")
    assert (exit_code, out) == (0, "")
    assert "freed" in err
    assert not installed.exists()
    assert llamachat("where", REPO)[0] == 3


def test_rm_of_a_path_leaves_it_alone(llamachat: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    exit_code, _, err = llamachat("rm", str(tmp_path / "mine.gguf"), "--yes")
    assert exit_code == 2
    assert "mine.gguf" in err
    assert (tmp_path / "mine.gguf").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
@pytest.mark.parametrize(("answer", "stays"), [(b"y\n", False), (b"\n", True), (b"no\n", True)])
def test_rm_on_a_terminal_does_what_it_is_told(
    installed: Path, tmp_path: Path, answer: bytes, stays: bool
) -> None:
    person, program = os.openpty()
    os.write(person, answer)
    done = run((*LLAMACHAT, "rm", REPO), tmp_path, stdin=program)
    os.close(person)
    os.close(program)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"[y/N]" in done.stderr
    assert str(installed).encode() in done.stderr
    assert installed.exists() is stays


def test_show_tells_config_size_and_files(llamachat: Command, gguf: str) -> None:
    facts = json.loads(llamachat("show", gguf, "--json")[1])
    assert facts["config"]["dim"] == 64
    assert facts["config"]["n_kv_heads"] == 4
    assert facts["size_bytes"] == Path(gguf).stat().st_size
    assert facts["files"] == [gguf]
    assert {"name", "path", "form", "params", "licence", "metadata"} <= facts.keys()
    exit_code, out, err = llamachat("show", gguf)
    assert (exit_code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["config.dim"] == "64"


def test_a_model_without_a_template_shows_none(llamachat: Command, gguf: str) -> None:
    exit_code, out, err = llamachat("show", gguf, "--template")
    assert (exit_code, out) == (3, "")
    assert "template" in err
    shown = json.loads(llamachat("show", gguf, "--template", "--json")[1])
    assert shown == {"template": None, "name": "none"}


def test_a_built_in_template_is_shown_as_it_writes(
    llamachat: Command, gguf: str, tmp_path: Path
) -> None:
    shutil.copy(gguf, tmp_path / "koala-7b.gguf")
    exit_code, out, err = llamachat("show", str(tmp_path / "koala-7b.gguf"), "--template")
    assert exit_code == 0
    assert out == (
        "<s>BEGINNING OF CONVERSATION: {system} USER: {user} GPT:{assistant}</s>USER: {user} GPT:\n"
    )
    assert "koala" in err


def test_a_conversation_is_rendered_as_text_and_ids(
    llamachat: Command, gguf: str, tmp_path: Path
) -> None:
    (tmp_path / "turns.json").write_text('[{"role": "user", "content": "Once upon"}]')
    exit_code, text, _ = llamachat("show", gguf, "--render", str(tmp_path / "turns.json"))
    assert exit_code == 0
    assert text.endswith("Once upon")
    shown = llamachat("show", gguf, "--render", str(tmp_path / "turns.json"), "--json")[1]
    rendered = json.loads(shown)
    ids = json.loads(llamachat("tokenize", gguf, "Once upon", "--json")[1])["ids"]
    assert rendered == {"text": text, "ids": [1, *ids]}


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"role": "user"}]', '[{"role": "owl", "content": "hu"}]',
                '[{"role": "user", "content": 1}]'],
)  # fmt: skip
def test_what_is_no_conversation_is_exit_2_with_the_files_name(
    llamachat: Command, gguf: str, tmp_path: Path, content: str
) -> None:
    (tmp_path / "turns.json").write_text(content)
    exit_code, out, err = llamachat("show", gguf, "--render", str(tmp_path / "turns.json"))
    assert (exit_code, out) == (2, "")
    assert "turns.json" in err


def test_tokenize_takes_an_argument_or_stdin(llamachat: Command, gguf: str) -> None:
    exit_code, out, err = llamachat("tokenize", gguf, "Once upon", "--json")
    assert (exit_code, err) == (0, "")
    tokens = json.loads(out)
    assert tokens.keys() == {"ids", "pieces"}
    assert len(tokens["ids"]) == len(tokens["pieces"])
    assert llamachat("tokenize", gguf, "--json", stdin=b"Once upon")[1] == out
    lines = llamachat("tokenize", gguf, "Once upon")[1].splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == tokens["ids"]


def test_tokenize_reads_stdin_byte_for_byte(llamachat: Command, gguf: str) -> None:
    def ids(stdin: bytes) -> list[int]:
        ids: list[int] = json.loads(llamachat("tokenize", gguf, "--json", stdin=stdin)[1])["ids"]
        return ids

    assert ids(b"") == []
    assert len({tuple(ids(stdin)) for stdin in (b"a", b"a\n", b"a\r\n", b"\xef\xbb\xbfa")}) == 4


def test_tokenize_takes_the_text_of_a_special_token_as_text(llamachat: Command, gguf: str) -> None:
    ids = json.loads(llamachat("tokenize", gguf, "<s>", "--json")[1])["ids"]
    assert 1 not in ids
    assert len(ids) > 1


def test_tokenize_refuses_what_is_not_utf8(llamachat: Command, gguf: str) -> None:
    exit_code, out, err = llamachat("tokenize", gguf, stdin=b"ab\xff")
    assert (exit_code, out) == (2, "")
    assert "byte 2" in err


def test_doctor_tells_versions_device_threads_and_backend(tmp_path: Path) -> None:
    done = run((*LLAMACHAT, "doctor", "--json"), tmp_path)
    findings = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert findings["versions"]["llamachat"] == __version__
    assert findings["device"] == "cpu"
    assert findings["threads"] >= 1
    assert findings["backend"] in ("native", "reference")
    assert findings["folders"]["cache"] == str(tmp_path / "cache")


def test_no_command_that_needs_no_weights_imports_torch(
    installed: Path, tmp_path: Path, gguf: str
) -> None:
    (tmp_path / "turns.json").write_text('[{"role": "user", "content": "Once upon"}]')
    commands = [
        ["--help"], ["list", "--all"], ["where", REPO], ["show", gguf], ["pull", REPO],
        ["show", gguf, "--render", str(tmp_path / "turns.json")], ["tokenize", gguf, "a"],
        ["rm", REPO, "--yes"],
    ]  # fmt: skip
    for arguments in commands:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *LLAMACHAT[1:], *arguments],
            capture_output=True,
            env=environment(tmp_path),
            text=True,
            check=False,
        )
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert done.returncode == 0, done.stderr[-500:]
        assert "llamachat.cli.app" in imported
        assert "torch" not in imported, arguments
