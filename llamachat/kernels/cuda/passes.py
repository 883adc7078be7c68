"""A pass of a few tokens as one CUDA graph: recorded once, replayed for each token after.

The batch is made on the host. It goes to the GPU at once, into memory that the graph reads.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llamachat.kernels import Batch
from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.step import Steps

LEAST_TABLE = 256
THREADS = 256
NAMES = tuple(field.name for field in fields(Batch))  # ids first


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is recorded for.

    Attributes:
        tokens: T of a pass.
        wanted: L of them.
        rows: B of the table.
        entries: of each row that are brought along: a power of two.
    """

    tokens: int
    wanted: int
    rows: int
    entries: int

    @staticmethod
    def of(batch: Batch) -> Shape:
        """Of the entries as many as this pass sees, or up to twice that."""
        seen = max(int(batch.seen.max()), LEAST_TABLE)
        entries = min(1 << (seen - 1).bit_length(), batch.table.shape[1])
        return Shape(len(batch.ids), len(batch.wanted), batch.table.shape[0], entries)


@dataclass(frozen=True, slots=True)
class _Staged:
    """Pinned memory for a batch, and when a kernel last read it."""

    memory: Tensor
    read: torch.cuda.Event


class Staging:
    """Pinned memory that batches are staged in.

    Torch does not know of the kernels that read it, and would let others write to it at once. So
    it is never freed, but goes to the next pass of the same size, which waits for those kernels.
    """

    def __init__(self) -> None:
        self._spare: dict[int, list[_Staged]] = {}

    def lend(self, borrower: object, count: int) -> _Staged:
        """Room for so many numbers, for as long as `borrower` lives."""
        spare = self._spare.setdefault(count, [])
        staged = spare.pop() if spare else _staged(count)
        weakref.finalize(borrower, spare.append, staged).atexit = False
        return staged


def _staged(count: int) -> _Staged:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
    return _Staged(torch.empty(count, dtype=torch.int32, pin_memory=True), event)


class Pass:
    """Memory for batches of one shape, and the graph over it once there is one."""

    def __init__(self, shape: Shape, steps: Steps, device: torch.device, staging: Staging) -> None:
        self._shape = shape
        self._steps = steps
        table = shape.rows * shape.entries
        sizes = dict.fromkeys(NAMES, shape.tokens) | {"wanted": shape.wanted, "table": table}
        self._staged = staging.lend(self, sum(sizes.values()))
        self._static = torch.empty(len(self._staged.memory), dtype=torch.int32, device=device)
        parts = dict(zip(sizes, torch.split(self._static, list(sizes.values())), strict=True))
        parts["table"] = parts["table"].view(shape.rows, shape.entries)
        self._batch = Batch(**parts)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._kept: list[Tensor] = []  # that the graph reads

    def run(self, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Run `forward` itself; what it needs is compiled then."""
        self._bring(batch)
        return forward(self._batch)

    def replay(self, forward: Callable[[Batch], Tensor], batch: Batch, pool: Any) -> Tensor:
        """Record `forward` where that was not done, and run the record.

        Args:
            forward: the same each time.
            batch: of this shape.
            pool: where memory of graphs is taken from; they never run at once.
        """
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads, NCCL's among them, go on using the GPU
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._result = forward(self._batch)
            self._kept = self._steps.send()
            self._graph = graph
        self._bring(batch)
        self._graph.replay()
        assert self._result is not None
        return self._result.clone()

    def _bring(self, batch: Batch) -> None:
        memory, read = self._staged.memory, self._staged.read
        read.synchronize()  # the batch before
        is_known, tokens = batch.ids.is_cpu, self._shape.tokens
        parts = (getattr(batch, name) for name in (NAMES if is_known else NAMES[1:]))
        entries = self._shape.entries
        flat = [part[:, :entries].flatten() if part.ndim == 2 else part for part in parts]
        torch.cat(flat, out=memory[0 if is_known else tokens :])
        args = structures.Bring(
            staged=memory.data_ptr(),
            chosen=None if is_known else batch.ids.long().data_ptr(),
            to=self._static.data_ptr(),
            count=len(self._static),
            tokens=tokens,
        )
        kernel = self._steps.kernel("stream.cu", "bring", WEIGHTS=0)
        kernel((-(-len(self._static) // THREADS),), THREADS, args)
        read.record()


class Queue:
    """Prompts on their way, two at most: an interrupt, and what is told of them, lag no more."""

    def __init__(self) -> None:
        self._queued: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Until another one may be queued."""
        if len(self._queued) > 1:
            self._queued.popleft().synchronize()

    def add(self) -> None:
        """One was queued."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
        event.record()
        self._queued.append(event)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch of a prompt on the GPU, which is not waited for."""
    parts = [getattr(batch, name) for name in NAMES]
    flat = torch.cat([part.flatten() for part in parts]).pin_memory()
    there = torch.split(flat.to(device, non_blocking=True), [part.numel() for part in parts])
    return Batch(*(part.view(old.shape) for part, old in zip(there, parts, strict=True)))
