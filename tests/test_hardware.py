"""Memory that was resident, and the cores that may be used."""

from __future__ import annotations

import sys

import pytest

from llamachat import hardware

MB = 10**6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_the_peak_of_memory_rises_stays_and_begins_anew() -> None:
    hardware.reset_peak_memory()
    before = hardware.peak_memory_bytes()
    held = bytearray(b"x") * (200 * MB)
    above = hardware.peak_memory_bytes()
    del held
    assert above - before == pytest.approx(200 * MB, abs=20 * MB)
    assert hardware.peak_memory_bytes() == pytest.approx(above, abs=20 * MB)
    hardware.reset_peak_memory()
    assert hardware.peak_memory_bytes() < above - 150 * MB


def test_a_process_has_been_resident() -> None:
    assert MB < hardware.peak_memory_bytes() < hardware.memory_bytes()[0]


def test_the_least_limit_is_what_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"physical cores": 8, "allowed CPUs": 4, "cgroup quota": 3}
    monkeypatch.setattr(hardware, "core_limits", lambda: limits)
    assert hardware.usable_cores() == 3


def test_a_system_that_tells_nothing_has_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "core_limits", dict)
    assert hardware.usable_cores() == 1


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", missing)
    hardware.gpus.cache_clear()
    assert hardware.gpus() == ()
    assert hardware.gpu_driver() is None
    hardware.gpus.cache_clear()
