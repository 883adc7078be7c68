"""Doctor: the backend and the threads with their reasons, rates, and the limits that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import environment

from llamachat import hardware
from llamachat.kernels.library import LibraryMissing
from llamachat.library import loads
from llamachat.library.store import Installed
from llamachat.measure import doctor, rates

BANDWIDTH = 10.0
VALUES = 61_440 + 320 + 272 * 64  # of the tiny Llama of conftest.py, without its look-up table


@pytest.fixture(autouse=True)
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without models, whose rates are known."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rates, "read_bandwidth", lambda _, device: BANDWIDTH)
    monkeypatch.setattr(rates, "int8_gop_per_s", lambda _: None)
    monkeypatch.setattr(rates, "bfloat16_gop_per_s", lambda _: 123.4)
    monkeypatch.setattr(doctor, "installed", list)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[str, ...]:
        raise LibraryMissing("not built here")

    monkeypatch.setattr("llamachat.kernels.abi.instruction_sets", missing)


@pytest.fixture
def with_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("kernels.abi", "measure.doctor"):
        name = f"llamachat.{user}.instruction_sets"
        monkeypatch.setattr(name, lambda: ("avx512", "scalar"))


@pytest.mark.usefixtures("without_native")
def test_without_native_kernels_it_says_why() -> None:
    findings = doctor.examine()
    assert (findings["backend"], findings["native_instruction_sets"]) == ("reference", [])
    assert "not built here" in findings["backend_reason"]


@pytest.mark.usefixtures("with_native")
def test_with_native_kernels_it_names_the_instruction_set() -> None:
    findings = doctor.examine()
    assert findings["backend"] == "native"
    assert findings["native_instruction_sets"] == ["avx512", "scalar"]
    assert "avx512" in findings["backend_reason"]


def test_the_environment_s_number_of_threads_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    findings = doctor.examine()
    assert (findings["threads"], findings["threads_reason"]) == (3, "OMP_NUM_THREADS")


def test_what_bounds_the_threads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "core_limits", lambda: {"physical cores": 8, "cgroup quota": 2})
    findings = doctor.examine()
    assert findings["threads"] == 2
    assert findings["threads_reason"] == "the least of physical cores 8, cgroup quota 2"


def test_rates_are_those_that_were_measured() -> None:
    assert doctor.examine()["measured"] == {
        "read_bandwidth_gb_per_s": BANDWIDTH,
        "int8_gop_per_s": None,
        "bfloat16_gop_per_s": 123,
    }


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize(("has_bfloat16", "value_bytes"), [(True, 2), (False, 4)])
def test_a_model_that_is_unpacked_is_bound_by_its_values(
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    has_bfloat16: bool,
    value_bytes: int,
) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: has_bfloat16)
    assert limit_of(tiny_llama(), monkeypatch) == pytest.approx(
        10e9 / VALUES / value_bytes,
        rel=0.01,  # norms are float32
    )


@pytest.mark.usefixtures("with_native")
def test_a_model_that_runs_as_it_is_is_bound_by_its_files(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tie_word_embeddings=True)  # a head that is all read
    n_bytes = (folder / "model.safetensors").stat().st_size
    # configuration and tokenizer count, too: a tenth of files as small as these
    assert limit_of(folder, monkeypatch) == pytest.approx(10e9 / n_bytes, rel=0.1)


def test_a_damaged_model_has_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model")
    assert limit_of(tmp_path / "m.gguf", monkeypatch) is None


def limit_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Installed("m", None, path, 1, "hub")
    monkeypatch.setattr(doctor, "installed", lambda: [found])
    return doctor.examine()["decode_tok_per_s_at_most"].get("m")


def test_a_gpu_is_told_with_its_driver_and_its_share_of_what_its_memory_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = hardware.Gpu("a GPU", 80 * 2**30, (9, 0), gb_per_s=12.5)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    monkeypatch.setattr(hardware, "gpu_driver", lambda: "580.1")
    monkeypatch.setattr("llamachat.kernels.backends.lacking", lambda index: None)
    findings = doctor.examine()
    assert (findings["device"], findings["gpu_driver"]) == ("cuda:0", "580.1")
    assert findings["measured"]["bandwidth_limit_gb_per_s"] == 12.5
    assert findings["measured"]["bandwidth_share"] == 0.8
    assert "H100" in findings["kernel_table"]


def test_forecasts_of_memory_are_judged_by_the_loads_that_were_kept(tmp_path: Path) -> None:
    assert doctor.examine()["memory_forecasts"] == {"loads": 0}
    loads.keep(tmp_path, "int8", 110_000_000, 100_000_000)
    loads.keep(tmp_path, "int8", 190_000_000, 200_000_000)
    loads.keep(tmp_path, "int8", 9_000_000, 1_000_000)  # a trifle
    assert doctor.examine()["memory_forecasts"] == {
        "loads": 2,
        "mean_error_percent": 2.5,
        "worst_error_percent": 10.0,
    }
