"""Several answers: what is written, in which form, and how it ends. The model is a scripted one."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scripted
from programs import SCRIPTED, environment, start
from scripted import TICKS

from llamachat.cli import app
from llamachat.terminal import comparison

RUN = {
    "spec", "model", "revision", "quantize", "text", "finish_reason", "prompt_tokens",
    "completion_tokens", "token_ids", "seed", "strategy", "truncated", "timings", "mean_logprob",
    "parts_at", "parts",
}  # fmt: skip
WITH = ("--with", "greedy", "--with", "top-k:5,seed=3", "--with", "beam:2")
RATE = re.compile(r" · [0-9.]+ tok/s")

Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compare]:
    """`llamachat compare` with arguments and stdin, in this process."""
    monkeypatch.setattr(comparison, "open_session", scripted.open_session)
    monkeypatch.setattr(comparison, "reopened", scripted.reopened)
    monkeypatch.setenv("LLAMACHAT_CONFIG", str(tmp_path / "config.toml"))

    def compare(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        pipes = [io.BytesIO(raw) for raw in (stdin, b"", b"")]
        streams = [io.TextIOWrapper(pipe, "utf-8", newline="\n") for pipe in pipes]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["llamachat", "compare", *arguments])
        exit_code = app.run()
        out, err = (pipe.getvalue().decode() for pipe in pipes[1:])
        return exit_code, RATE.sub("", out), err

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield compare
    for number, handler in handlers:
        signal.signal(number, handler)


def test_a_pipe_gets_one_answer_after_the_other_with_its_figures(compare: Compare) -> None:
    assert compare("Name three rivers", *WITH) == (
        0,
        "== greedy\nName three rivers\n-- 17 tokens · mean logprob -0.500\n"
        "\n== top-k:5,seed=3\nName thrEE RIVERS\n"
        "-- 17 tokens · mean logprob -0.500 · seed 3\n"
        "-- parts from greedy at token 8: 'E', there 'e'\n"
        "\n== beam:2\nName \n-- 5 tokens · mean logprob -0.500\n"
        "-- parts from greedy at token 5: the end, there 't'\n",
        "",
    )


def test_the_default_is_greedy_beside_what_the_model_suggests(compare: Compare) -> None:
    code, out, _ = compare("--json", stdin=b"short\n")
    runs = json.loads(out)["runs"]
    assert code == 0
    assert [(run["spec"], run["strategy"]["name"]) for run in runs] == [
        ("greedy", "greedy"),
        ("default", "sample"),
    ]
    assert runs[1]["strategy"]["temperature"] == 0.5
    assert "the same as greedy" in compare("short")[1]


def test_json_has_every_run_as_chat_tells_it_and_where_they_part(compare: Compare) -> None:
    code, out, err = compare("Name three rivers", *WITH, "--json")
    runs = json.loads(out)["runs"]
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [run.keys() for run in runs] == [RUN] * 3
    assert [run["parts_at"] for run in runs] == [None, 8, 5]
    assert [run["parts"] for run in runs] == [None, ["e", "E"], ["t", None]]
    assert [run["mean_logprob"] for run in runs] == [-0.5] * 3
    assert [run["spec"] for run in runs] == list(WITH[1::2])


def test_another_quantization_comes_last_and_is_told_in_its_place(compare: Compare) -> None:
    specs = ("--with", "greedy", "--with", "greedy,quantize=int4", "--with", "beam:2")
    runs = json.loads(compare("hello", *specs, "--json")[1])["runs"]
    assert [(run["quantize"], run["timings"]["load_s"]) for run in runs] == [
        ("none", 0.1), ("int4", 0.2), ("none", 0.1),
    ]  # fmt: skip
    headings = [line for line in compare("hello", *specs)[1].splitlines() if line[:2] == "=="]
    assert headings == ["== greedy", "== beam:2", "== greedy,quantize=int4"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a", "--with", "greedy,top-p=0.5"], ["--strategy greedy", "--top-p 0.5"]),
        (["a", "--with", "beem:4"], ["beem:4"]),
        (["a", "--with", "quantize=int3"], ["int3"]),
        (["a", "--top-p", "0.5"], ["--top-p"]),
        (["a", "-p", "b"], ["PROMPT", "-p"]),
        ([], ["empty"]),
    ],
)
def test_a_wrong_command_line_is_exit_2_and_names_the_words(
    compare: Compare, arguments: list[str], named: list[str]
) -> None:
    code, out, err = compare(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) <= 2
    assert all(word in err for word in named)


def test_an_interrupt_writes_what_there_is(compare: Compare) -> None:
    code, out, err = compare("interrupt the reply", "--with", "greedy", "--with", "beam:2")
    assert (code, err) == (130, "")
    assert out.startswith(f"== greedy\n{TICKS[:7]}\n-- 7 tokens")
    assert "interrupted" in out
    assert out.count("== beam:2\ntick \n-- 5 tokens") == 1


def test_json_of_an_interrupted_comparison_has_the_runs_that_began(compare: Compare) -> None:
    specs = ("--with", "greedy", "--with", "greedy,quantize=int4")
    code, out, _ = compare("interrupt the reply", *specs, "--json")
    runs = json.loads(out)["runs"]
    assert code == 130
    assert [(run["text"], run["finish_reason"]) for run in runs] == [(TICKS[:7], "interrupted")]


if sys.platform != "win32":
    import pexpect

    def on_terminal(home: Path, columns: int, *arguments: str, **variables: str) -> str:
        child = pexpect.spawn(
            SCRIPTED[0], [SCRIPTED[1], "compare", *arguments, "-q"],
            env=environment(home, **variables), dimensions=(12, columns), encoding="utf-8",
            timeout=30,
        )  # fmt: skip
        child.expect(pexpect.EOF)
        child.close()
        return str(child.before)

    def screen(written: str) -> list[str]:
        """The lines of a terminal that scrolls for ever, as the few escapes in use draw them."""
        lines, row = [""], 0
        column = 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                column = 0
            elif part.endswith("A"):
                row -= int(part[2:-1])
            elif part == "\x1b[2K":
                lines[row] = ""
            elif not part.startswith("\x1b"):
                lines[row] = (
                    lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
                )
                column += len(part)
        return [RATE.sub("", line).rstrip() for line in lines]

    @pytest.mark.parametrize(
        ("columns", "variables"), [(100, {}), (200, {}), (100, {"NO_COLOR": "1"})]
    )
    def test_a_wide_terminal_shows_columns(
        tmp_path: Path, columns: int, variables: dict[str, str]
    ) -> None:
        question = "Name three rivers\n\n" + " ".join(f"w{n}" for n in range(200)) + "\nend"
        written = on_terminal(tmp_path, columns, question, *WITH[:4], **variables)
        lines = screen(written)
        width = (columns - 2) // 2
        assert lines[0] == "greedy".ljust(width + 2) + "top-k:5,seed=3"
        left = [line[:width].rstrip() for line in lines]
        right = [line[width + 2 :].rstrip() for line in lines]
        whole = " ".join(question.split())
        assert " ".join(" ".join(left[1:]).split()).startswith(f"{whole} ")
        sampled = (question[:8] + "»" + question[8:].upper()).split()
        assert " ".join(" ".join(right[1:]).split()).startswith(" ".join(sampled) + " ")
        assert "parts from greedy at token 8" in " ".join(" ".join(right).split())
        assert max(map(len, lines)) <= columns
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", written)

    @pytest.mark.parametrize(("columns", "variables"), [(60, {}), (100, {"TERM": "dumb"})])
    def test_a_narrow_or_dumb_terminal_shows_one_after_the_other(
        tmp_path: Path, columns: int, variables: dict[str, str]
    ) -> None:
        written = on_terminal(tmp_path, columns, "Name three rivers", *WITH[:4], **variables)
        lines = RATE.sub("", written).splitlines()
        assert lines[:2] == ["== greedy", "Name three rivers"]
        assert lines[4:6] == ["== top-k:5,seed=3", "Name thr»EE RIVERS"]
        assert "\x1b" not in written

    def test_ctrl_c_on_a_terminal_keeps_what_is_there(tmp_path: Path) -> None:
        child = pexpect.spawn(
            SCRIPTED[0], [SCRIPTED[1], "compare", "slowly", "-q"],
            env=environment(tmp_path), dimensions=(12, 100), encoding="utf-8", timeout=30,
        )  # fmt: skip
        child.expect("tick TICK|tick tick")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
        lines = screen(str(child.before))
        assert child.exitstatus == 130
        assert " ".join(lines).count("interrupted") == 2


def test_nobody_reading_on_is_no_failure(tmp_path: Path) -> None:
    with start((*SCRIPTED, "compare", "slowly"), tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        process.stdout.read(12)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
