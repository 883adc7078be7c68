"""Memory that was resident, and the cores that may be used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llamachat import hardware

MB = 10**6


RISES = """
from llamachat import hardware

before = hardware.peak_memory_bytes()
held = bytearray(b"x") * 200_000_000
above = hardware.peak_memory_bytes()
del held
stays = hardware.peak_memory_bytes()
hardware.reset_peak_memory()
print(above - before, stays - before, hardware.peak_memory_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_the_peak_of_memory_rises_stays_and_begins_anew() -> None:
    # in a process of its own: memory that other tests freed would go back meanwhile
    ran = subprocess.run([sys.executable, "-c", RISES], capture_output=True, text=True, check=True)
    above, stays, anew = map(int, ran.stdout.split())
    assert above == pytest.approx(200 * MB, abs=20 * MB)
    assert stays == pytest.approx(above, abs=20 * MB)
    assert anew < 20 * MB


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
