"""Sums over the GPUs of several processes, whose kernels write to each other's memory.

A product sends its part to all processes as it is computed, each number with that of the sum; the
kernel after it waits for the parts, adds them to the stream, and codes the stream for what follows
(peers.cuh, gather.cu). In a graph as outside of one: sums are counted on the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.step import Steps
from llamachat.kernels.peers import Symmetric

MOST = 8  # processes
WORD, TURNS = 8, 2
THREADS, BLOCK = 128, 32


class Exchange:
    """Of streams (T, D) up to so many tokens. A pass has an even number of sums."""

    def __init__(self, steps: Steps, memory: Symmetric, tokens: int, dim: int) -> None:
        """Use `memory` of `n_bytes(...)` zeros."""
        self._steps, self._memory, self._dim = steps, memory, dim
        self._part = tokens * dim
        self._epochs = torch.tensor([1, 2], dtype=torch.int32, device=memory.tensor.device)
        self._turn = 0

    @staticmethod
    def n_bytes(peers: int, tokens: int, dim: int) -> int:
        """That it takes."""
        return TURNS * peers * tokens * dim * WORD

    def begin(self) -> None:
        """A pass; whether the one before came to its end does not matter."""
        self._turn = 0

    def address(self, args: structures.Sending) -> None:
        """Let a product send what it gives to the buffers of this turn."""
        rank, peers = self._memory.rank, len(self._memory.addresses)
        for i, base in enumerate(self._memory.addresses):
            args.to[i] = base + (self._turn * peers + rank) * self._part * WORD
        args.peers, args.epoch = peers, self._epoch(self._turn)

    def gather(self, h: Tensor, out: structures.Acts | None, gain: Tensor | None) -> None:
        """Add what was sent to h (T, D), and code it where a norm with weight `gain` follows."""
        peers = len(self._memory.addresses)
        args = structures.Gather(
            from_=self._memory.tensor.data_ptr() + self._turn * peers * self._part * WORD,
            h=h.data_ptr(),
            gain=None if gain is None else gain.data_ptr(),
            epoch=self._epoch(self._turn),
            next=self._epoch(1 - self._turn),
            stride=self._part,
            peers=peers,
            dim=self._dim,
        )
        if out is not None:
            args.out = out
        kernel = self._steps.kernel("gather.cu", "gather")
        kernel((-(-self._dim // THREADS), len(h)), THREADS, args)
        self._turn = 1 - self._turn

    def _epoch(self, turn: int) -> int:
        return self._epochs.data_ptr() + turn * self._epochs.element_size()
