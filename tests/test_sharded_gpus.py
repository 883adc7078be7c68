"""Sums over GPUs: kernels on one, and models that two processes run on two."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanging import Sums
from sharded_leader import ask, run

from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.products import FEW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not find_spec("cuda"), reason="no NVIDIA GPU here"
    ),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
CASES: dict[str, dict[str, str]] = {
    "float32": {"quantize": "none", "dtype": "float32"},
    "bfloat16": {"quantize": "none", "dtype": "bfloat16"},
    "int8": {"quantize": "int8", "dtype": "auto"},
    "int4": {"quantize": "int4", "dtype": "auto"},
}
# What rounding leaves where sums come in another order: activations to 8 bits, prompts to bfloat16.
ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 2e-2}


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 3, FEW])
@pytest.mark.parametrize("dim", [64, 1000])
def test_products_of_several_processes_are_added_and_coded(
    size: int, tokens: int, dim: int
) -> None:
    sums = Sums([Cuda("cuda:0", torch.float32) for _ in range(size)], tokens, dim)
    sums.add_twice()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products = sums.add_twice()
    graph.replay()
    graph.replay()
    sums.check(products, 6)


@pytest.fixture(scope="module")
def cases(tiny_llama: Callable[..., Path]) -> dict[str, dict[str, str]]:
    folder = str(tiny_llama(intermediate_size=128))
    common = {"folder": folder, "backend": "cuda", "device": "cuda:0"}
    return {name: {**common, **case} for name, case in CASES.items()}


@pytest.fixture(scope="module")
def together(
    cases: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return ask(cases, 2, tmp_path_factory.mktemp("gpus"))


@two_gpus
@pytest.mark.parametrize("name", CASES)
def test_two_gpus_answer_as_one(
    together: dict[str, Any], cases: dict[str, dict[str, str]], name: str
) -> None:
    alone = run(cases[name], 1)
    found, expected = (torch.tensor(it["logits"]) for it in (together[name], alone))
    assert (found - expected).norm() <= ALLOWED[name] * expected.norm()
    if name == "float32":
        assert together[name]["replies"] == alone["replies"]
        assert together[name]["endings"] == alone["endings"]


@two_gpus
@pytest.mark.parametrize("name", CASES)
def test_two_gpus_queue_what_they_would_have_run(together: dict[str, Any], name: str) -> None:
    found = together[name]
    assert found["order"] == ["pass", *["ids", "pass", "read"] * 2, "read"]
    assert found["endings"] == found["endings that were not queued"]
    assert found["after Ctrl-C"] == found["endings"][:2]  # greedy


@two_gpus
def test_gpus_that_reach_each_other_sum_in_kernels(together: dict[str, Any]) -> None:
    gpus = range(torch.cuda.device_count())
    if not torch.cuda.can_device_access_peer(gpus[0], gpus[1]):
        pytest.skip("they do not")
    assert {it["joined"] for it in together.values()} == {FEW}
