"""A pass of a few tokens as one CUDA graph: recorded once, replayed for each token after.

The batch is made on the host. It goes to the GPU in one copy, into memory that the graph reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llamachat.kernels import Batch

LEAST_TABLE = 256
NAMES = tuple(field.name for field in fields(Batch))


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


class Pass:
    """Memory for batches of one shape, and the graph over it once there is one."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape = shape
        table = shape.rows * shape.entries
        sizes = dict.fromkeys(NAMES, shape.tokens) | {"wanted": shape.wanted, "table": table}
        self._staged = torch.empty(sum(sizes.values()), dtype=torch.int32, pin_memory=True)
        self._static = torch.empty(len(self._staged), dtype=torch.int32, device=device)
        parts = dict(zip(sizes, torch.split(self._static, list(sizes.values())), strict=True))
        parts["table"] = parts["table"].view(shape.rows, shape.entries)
        self._batch = Batch(**parts)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

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
            with torch.cuda.graph(graph, pool=pool):
                self._result = forward(self._batch)
            self._graph = graph
        self._bring(batch)
        self._graph.replay()
        assert self._result is not None
        return self._result.clone()

    def _bring(self, batch: Batch) -> None:
        self._copied.synchronize()  # of the batch before
        parts = (getattr(batch, name) for name in NAMES)
        entries = self._shape.entries
        flat = [part[:, :entries].flatten() if part.ndim == 2 else part for part in parts]
        torch.cat(flat, out=self._staged)
        self._static.copy_(self._staged, non_blocking=True)
        self._copied.record()
