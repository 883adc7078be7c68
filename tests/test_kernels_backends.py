"""Which backend and device are chosen, on machines with GPUs and without."""

from __future__ import annotations

import pytest

from llamachat import hardware
from llamachat.errors import UsageError
from llamachat.hardware import Gpu
from llamachat.kernels import backends
from llamachat.kernels.backends import choose

H100 = Gpu("NVIDIA H100", 80 * 2**30, (9, 0))
OLD = Gpu("Tesla P100", 16 * 2**30, (6, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """GPUs of a machine whose torch has CUDA; none at first."""
    found: list[Gpu] = []
    monkeypatch.setattr(hardware, "gpus", lambda: tuple(found))
    monkeypatch.setattr(backends, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    return found


def test_without_a_gpu_auto_is_the_cpu(machine: list[Gpu]) -> None:
    assert choose(device="auto").device == "cpu"


def test_a_gpu_is_taken_where_nothing_else_is_asked_for(machine: list[Gpu]) -> None:
    machine.append(H100)
    chosen = choose(device="auto")
    assert (chosen.name, chosen.device, chosen.gpu) == ("cuda", "cuda:0", 0)
    assert choose("reference", "auto").device == choose(device="cpu").device == "cpu"


def test_a_gpu_can_be_named(machine: list[Gpu]) -> None:
    machine += [H100, H100]
    assert choose(device="cuda:1").device == "cuda:1"
    assert choose("cuda", "auto").device == "cuda:0"


def test_bitsandbytes_runs_on_a_gpu_that_is_named(machine: list[Gpu]) -> None:
    pytest.importorskip("bitsandbytes")
    machine.append(H100)
    chosen = choose("bitsandbytes", "cuda:0")
    assert (chosen.name, chosen.device, chosen.gpu) == ("bitsandbytes", "cuda:0", 0)
    assert choose("bitsandbytes", "auto").gpu is None


def test_a_gpu_that_is_too_old_is_left_alone(machine: list[Gpu]) -> None:
    machine.append(OLD)
    assert choose(device="auto").device == "cpu"


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ("auto", "cuda", "there is no NVIDIA GPU with a driver"),
        ("cuda", "auto", "there is no NVIDIA GPU with a driver"),
        ("native", "cuda", "the backend native does not run on the device cuda"),
        ("cuda", "cpu", "the backend cuda does not run on the device cpu"),
        ("auto", "gpu", "expected one of auto, cpu, cuda, cuda:N"),
    ],
)
def test_a_device_that_cannot_be_had_is_one_clear_error(
    machine: list[Gpu], asked: str, device: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose(asked, device)


@pytest.mark.parametrize(
    ("gpu", "device", "message"),
    [
        (OLD, "cuda", "Tesla P100 has compute capability 6.0, 8.0 is needed"),
        (H100, "cuda:2", "there is no GPU 2, the last one is 0"),
    ],
)
def test_a_gpu_that_does_not_do_is_told_why(
    machine: list[Gpu], gpu: Gpu, device: str, message: str
) -> None:
    machine.append(gpu)
    with pytest.raises(UsageError, match=message):
        choose(device=device)


def test_a_torch_without_cuda_is_said(machine: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.append(H100)
    monkeypatch.setattr(backends, "_torch_has_cuda", lambda: False)
    with pytest.raises(UsageError, match="torch was installed without CUDA"):
        choose(device="cuda")
