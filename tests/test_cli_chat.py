"""One answer: what is asked, what is written, and how it ends. The model is a scripted one."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted import TICKS, open_session

from llamachat.cli import app
from llamachat.terminal import reply

FIELDS = {
    "model", "revision", "quantize", "text", "finish_reason", "prompt_tokens",
    "completion_tokens", "token_ids", "seed", "strategy", "truncated", "timings",
}  # fmt: skip
TIMINGS = {"load_s", "prefill_s", "decode_s", "ttft_s", "prefill_tok_per_s", "decode_tok_per_s"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    out: str
    err: str


Ask = Callable[..., Ended]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ask]:
    """`llamachat chat` with arguments and stdin, in this process; it repeats the question."""
    monkeypatch.setattr(reply, "open_session", open_session)
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))

    def ask(*arguments: str, stdin: bytes = b"", command: str = "chat") -> Ended:
        pipes = [io.BytesIO(raw) for raw in (stdin, b"", b"")]
        streams = [io.TextIOWrapper(pipe, "utf-8", newline="\n") for pipe in pipes]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["llamachat", command, *arguments])
        exit_code = app.run()
        out, err = (pipe.getvalue().decode() for pipe in pipes[1:])
        return Ended(exit_code, out, err)

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield ask
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "stdin", "asked"),
    [
        (["why?"], b"", "why?"),
        (["-p", "why?"], b"", "why?"),
        ([], b"why?", "why?"),
        ([], b"why?\n", "why?"),
        ([], b"why?\n\n", "why?"),
        ([], b"\n\nwhy?", "\n\nwhy?"),
        (["why?"], b"context\n", "context\n\nwhy?"),
        (["-p", "why?"], b"context", "context\n\nwhy?"),
        (["why?"], b"\n", "why?"),
        ([], b"\xef\xbb\xbfwhy?", "why?"),
        ([], b"a\r\nb\r\n", "a\nb"),
        ([], "Größe ✓ 漢字".encode(), "Größe ✓ 漢字"),
        (["--", "-p"], b"", "-p"),
    ],
)
def test_the_question_is_stdin_and_then_the_prompt(
    ask: Ask, arguments: list[str], stdin: bytes, asked: str
) -> None:
    ended = ask(*arguments, stdin=stdin)
    assert (ended.exit_code, ended.out, ended.err) == (0, f"{asked}\n", "")


def test_files_come_first_each_fenced_with_its_name(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfprint(1)\r\n")
    (tmp_path / "b.txt").write_bytes(b"no newline")
    ended = ask("-f", str(tmp_path / "a.py"), "-f", str(tmp_path / "b.txt"), "Why?", stdin=b"in\n")
    assert ended.out == "```a.py\nprint(1)\n```\n\n```b.txt\nno newline\n```\n\nin\n\nWhy?\n"


def test_stdin_can_be_one_of_the_files(ask: Ask) -> None:
    assert ask("-f", "-", "Why?", stdin=b"in\n").out == "```stdin\nin\n```\n\nWhy?\n"


def test_a_file_alone_is_a_question(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "q").write_text("Why?")
    assert ask("-f", str(tmp_path / "q")).out == "```q\nWhy?\n```\n"


def test_a_fence_is_longer_than_those_in_the_file(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("````\ncode\n````\n")
    assert ask("-f", str(tmp_path / "a.md")).out.startswith("`````a.md\n````\ncode")


@pytest.mark.parametrize("source", ["stdin", "file", "prompt"])
def test_bytes_that_are_not_utf8_are_replaced_with_a_warning(
    ask: Ask, tmp_path: Path, source: str
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    arguments = {"stdin": [], "file": ["-f", str(tmp_path / "latin")], "prompt": ["caf\udce9"]}
    ended = ask(*arguments[source], stdin=b"caf\xe9" if source == "stdin" else b"")
    assert "caf\ufffd" in ended.out
    assert ended.err.count("\n") == 1
    assert "UTF-8" in ended.err


def test_a_replacement_character_that_was_written_is_no_reason_to_warn(ask: Ask) -> None:
    assert ask(stdin="\ufffd".encode()).err == ""


def test_the_system_message_comes_from_a_flag_or_a_file(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("Be kind.\n")
    assert ask("-s", "Be brief.", "system").out == "Be brief.\n"
    assert ask("--system-file", str(tmp_path / "rules"), "system").out == "Be kind.\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a", "-p", "b"], ["PROMPT", "-p"]),
        ([], ["empty"]),
        ([" \n"], ["empty"]),
        (["-f", "missing.txt", "a"], ["missing.txt", "No such file"]),
        (["-s", "a", "--system-file", "b", "c"], ["--system", "--system-file"]),
        (["--hf-token-file", "missing.txt", "a"], ["missing.txt"]),
        (["--no-such-flag", "a"], ["--no-such-flag"]),
        (["-n", "many", "a"], ["-n"]),
        (["-n", "0", "a"], ["-n"]),
        (["a", "b"], ["b"]),
    ],
)
def test_a_wrong_command_line_is_exit_2_with_a_message_and_a_hint(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    named: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = ask(*arguments)
    assert (ended.exit_code, ended.out) == (2, "")
    assert ended.err.startswith("llamachat: ")
    assert len(ended.err.splitlines()) <= 2
    assert all(name in ended.err for name in named)


def test_text_ends_with_exactly_one_newline(ask: Ask) -> None:
    assert ask("newlines").out == "\n\nfirst\n\nlast\n"
    assert ask("newlines", "--no-stream").out == "\n\nfirst\n\nlast\n"
    assert ask("nothing").out == "\n"


def test_a_file_gets_the_models_text_as_it_is(ask: Ask) -> None:
    assert ask("escapes").out == "safe\x1b]0;owned\x07\x1b[2J\x9b31mtext\n"


def test_json_is_one_object_with_all_that_is_known(ask: Ask) -> None:
    ended = ask("hello", "--json", "--seed", "3")
    answer = json.loads(ended.out)
    assert ended.out.count("\n") == 1
    assert answer.keys() == FIELDS
    assert answer["timings"].keys() == TIMINGS
    assert answer["truncated"] == {"turns": 0, "tokens": 0}
    assert answer["text"] == "hello"
    assert answer["token_ids"] == list(b"hello")
    assert answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] == 5
    assert (answer["model"], answer["revision"], answer["seed"]) == ("scripted", "r1", 3)
    assert answer["strategy"]["temperature"] == 0.5


def test_streamed_json_is_one_event_a_line(ask: Ask) -> None:
    events = [json.loads(line) for line in ask("hello", "--json", "--stream").out.splitlines()]
    kinds = [event["event"] for event in events]
    assert list(dict.fromkeys(kinds)) == ["start", "prefill", "token", "done"]
    assert "".join(event["text"] for event in events if event["event"] == "token") == "hello"
    assert events[-1].keys() == FIELDS | {"event"}


LOGPROB = {
    "id": 0xC3, "token": "\ufffd", "logprob": -0.693147, "filtered_logprob": 0.0,
}  # fmt: skip
RIVAL = {"id": 257, "token": "", "logprob": -0.693147, "filtered_logprob": None}


def test_logprobs_are_told_for_every_token_and_for_others(ask: Ask) -> None:
    answer = json.loads(ask("\u00e9!", "--json", "--logprobs", "2").out)
    assert [one["id"] for one in answer["logprobs"]] == answer["token_ids"]
    assert answer["logprobs"][0] == {**LOGPROB, "top": [LOGPROB, RIVAL]}
    assert answer["logprobs"][2]["token"] == "!"


def test_streamed_logprobs_come_one_token_an_event_and_text_stays_whole(ask: Ask) -> None:
    out = ask("\u00e9!", "--json", "--stream", "--logprobs", "2").out
    events = [json.loads(line) for line in out.splitlines()]
    tokens = [event for event in events if event["event"] == "token"]
    assert [event["text"] for event in tokens] == ["", "\u00e9", "!"]
    assert [one for event in tokens for one in event["logprobs"]] == events[-1]["logprobs"]


def test_logprobs_without_json_are_refused(ask: Ask) -> None:
    ended = ask("hello", "--logprobs", "2")
    assert (ended.exit_code, ended.out) == (2, "")
    assert "--logprobs needs --json" in ended.err
    assert ask("hello", "--json", "--logprobs", "21").exit_code == 2


def test_every_flag_of_decoding_is_told_in_the_strategy(ask: Ask) -> None:
    flags = {
        "--temp": 1.5, "--top-k": 30, "--top-p": 0.8, "--min-p": 0.1, "--typical-p": 0.7,
        "--epsilon-cutoff": 0.01, "--eta-cutoff": 0.02, "--repeat-penalty": 1.2,
        "--frequency-penalty": 0.3, "--presence-penalty": -0.4, "--no-repeat-ngram-size": 3,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    words += ["--logit-bias", "5=1.5", "--logit-bias", "6=-100", "--bad-word", "no"]
    strategy = json.loads(ask("hello", "--json", *words, "--samplers", "hf").out)["strategy"]
    for flag, value in flags.items():
        name = flag[2:].replace("-", "_")
        name = {"temp": "temperature", "repeat_penalty": "repetition_penalty"}.get(name, name)
        assert strategy[name] == value
    assert strategy["logit_bias"] == [[5, 1.5], [6, -100]]
    assert strategy["bad_words"] == [list(b"no"), list(b" no")]
    assert strategy["samplers"][:2] == ["temperature", "top_k"]


@pytest.mark.parametrize(
    "words", [["--samplers", "top_k;psychic"], ["--logit-bias", "5"], ["--bad-word", ""],
              ["--samplers", "top_k", "--top-p", "0.5"], ["--typical-p", "2"]],
)  # fmt: skip
def test_a_flag_of_decoding_that_cannot_be_is_exit_2(ask: Ask, words: list[str]) -> None:
    ended = ask("hello", *words)
    assert (ended.exit_code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) <= 2


def test_a_failure_is_the_last_event(ask: Ask) -> None:
    ended = ask("hello" * 20, "--json", "--stream", "-c", "64")
    last = json.loads(ended.out.splitlines()[-1])
    assert (last["event"], last["exit_code"], ended.exit_code) == ("error", 6, 6)
    assert "64" in last["message"]
    assert len(ended.err.splitlines()) <= 2


def test_a_bound_on_tokens_is_told(ask: Ask) -> None:
    answer = json.loads(ask("hello", "--json", "-n", "3").out)
    assert (answer["text"], answer["finish_reason"]) == ("hel", "length")


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_stop_string_ends_the_text_and_is_not_in_it(ask: Ask, flags: list[str]) -> None:
    assert ask("one two three", "--stop", "zwei", "--stop", "o t", *flags).out == "one tw\n"


def test_the_first_of_several_stop_strings_counts(ask: Ask) -> None:
    assert ask("one two three", "--stop", "three", "--stop", " tw").out == "one\n"


@pytest.mark.parametrize("flags", [[], ["--json"], ["-q"]])
def test_a_reply_that_was_ended_because_it_loops_says_so(ask: Ask, flags: list[str]) -> None:
    ended = ask("loop", "--stop-loops", "3", *flags)
    assert ended.exit_code == 0
    assert ("repeats itself" in ended.err) == (flags != ["-q"])
    assert "--json" not in flags or json.loads(ended.out)["finish_reason"] == "loop"


def test_variables_set_options_and_flags_win(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACHAT_CHAT_MAX_NEW_TOKENS", "2")
    assert ask("hello").out == "he\n"
    assert ask("hello", "-n", "3").out == "hel\n"


def test_another_programs_name_for_chat_reads_the_same_variables(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CHAT_MAX_NEW_TOKENS", "2")
    assert ask("hello", command="run").out == "he\n"


def test_verbose_shows_statistics_on_stderr(ask: Ask) -> None:
    ended = ask("hello", "-v")
    assert ended.out == "hello\n"
    assert "5 tokens" in ended.err


def test_an_unexpected_failure_is_exit_1_without_a_traceback(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(reply, "open_session", broken)
    ended = ask("hello")
    assert ended.exit_code == 1
    assert "ZeroDivisionError" in ended.err
    assert len(ended.err.splitlines()) == 2
    assert "Traceback" in ask("hello", "-v").err


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_an_interrupted_reply_is_written_as_far_as_it_came(ask: Ask, flags: list[str]) -> None:
    ended = ask("interrupt the reply", *flags)
    assert (ended.exit_code, ended.out, ended.err) == (130, f"{TICKS[:7]}\n", "")


def test_nothing_is_written_where_nothing_was_said(ask: Ask) -> None:
    ended = ask("interrupt the reading")
    assert (ended.exit_code, ended.out, ended.err) == (130, "", "")


@pytest.mark.parametrize("flags", [["--json"], ["--json", "--stream"]])
@pytest.mark.parametrize(("moment", "text"), [("reply", TICKS[:7]), ("reading", "")])
def test_json_says_that_a_reply_was_interrupted(
    ask: Ask, flags: list[str], moment: str, text: str
) -> None:
    ended = ask(f"interrupt the {moment}", *flags)
    last = json.loads(ended.out.splitlines()[-1])
    assert ended.exit_code == 130
    assert (last["finish_reason"], last["text"]) == ("interrupted", text)


@pytest.mark.parametrize("flag", ["-x", "--extract"])
def test_the_first_block_of_code_can_be_extracted(ask: Ask, flag: str) -> None:
    ended = ask("So:\n```python\nprint(1)\n\n```\nor\n```\nls\n```", flag)
    assert (ended.exit_code, ended.out, ended.err) == (0, "print(1)\n", "")


def test_an_answer_without_code_is_written_whole_and_a_notice_says_so(ask: Ask) -> None:
    ended = ask("no code", "-x")
    assert (ended.exit_code, ended.out) == (0, "no code\n")
    assert "no block of code" in ended.err


def test_code_is_not_extracted_from_json(ask: Ask) -> None:
    ended = ask("no code", "-x", "--json")
    assert ended.exit_code == 2
    assert "--extract" in ended.err
