"""Rates of this machine: that they are measured at all, and leave torch as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from llamachat.kernels.library import LibraryMissing
from llamachat.kernels.native import instruction_sets
from llamachat.measure import rates


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in {"BUFFER_BYTES": 2**20, "T": 2, "O": 64, "I": 64, "MEASURED_S": 0}.items():
        monkeypatch.setattr(rates, name, value)
    yield
    torch.set_num_threads(kept)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_threads: int) -> None:
        raise LibraryMissing("not built here")

    monkeypatch.setattr(rates, "Native", missing)


@pytest.fixture
def with_native() -> None:
    try:
        instruction_sets()
    except LibraryMissing as error:
        pytest.skip(f"native kernels: {error}")


@pytest.mark.parametrize("kernels", ["without_native", "with_native"])
@pytest.mark.parametrize("rate", [rates.read_bandwidth, rates.bfloat16_gop_per_s])
def test_a_rate_is_measured_and_torch_keeps_its_threads(
    rate: Callable[[int], float], kernels: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kernels)
    assert rate(2) > 0
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("without_native")
def test_products_at_8_bits_need_native_kernels() -> None:
    assert rates.int8_gop_per_s(1) is None


@pytest.mark.usefixtures("with_native")
def test_products_at_8_bits_are_measured_with_them() -> None:
    assert (rates.int8_gop_per_s(1) or 0) > 0
