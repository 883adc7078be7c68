"""The kernels of several processes in one, which send each other what they add to a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llamachat.kernels import Norm
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.products import FEW, SEND
from llamachat.kernels.peers import Symmetric


def join(processes: Sequence[Cuda], dim: int) -> None:
    """Let them reach each other's memory."""
    tensors: list[Tensor] = []

    def memory(rank: int) -> Callable[[int], Symmetric]:
        def symmetric(n_bytes: int) -> Symmetric:
            if not tensors:
                zeros = torch.zeros(n_bytes // 8, dtype=torch.int64, device=processes[0].device)
                tensors.extend(zeros.clone() for _ in processes)
            return Symmetric(tensors[rank], tuple(it.data_ptr() for it in tensors), rank, None)

        return symmetric

    for rank, kernels in enumerate(processes):
        peers: Any = SimpleNamespace(size=len(processes), symmetric=memory(rank))
        assert kernels.join(peers, dim) == FEW


class Sums:
    """Random products with 96 columns, added to a random stream (T, D) that every process has."""

    def __init__(self, processes: Sequence[Cuda], tokens: int, dim: int) -> None:
        device = processes[0].device

        def random(*shape: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(shape, generator=generator).to(device)

        join(processes, dim)
        self._processes, self._tokens, self._dim = processes, tokens, dim
        self._norm = Norm(random(dim, seed=1), 1e-5)
        weights = [random(dim, 96, seed=10 + i) for i in range(len(processes))]
        inputs = [random(tokens, 96, seed=20 + i) for i in range(len(processes))]
        self._products = [
            (kernels._coded(x), kernels.pack([weight]))
            for kernels, x, weight in zip(processes, inputs, weights, strict=True)
        ]
        self._following = random(40, dim, seed=2)
        self._afters = [it.pack([self._following]) for it in processes]
        self._streams = [random(tokens, dim, seed=3) for _ in processes]
        self._begun = self._streams[0].double()
        each = zip(inputs, weights, strict=True)
        self._added = torch.stack([x.double() @ w.double().T for x, w in each]).sum(0)

    def add_twice(self) -> list[Tensor]:
        """What each has of the product that follows."""
        for _ in range(2):
            for kernels, (x, weight) in zip(self._processes, self._products, strict=True):
                send = partial(kernels._products.multiply, exchange=kernels._exchange)
                send(x, weight, SEND, None)
            outs = []
            for kernels, h in zip(self._processes, self._streams, strict=True):
                outs.append(kernels._products.acts(self._tokens, self._dim, self._norm))
                assert kernels._exchange is not None
                kernels._exchange.gather(h, outs[-1].struct, self._norm.weight)
        each = zip(self._processes, outs, self._afters, strict=True)
        return [kernels._product(out, after) for kernels, out, after in each]

    def check(self, products: Sequence[Tensor], n_sums: int) -> None:
        """All have the same stream, the right one, and the product of its norm."""
        expected = self._begun + n_sums * self._added
        for h, product in zip(self._streams, products, strict=True):
            assert torch.equal(h, self._streams[0])
            assert (h - expected).abs().max() < 1e-5 * expected.abs().max()
            squares = h.double().square().mean(-1, keepdim=True)
            normed = h.double() * (squares + self._norm.eps).rsqrt()
            exact = normed * self._norm.weight @ self._following.double().T
            assert (product - exact).abs().max() < 1e-4 * exact.abs().max()
