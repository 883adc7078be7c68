"""`llamachat eval`: its results, checks and errors, and what is left when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import LLAMACHAT, environment, run
from safetensors.torch import load_file, save_file

from llamachat import __version__, hardware, settings
from llamachat.cli import app

Command = Callable[..., "tuple[int, str, str]"]
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.\n" * 4
EXACT = ("--backend", "reference", "--dtype", "float32", "--quantize", "none")


@pytest.fixture
def llamachat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """The program in this process: its exit code, and what it wrote to stdout and stderr."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    settings.config.cache_clear()

    def llamachat(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llamachat", *arguments])
        exit_code = app.run()
        return exit_code, *capfd.readouterr()

    yield llamachat
    settings.config.cache_clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


@pytest.fixture(scope="module")
def other(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama(num_hidden_layers=1))


@pytest.fixture
def evaluate(llamachat: Command, model: str, tmp_path: Path) -> Command:
    """`llamachat eval` of the model on TEXT in windows of 32."""
    file = tmp_path / "text"
    file.write_bytes(TEXT.encode())
    return lambda *flags: llamachat(
        *("eval", model, "--text", str(file), "-c", "32", "--chunks", "4", "-t", "1", *flags)
    )


def found(evaluate: Command, *flags: str) -> dict[str, Any]:
    exit_code, out, err = evaluate(*flags, "--json")
    assert (exit_code, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


def test_json_tells_the_figures_and_what_they_are_of(evaluate: Command, model: str) -> None:
    result = found(evaluate, *EXACT, "--kv-cache", "bf16")
    assert result["tokens"] == 4 * 15
    assert 0 < result["stderr"] < result["perplexity"]
    assert result["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert result["size_bytes"] == sum(f.stat().st_size for f in Path(model).iterdir())
    settings = ("model", "backend", "quantize", "kv_cache", "ctx_size", "chunks", "version")
    assert tuple(result[name] for name in settings) == (
        *(model, "reference", "none", "bf16", 32, 4, __version__),
    )
    assert not {"against", "kl", "top1_agreement"} & result.keys()


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_bits_are_those_of_the_weights_as_they_are_run(
    evaluate: Command, dtype: str, bits: int
) -> None:
    """Norms stay in float32."""
    result = found(evaluate, *EXACT, "--dtype", dtype)
    assert result["bits_per_weight"] == pytest.approx(bits, abs=0.1)


def test_a_reference_is_run_unquantized_in_float32(evaluate: Command) -> None:
    against = found(evaluate, "--against", "none", "--kv-cache", "bf16")["against"]
    settings = ("backend", "quantize", "dtype", "kv_cache", "bits_per_weight")
    assert tuple(against[name] for name in settings) == ("reference", "none", "float32", "f32", 32)


def test_a_model_that_is_run_exactly_is_its_own_reference(evaluate: Command) -> None:
    result = found(evaluate, "--against", "none", *EXACT)
    assert result["kl"] == {"mean": 0, "stderr": 0, "median": 0, "p99": 0, "max": 0}
    assert (result["rms_dp_percent"], result["top1_agreement"]) == (0, 1)
    assert result["perplexity_ratio"] == {"value": 1, "stderr": 0}
    assert result["against"]["perplexity"] == result["perplexity"]


def test_the_form_of_the_cache_is_measured(evaluate: Command) -> None:
    coarse = found(evaluate, "--against", "none", *EXACT, "--kv-cache", "int8")
    finer = found(evaluate, "--against", "none", *EXACT, "--kv-cache", "f32")
    assert coarse["kv_cache"] == "int8"
    assert coarse["kl"]["mean"] > finer["kl"]["mean"]


def test_where_float32_does_not_fit_the_reference_keeps_the_type_of_its_file(
    llamachat: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bfloat16"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")
    n_bytes = 2 * sum(tensor.numel() for tensor in weights.values())
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (n_bytes * 2, n_bytes * 2))
    (tmp_path / "text").write_text(TEXT)
    flags = ("--text", str(tmp_path / "text"), "-c", "32", "--quantize", "none", "--json")
    exit_code, out, err = llamachat("eval", str(folder), *flags, "--against", "none", "--force")
    against = json.loads(out)["against"]
    assert exit_code == 0
    assert (against["dtype"], against["kv_cache"]) == ("bfloat16", "f32")
    assert "no room for float32" in err


def test_another_model_can_be_the_reference(evaluate: Command, other: str) -> None:
    result = found(evaluate, "--against", other)
    assert result["against"]["model"] == other
    assert result["kl"]["p99"] > result["kl"]["median"] > 0
    assert result["against"]["perplexity"] * result["perplexity_ratio"]["value"] == pytest.approx(
        result["perplexity"]
    )


def test_a_table_is_the_default(evaluate: Command, model: str) -> None:
    exit_code, out, err = evaluate("--against", "none", *EXACT)
    rows = [(line[:12].strip(), line[14:]) for line in out.splitlines()]
    assert (exit_code, err) == (0, "")
    assert rows[0][1].startswith(f"{model}: none, reference, float32, KV cache f32, ")
    assert rows[1] == ("text", "4 windows of 32, 60 tokens scored")
    assert ("KL mean", "0.000000 ± 0.000000") in rows
    assert ("same top-1", "100.00%") in rows


def test_a_piped_text_is_the_text(tmp_path: Path, evaluate: Command, model: str) -> None:
    small = ("-c", "32", "--chunks", "4", "-t", "1", "--json")
    for name in ((), ("--text", "-")):
        done = run((*LLAMACHAT, "eval", model, *small, *name), tmp_path, stdin=TEXT.encode())
        assert (done.returncode, done.stderr) == (0, b"")
        piped = json.loads(done.stdout)
        assert {**piped, "date": ""} == {**found(evaluate), "date": ""}


def test_an_empty_pipe_is_exit_2_and_says_what_to_give(tmp_path: Path, model: str) -> None:
    done = run((*LLAMACHAT, "eval", model), tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--text FILE" in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["-c", "1000"], "expected a window of 1000"),
        (["-c", "5000"], "1024"),
        (["-c", "2"], "--ctx-size"),
        (["--chunks", "0"], "--chunks"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--kv-cache", "int3"], "int3"),
        (["--quantize", "int3"], "int3"),
        (["--require", "kl<0.1"], "--against"),
        (["--require", "entropy<1"], "perplexity"),
        (["--require", "perplexity"], "'perplexity'"),
    ],
)
def test_what_cannot_be_measured_is_exit_2(evaluate: Command, flags: list[str], word: str) -> None:
    exit_code, out, err = evaluate(*flags)
    assert (exit_code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) <= 2


def test_models_of_two_vocabularies_are_exit_2(evaluate: Command, tiny_llama: Any) -> None:
    exit_code, out, err = evaluate("--against", str(tiny_llama(vocab_size=320)))
    assert (exit_code, out) == (2, "")
    assert "272" in err
    assert "320" in err


def test_an_unknown_reference_is_exit_3(evaluate: Command) -> None:
    exit_code, out, err = evaluate("--against", "no-such-model")
    assert (exit_code, out) == (3, "")
    assert "no-such-model" in err


def test_a_missed_requirement_is_exit_8_after_the_results(evaluate: Command) -> None:
    required = ("--require", "kl<1e-9", "--require", "perplexity>1", "--require", "top1>1")
    exit_code, out, err = evaluate("--against", "none", "--json", *required, "--kv-cache", "int8")
    result = json.loads(out)
    assert exit_code == 8
    assert err == (
        f"llamachat: kl is {result['kl']['mean']:.6g}, required < 1e-09; "
        f"top1 is {result['top1_agreement']:.6g}, required > 1\n"
    )


def test_requirements_that_hold_are_exit_0(evaluate: Command) -> None:
    assert found(evaluate, "--against", "none", *EXACT, "--require", "kl<=0")


def test_show_tells_what_was_found(llamachat: Command, evaluate: Command, model: str) -> None:
    result = found(evaluate, "--against", "none", *EXACT)
    assert json.loads(llamachat("show", model, "--json")[1])["evaluations"] == [result]
    (line,) = [it for it in llamachat("show", model)[1].splitlines() if "evaluations" in it]
    assert "4 windows of 32: perplexity " in line
    assert "KL 0.000000" in line


def test_results_that_cannot_be_kept_are_no_failure(evaluate: Command, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "eval").write_text("a file in the way")
    exit_code, out, err = evaluate("--json")
    assert exit_code == 0
    assert json.loads(out)["tokens"] == 60
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("damage", [{"date": []}, {"perplexity": "low"}, {"kl": 7}, {"chunks": {}}])
def test_a_file_of_other_results_does_not_keep_show_from_working(
    llamachat: Command, evaluate: Command, model: str, tmp_path: Path, damage: dict[str, Any]
) -> None:
    result = found(evaluate)
    (kept,) = (tmp_path / "cache" / "eval").iterdir()
    kept.write_text('{"perplexity": 3}\n' + json.dumps(result | damage))
    exit_code, out, err = llamachat("show", model)
    assert (exit_code, err) == (0, "")
    assert "evaluations" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pseudo-terminals")
def test_ctrl_c_is_exit_130_with_what_was_found_so_far(tmp_path: Path, model: str) -> None:
    import pexpect

    (tmp_path / "text").write_text(TEXT * 200)
    arguments = ["-m", "llamachat", "eval", model, "--text", str(tmp_path / "text"), "-c", "32"]
    child = pexpect.spawn(
        sys.executable, arguments, env=environment(tmp_path), dimensions=(30, 200), timeout=30
    )
    child.expect(r"\b3 of \d+ windows, perplexity")
    child.sendintr()
    child.expect(
        r"llamachat: interrupted after \d+ windows of 32: perplexity \d+\.\d+ ± \d".encode()
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert b"Traceback" not in child.before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pseudo-terminals")
def test_without_a_text_a_terminal_is_told_what_to_give(tmp_path: Path, model: str) -> None:
    import pexpect

    child = pexpect.spawn(
        *(sys.executable, ["-m", "llamachat", "eval", model]), env=environment(tmp_path), timeout=30
    )
    child.expect_exact("--text FILE")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2


def test_help_needs_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *LLAMACHAT[1:], "eval", "--help"],
        capture_output=True,
        env=environment(tmp_path),
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: llamachat eval ")
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
