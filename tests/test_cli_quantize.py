"""`llamachat quantize`: what it makes, what it says, and that whatever stops it harms nothing."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from gguf_files import write_gguf
from programs import LLAMACHAT, environment, run

import llamachat as api
from llamachat import settings
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.quantized import QuantizedCheckpoint
from llamachat.checkpoints.quantized_writer import JOURNAL, partial_of
from llamachat.cli import app
from llamachat.kernels.backends import choose, make
from llamachat.library import store
from llamachat.quant.recipe import Quantizer, recipe
from llamachat.quant.tensor import QTensor

WEIGHTS = "model.safetensors"
Command = Callable[..., "tuple[int, str, str]"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


@pytest.fixture(scope="module")
def original(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def deep(tiny_llama: Callable[..., Path]) -> Path:
    """A model of so many weights that it can be stopped between them."""
    return tiny_llama(num_hidden_layers=60)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def llamachat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """A command in this process: its exit code, and what it wrote to stdout and stderr."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings.config.cache_clear()

    def llamachat(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamachat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        exit_code = app.run()
        said = capsys.readouterr()
        return exit_code, said.out, said.err

    yield llamachat
    settings.config.cache_clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


def command(model: Path, folder: Path, *more: str) -> tuple[str, ...]:
    return (*LLAMACHAT, "quantize", str(model), "--to", "int4", "-o", str(folder), *more)


def same_bytes(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


# --- what it makes


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_are_those_that_are_quantized_in_memory(
    llamachat: Command, model: Path, form: Any
) -> None:
    folder = Path(llamachat("quantize", model, "--to", form, "--group-size", "64")[1].strip())
    source, kernels = open_checkpoint(model), make(choose(), 1, torch.float32)
    shapes = [(weight.hf, weight.shape) for weight in iter_weights(source.config)]
    quantizer = Quantizer(recipe(form, shapes, group_size=64), kernels.quantize)
    found = dict(open_checkpoint(folder).tensors())
    for name, weight in source.tensors():
        expected = quantizer(name, weight)
        assert type(found[name]) is type(expected)
        pair = [
            it.dequantize() if isinstance(it, QTensor) else it for it in (found[name], expected)
        ]
        assert torch.equal(*pair)


def test_the_number_of_threads_changes_no_byte(
    llamachat: Command, model: Path, tmp_path: Path
) -> None:
    for threads in ("1", "2"):
        llamachat("quantize", model, "--to", "int4", "-t", threads, "-o", tmp_path / threads)
    assert same_bytes(tmp_path / "1", tmp_path / "2")


def test_the_error_that_is_kept_is_that_of_the_weights(llamachat: Command, model: Path) -> None:
    folder = Path(llamachat("quantize", model, "--to", "int4")[1].strip())
    exact = dict(open_checkpoint(model).tensors())
    errors = QuantizedCheckpoint(folder).facts.errors
    for name, weight in open_checkpoint(folder).tensors():
        source = exact[name]
        assert isinstance(source, torch.Tensor)
        if isinstance(weight, QTensor):
            wrong = weight.dequantize(torch.float64) - source
            error = wrong.norm() / source.double().norm()
            assert errors[name] == pytest.approx(float(error), rel=1e-3)
        else:
            assert name not in errors


def test_a_gguf_file_and_a_folder_of_the_same_model_answer_alike(
    llamachat: Command, model: Path, tmp_path: Path
) -> None:
    file = write_gguf(model, tmp_path / "tiny.gguf")
    made = [Path(llamachat("quantize", it, "--to", "int4")[1].strip()) for it in (model, file)]
    ids = list(range(1, 40))
    logits = [api.load(folder, threads=1).logits(ids) for folder in made]
    assert torch.equal(*logits)


def test_a_conversation_can_be_held_with_the_folder_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    made = run(command(model, folder), tmp_path)
    assert (made.returncode, made.stdout.decode()) == (0, f"{folder}\n")
    shutil.rmtree(model)
    said = run((*LLAMACHAT, "chat", "-m", str(folder), "Hello", "-n", "5"), tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


# --- what it says


def test_stdout_is_the_path_and_stderr_tells_what_it_is(llamachat: Command, model: Path) -> None:
    exit_code, out, err = llamachat("quantize", model, "--to", "int8")
    assert exit_code == 0
    folder = Path(out.removesuffix("\n"))
    assert folder.parent.name == "quantized"
    made = QuantizedCheckpoint(folder)
    last = err.splitlines()[-1]
    assert f"{made.bits_per_weight:.2f} bits per weight" in last
    assert str(model) in last


def test_it_is_made_once(llamachat: Command, model: Path) -> None:
    _, out, _ = llamachat("quantize", model, "--to", "int8")
    made = (Path(out.strip()) / WEIGHTS).stat()
    assert llamachat("quantize", model, "--to", "int8") == (0, out, "")
    assert (Path(out.strip()) / WEIGHTS).stat() == made
    assert llamachat("quantize", model, "--to", "int8", "--force")[:2] == (0, out)
    assert (Path(out.strip()) / WEIGHTS).stat().st_ino != made.st_ino


def test_a_source_that_has_changed_is_quantized_anew(llamachat: Command, model: Path) -> None:
    first = llamachat("quantize", model, "--to", "int8")[1]
    os.utime(model / WEIGHTS, ns=(1, 1))
    assert llamachat("quantize", model, "--to", "int8")[1] != first


def test_quiet_says_nothing(llamachat: Command, model: Path) -> None:
    assert llamachat("quantize", model, "--to", "int8", "-q")[2] == ""


def test_list_shows_it(llamachat: Command, model: Path) -> None:
    folder = llamachat("quantize", model, "--to", "int4")[1].strip()
    _, line = llamachat("list")[1].splitlines()
    assert line.startswith("tiny INT4 ")
    assert line.endswith(f" {folder}")


def test_who_quantizes_what_is_quantized_is_told_what_is_lost(
    llamachat: Command, model: Path, tmp_path: Path
) -> None:
    folder = llamachat("quantize", model, "--to", "int8")[1].strip()
    exit_code, out, err = llamachat("quantize", folder, "--to", "int4", "-o", tmp_path / "made")
    assert (exit_code, out) == (0, f"{tmp_path / 'made'}\n")
    assert "is INT8" in err
    assert "lost" in err
    assert "lost" not in llamachat("quantize", model, "--to", "int4")[2]


def test_what_is_in_that_form_already_is_left_as_it_is(llamachat: Command, model: Path) -> None:
    folder = llamachat("quantize", model, "--to", "int4")[1]
    assert llamachat("quantize", folder.strip(), "--to", "int4") == (0, folder, "")


def test_a_report_has_the_worst_weights_first_and_a_plot(llamachat: Command, model: Path) -> None:
    folder = Path(llamachat("quantize", model, "--to", "int4")[1].strip())
    exit_code, out, err = llamachat("quantize", model, "--to", "int4", "--report")
    assert (exit_code, err) == (0, "")
    errors = QuantizedCheckpoint(folder).facts.errors
    shown = [
        line.split()[0] for line in out.splitlines() if ".weight " in line and line.endswith("%")
    ]
    assert shown == sorted(errors, key=lambda name: -errors[name])
    drawn = ElementTree.parse(folder / "report.svg").getroot()
    kinds = {name.split(".")[-2] for name in errors}
    dots = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == len(errors) + len(kinds)  # and a legend
    assert len({dot.get("fill") for dot in dots}) == len(kinds)
    heights = [float(str(dot.get("cy"))) for dot in dots[: len(errors)]]
    worst = list(errors).index(shown[0])
    assert heights[worst] == min(heights)


def test_a_report_does_not_damage_the_folder(llamachat: Command, model: Path) -> None:
    assert llamachat("quantize", model, "--to", "int4", "--report")[0] == 0
    ((folder, _),) = [(it.path, it.form) for it in store.installed()]
    assert list(open_checkpoint(folder).tensors())


# --- what it refuses


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--to"),
        (["--to", "int3"], "int4"),
        (["--to", "int4", "--group-size", "48"], "64"),
        (["--to", "nf4", "--group-size", "64"], "nf4"),
        (["--to", "int4", "--double-quant"], "nf4"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_exit_2_with_what_can(
    llamachat: Command, model: Path, arguments: Sequence[str], named: str
) -> None:
    exit_code, out, err = llamachat("quantize", model, *arguments)
    assert (exit_code, out) == (2, "")
    assert named in err


def test_what_is_in_the_way_is_left_alone(llamachat: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    for force in ([], ["--force"]):
        exit_code, out, err = llamachat(
            "quantize", model, "--to", "int4", "-o", tmp_path / "mine", *force
        )
        assert (exit_code, out) == (2, "")
        assert str(tmp_path / "mine") in err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_an_empty_folder_is_filled(llamachat: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert llamachat("quantize", model, "--to", "int4", "-o", tmp_path / "empty")[0] == 0
    assert open_checkpoint(tmp_path / "empty").form == "INT4"


def test_another_quantized_model_is_replaced_only_by_force(
    llamachat: Command, model: Path, tmp_path: Path
) -> None:
    made = ("-o", tmp_path / "made")
    llamachat("quantize", model, "--to", "int4", *made)
    exit_code, _, err = llamachat("quantize", model, "--to", "int8", *made)
    assert exit_code == 2
    assert "--force" in err
    assert llamachat("quantize", model, "--to", "int8", *made, "--force")[0] == 0
    assert open_checkpoint(tmp_path / "made").form == "INT8"
    assert sorted(it.name for it in tmp_path.iterdir()) == ["cache", "made", "tiny"]


@pytest.mark.parametrize("at", [12, -100])
def test_a_damaged_folder_of_the_cache_is_named_and_never_used(
    llamachat: Command, model: Path, at: int
) -> None:
    folder = Path(llamachat("quantize", model, "--to", "int4")[1].strip())
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    exit_code, out, err = llamachat("chat", "-m", folder, "Hello", "-n", "1")
    assert (exit_code, out) == (9, "")
    assert str(folder) in err
    assert llamachat("quantize", model, "--to", "int4", "--force")[0] == 0
    assert llamachat("chat", "-m", folder, "Hello", "-n", "1")[0] == 0


def test_too_small_a_disk_is_exit_7_with_both_numbers_and_nothing_is_written(
    llamachat: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(total=10**6, used=10**6 - 1234, free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    exit_code, out, err = llamachat("quantize", model, "--to", "int8", "-o", tmp_path / "made")
    assert (exit_code, out) == (7, "")
    assert re.search(r"1,234 bytes are free, int8 needs [\d,]{7,}\n", err), err
    assert not partial_of(tmp_path / "made").exists()


# --- stopped


@pytest.fixture(scope="module")
def fresh(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of the deep model where nothing is in the way."""
    home = tmp_path_factory.mktemp("fresh")
    assert run(command(deep, home / "made"), home).returncode == 0
    return home / "made"


@contextmanager
def started(
    model: Path, folder: Path, home: Path, *, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it has written some weights; killed in the end."""
    process = subprocess.Popen(
        command(model, folder),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        env=environment(home),
    )  # fmt: skip
    journal = partial_of(folder) / JOURNAL
    with process:
        try:
            while not (journal.exists() and journal.stat().st_size > 5000):
                assert process.poll() is None, process.communicate()
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


@posix
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_whatever_stops_it_the_next_run_goes_on(
    deep: Path, fresh: Path, tmp_path: Path, number: str
) -> None:
    folder = tmp_path / "made"
    with started(deep, folder, tmp_path) as process:
        process.send_signal(getattr(signal, number))
        expected = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[number]
        assert process.wait(20) == expected, process.communicate()
    assert not folder.exists()
    again = run(command(deep, folder), tmp_path)
    assert (again.returncode, again.stdout.decode()) == (0, f"{folder}\n"), again.stderr
    assert b"going on after " in again.stderr
    assert same_bytes(folder, fresh)
    assert not partial_of(folder).exists()


@posix
def test_a_terminal_has_its_cursor_again(deep: Path, tmp_path: Path) -> None:
    person, program = os.openpty()
    with started(deep, tmp_path / "made", tmp_path, stderr=program) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    shown = os.read(person, 1 << 16)
    os.close(person)
    os.close(program)
    assert b"weights" in shown
    assert shown.rindex(b"\033[?25h") > shown.rindex(b"\033[?25l")


@posix
def test_a_full_disk_is_exit_7_and_the_next_run_goes_on(
    deep: Path, fresh: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    limit = (fresh / WEIGHTS).stat().st_size // 2
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from llamachat.__main__ import main\n"
        "main()"
    )
    full = run((sys.executable, "-c", program, *command(deep, folder)[3:]), tmp_path)
    assert (full.returncode, full.stdout) == (7, b""), full.stderr
    assert b"bytes are free" in full.stderr
    assert not folder.exists()
    assert run(command(deep, folder), tmp_path).returncode == 0
    assert same_bytes(folder, fresh)


@posix
def test_a_second_process_waits_and_finds_it_done(deep: Path, fresh: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with started(deep, folder, tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        second = subprocess.Popen(
            command(deep, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(tmp_path),
        )  # fmt: skip
        assert second.stderr is not None
        assert b"waiting" in second.stderr.readline()
        first.send_signal(signal.SIGCONT)
        out, err = second.communicate(timeout=30)
        assert (second.returncode, out.decode(), err) == (0, f"{folder}\n", b"")
        assert first.wait(30) == 0
    assert same_bytes(folder, fresh)


@posix
def test_of_a_source_that_changes_meanwhile_nothing_is_made(deep: Path, tmp_path: Path) -> None:
    model, folder = tmp_path / "changing", tmp_path / "made"
    shutil.copytree(deep, model)
    with started(model, folder, tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        os.utime(model / WEIGHTS, ns=(1, 1))
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (9, b"")
    assert b"changed" in err
    assert not folder.exists()


@posix
def test_what_was_written_of_a_source_that_has_changed_is_not_used(
    deep: Path, tmp_path: Path
) -> None:
    model, folder = tmp_path / "changing", tmp_path / "made"
    shutil.copytree(deep, model)
    with started(model, folder, tmp_path) as process:
        process.kill()
    os.utime(model / WEIGHTS, ns=(1, 1))
    again = run(command(model, folder), tmp_path)
    assert again.returncode == 0
    assert b"going on" not in again.stderr
