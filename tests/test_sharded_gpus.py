"""Sums over GPUs: kernels on one, and models that two processes run on two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import environment
from sharded_leader import run
from torch import Tensor

from llamachat.kernels import Norm
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.products import FEW, SEND
from llamachat.kernels.peers import Symmetric

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not find_spec("cuda"), reason="no NVIDIA GPU here"
    ),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
LEADER = Path(__file__).with_name("sharded_leader.py")
CASES: dict[str, dict[str, str]] = {
    "float32": {"quantize": "none", "dtype": "float32"},
    "bfloat16": {"quantize": "none", "dtype": "bfloat16"},
    "int8": {"quantize": "int8", "dtype": "auto"},
    "int4": {"quantize": "int4", "dtype": "auto"},
}
# What rounding leaves where sums come in another order: activations to 8 bits, prompts to bfloat16.
ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 2e-2}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def joined(size: int, dim: int) -> list[Cuda]:
    """Kernels of several processes, all of them on one GPU."""
    made = [Cuda("cuda:0", torch.float32) for _ in range(size)]
    tensors: list[Tensor] = []

    def memory(rank: int) -> Callable[[int], Symmetric]:
        def symmetric(n_bytes: int) -> Symmetric:
            if not tensors:
                tensors.extend(
                    torch.zeros(n_bytes // 8, dtype=torch.int64, device="cuda") for _ in made
                )
            return Symmetric(tensors[rank], tuple(it.data_ptr() for it in tensors), rank, None)

        return symmetric

    for rank, kernels in enumerate(made):
        peers: Any = SimpleNamespace(size=size, symmetric=memory(rank))
        assert kernels.join(peers, dim) == FEW
    return made


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 3, FEW])
@pytest.mark.parametrize("dim", [64, 1000])
def test_products_of_several_processes_are_added_and_coded(
    size: int, tokens: int, dim: int
) -> None:
    processes = joined(size, dim)
    norm = Norm(random(dim, seed=1), 1e-5)
    weights = [random(dim, 96, seed=10 + i) for i in range(size)]
    packed = [it.pack([weight]) for it, weight in zip(processes, weights, strict=True)]
    following = random(40, dim, seed=2)
    afters = [it.pack([following]) for it in processes]
    streams = [random(tokens, dim, seed=3) for _ in processes]
    inputs = [random(tokens, 96, seed=20 + i) for i in range(size)]

    def two_sums() -> list[Tensor]:
        for _ in range(2):
            for kernels, x, weight in zip(processes, inputs, packed, strict=True):
                send = partial(kernels._products.multiply, exchange=kernels._exchange)
                send(kernels._coded(x), weight, SEND, None)
            outs = []
            for kernels, h in zip(processes, streams, strict=True):
                outs.append(kernels._products.acts(tokens, dim, norm))
                assert kernels._exchange is not None
                kernels._exchange.gather(h, outs[-1].struct, norm.weight)
        return [
            kernels._product(out, after)
            for kernels, out, after in zip(processes, outs, afters, strict=True)
        ]

    expected = streams[0].double()
    added = sum(x.double() @ w.double().T for x, w in zip(inputs, weights, strict=True))
    two_sums()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products = two_sums()
    graph.replay()
    graph.replay()
    expected = expected + 6 * added
    for h, product in zip(streams, products, strict=True):
        assert torch.equal(h, streams[0])
        assert (h - expected).abs().max() < 1e-5 * expected.abs().max()
        normed = h.double() * (h.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        exact = normed * norm.weight @ following.double().T
        assert (product - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.fixture(scope="module")
def cases(tiny_llama: Callable[..., Path]) -> dict[str, dict[str, str]]:
    folder = str(tiny_llama(intermediate_size=128))
    common = {"folder": folder, "backend": "cuda", "device": "cuda:0"}
    return {name: {**common, **case} for name, case in CASES.items()}


@pytest.fixture(scope="module")
def together(
    cases: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("gpus")
    asked, answered = home / "cases.json", home / "results.json"
    asked.write_text(json.dumps(cases), "utf-8")
    done = subprocess.run(
        [sys.executable, LEADER, asked, answered, "2"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    results: dict[str, Any] = json.loads(answered.read_text("utf-8"))
    return results


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


@two_gpus
def test_gpus_that_reach_each_other_sum_in_kernels(together: dict[str, Any]) -> None:
    gpus = range(torch.cuda.device_count())
    if not torch.cuda.can_device_access_peer(gpus[0], gpus[1]):
        pytest.skip("they do not")
    assert {it["joined"] for it in together.values()} == {FEW}
