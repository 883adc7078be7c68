"""`llamachat bench`: its forms of output, its errors, and what is left when it is interrupted."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import LLAMACHAT, environment, start

from llamachat import __version__, settings
from llamachat.cli import app
from llamachat.terminal.progress import Status
from llamachat.terminal.reports import show_rows

Command = Callable[..., "tuple[int, str, str]"]
SMALL = ("-p", "8", "-n", "2", "-r", "2", "-t", "1")
ROW: dict[str, Any] = {
    "model": "some/where/m.gguf", "form": "Q4_0", "quantize": "auto", "backend": "native",
    "threads": 2, "tensor_parallel": 1, "test": "tg5",
    "avg_ts": 12.345, "stddev_ts": 0.5, "samples_ts": (12.0, 12.69),
    "bytes_per_token": 2_000_000_000, "gb_per_s": 24.69, "bandwidth_gb_per_s": 30.0,
    "bandwidth_share": 0.823, "load_s": 1.5, "ttft_s": 0.125, "peak_bytes": 2**31,
    "device": "cpu", "cpu": "a CPU", "gpu": None,
    "version": "1.2.3",
}  # fmt: skip


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """`llamachat bench` in this process: its exit code, and what it wrote to stdout and stderr."""
    from llamachat.measure import rates

    monkeypatch.setattr(rates, "BUFFER_BYTES", 2**20)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings.config.cache_clear()

    def bench(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamachat", "bench", *arguments])
        exit_code = app.run()
        return exit_code, *capfd.readouterr()

    yield bench
    settings.config.cache_clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


def test_json_is_a_list_of_what_was_measured(bench: Command, model: str) -> None:
    exit_code, out, _ = bench("-m", model, *SMALL, "--json")
    assert exit_code == 0
    prompt, reply = json.loads(out)
    assert (prompt["test"], reply["test"]) == ("pp8", "tg2")
    assert prompt.keys() == ROW.keys()
    assert (prompt["model"], prompt["version"]) == (model, __version__)
    assert (prompt["threads"], len(prompt["samples_ts"])) == (1, 2)


def test_every_model_has_its_rows(bench: Command, model: str, tiny_llama: Any) -> None:
    other = str(tiny_llama(num_hidden_layers=1))
    rows = json.loads(bench("-m", f"{model},{other}", "-p", "0", "-n", "2", "-r", "1", "--json")[1])
    assert [row["model"] for row in rows] == [model, other]
    assert rows[0]["bytes_per_token"] > rows[1]["bytes_per_token"]


def test_a_table_is_the_default(bench: Command, model: str) -> None:
    exit_code, out, _ = bench("-m", model, *SMALL, "-d", "4")
    heading, rule, *rows, blank, machine = out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *rows)]
    assert exit_code == 0
    assert [row[cells[0].index("test")] for row in cells[1:]] == ["pp8@d4", "tg2@d4"]
    assert set(rule) == set("|-: ")
    assert (blank, machine.split(",")[0]) == ("", f"llamachat {__version__}")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-p", "many"], "many"),
        (["-t", "0"], "--threads"),
        (["-r", "0"], "--repetitions"),
        (["-p", "0", "-n", "0"], "nothing"),
        (["-o", "xml"], "xml"),
        (["-o", "csv", "--json"], "--json"),
        (["-p", "5000"], "1024"),
        (["--quantize", "int3"], "int3"),
    ],
)
def test_what_cannot_be_measured_is_exit_2(
    bench: Command, model: str, arguments: list[str], word: str
) -> None:
    exit_code, out, err = bench("-m", model, *arguments)
    assert (exit_code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) <= 2


def test_an_unknown_model_is_exit_3_before_another_is_measured(bench: Command, model: str) -> None:
    exit_code, out, err = bench("-m", f"{model},nobody/nothing", *SMALL)
    assert (exit_code, out) == (3, "")
    assert "nobody/nothing" in err


def test_json_lines_hold_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows([ROW, ROW | {"test": "tg6"}], "jsonl", Status())
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["tg5", "tg6"]
    assert json.loads(lines[0]) == ROW | {"samples_ts": [12.0, 12.69]}


def test_csv_has_one_heading_and_blanks_for_what_does_not_apply(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_rows([ROW, ROW | {"test": "pp6", "gb_per_s": None}], "csv", Status())
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(first) == list(ROW)
    assert (first["avg_ts"], first["samples_ts"]) == ("12.345", "12.0 12.69")
    assert (second["test"], second["gb_per_s"]) == ("pp6", "")


def test_a_row_of_the_table_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows([ROW], "md", Status())
    row = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "m.gguf", "auto", "native", "2", "tg5", "12.35 ± 0.50", "24.7 of 30.0", "82%", "0.125 s",
        "1.50 s", "2.00 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["md", "json", "jsonl", "csv"])
def test_an_interrupt_leaves_what_was_measured(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Iterator[dict[str, Any]]:
        yield ROW
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_rows(interrupted(), form, Status())
    left = capsys.readouterr().out
    show_rows([ROW], form, Status())
    assert left == capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_exit_130_after_the_rows_so_far(tmp_path: Path, model: str) -> None:
    depths = ",".join(map(str, range(20)))  # more than are measured before the signal
    small = ("-p", "4", "-n", "400", "-d", depths, "-r", "1", "-t", "1", "-o", "jsonl")
    with start((*LLAMACHAT, "bench", "-m", model, *small), tmp_path) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert first["test"] == "pp4"
    assert len(rest.splitlines()) < 39


def test_help_needs_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *LLAMACHAT[1:], "bench", "--help"],
        capture_output=True,
        env=environment(tmp_path),
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: llamachat bench ")
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
