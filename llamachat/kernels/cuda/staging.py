"""From the host to one GPU: while one pinned buffer is copied, the other one is filled.

The driver copies other memory through pinned buffers of its own, by one thread and in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

BUFFER_BYTES = 16 << 20
LEAST_BYTES = 1 << 16  # that are worth it


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Pinned memory, and when it was last copied."""

    memory: Tensor
    copied: torch.cuda.Event


class Stage:
    """Brings tensors to a GPU, in the order of its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: Iterator[_Buffer] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the GPU; it may be changed or freed at once."""
        if tensor.device == self._device:
            return tensor
        if tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES:
            return tensor.to(self._device)
        placed = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = (it.view(-1).view(torch.uint8) for it in (tensor.contiguous(), placed))
        with torch.cuda.device(self._device):
            for start in range(0, len(source), BUFFER_BYTES):
                part, buffer = source[start : start + BUFFER_BYTES], self._next()
                buffer.copied.synchronize()
                filled = buffer.memory[: len(part)].copy_(part)
                target[start : start + BUFFER_BYTES].copy_(filled, non_blocking=True)
                buffer.copied.record()
        return placed

    def close(self) -> None:
        """Give the buffers back; the next tensor has new ones."""
        self._buffers = None

    def _next(self) -> _Buffer:
        if self._buffers is None:
            self._buffers = cycle([_buffer(), _buffer()])
        return next(self._buffers)


def _buffer() -> _Buffer:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
    return _Buffer(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True), event)
