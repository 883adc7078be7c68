"""A pass as a list of operations that the native library runs in one call.

The decoder describes a pass by calling the backend; nothing of what it gets back is read before
the pass is over. So the calls can be written down, run at once, and run again for the next token
with other ids: what a token costs in Python does not grow with the number of layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamachat.kernels import Batch, abi

Call = abi.Angles | abi.Embed | abi.Gather | abi.Attention | abi.Linear

Step = Call | Callable[[], object]  # what is no operation of the library is called between them


@dataclass(slots=True)
class Program:
    """Operations over buffers of their own.

    Attributes:
        pass_: what the operations read of a batch.
        calls: in order; the library runs those that follow one another in one call.
        result: what the last one writes.
        kept: tensors that must live as long as the operations that read them.
    """

    pass_: abi.Pass = field(default_factory=abi.Pass)
    calls: list[Step] = field(default_factory=list)
    result: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)
    _parts: list[ctypes.Array[abi.Op] | Callable[[], object]] | None = None
    _fresh: abi.Linear | None = None  # the last operation, where it can write to fresh memory
    _buffers: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def buffer(self, kind: str, n: int, width: int) -> Tensor:
        """Room for (n, width) float32, which lasts until the next call of its kind."""
        key = (kind, n, width)
        if key not in self._buffers:
            self._buffers[key] = torch.empty((n, width))
        return self._buffers[key]

    def point_at(self, batch: Batch) -> None:
        """Let the operations read this batch, which must outlive their run."""
        it = self.pass_
        assert batch.ids.dtype == batch.wanted.dtype == batch.table.dtype == torch.int32
        it.ids, it.row, it.slot = batch.ids.data_ptr(), batch.row.data_ptr(), batch.slot.data_ptr()
        it.seen, it.position = batch.seen.data_ptr(), batch.position.data_ptr()
        it.table, it.wanted = batch.table.data_ptr(), batch.wanted.data_ptr()
        it.n_tokens, it.n_wanted = len(batch.ids), len(batch.wanted)
        it.table_stride = batch.table.stride(0)

    def answer(self, lib: ctypes.CDLL, pool: int) -> Tensor:
        """Run all of it: the result, in memory of its own."""
        assert self.result is not None
        last = self.calls[-1]
        if self._fresh is None and isinstance(last, abi.Linear) and last.mode == abi.STORE:
            self._fresh = last if last.out == self.result.data_ptr() else None
        if self._fresh is None:
            self.run(lib, pool)
            return self.result.clone()
        result = torch.empty_like(self.result)
        self._fresh.out = result.data_ptr()
        self.run(lib, pool)
        return result

    def run(self, lib: ctypes.CDLL, pool: int) -> None:
        """Run all of it; between two calls of the library an interrupt is answered.

        Raises:
            MemoryError: the library could not get memory.
        """
        if self._parts is None:
            self._parts = list(_parts(self.calls))
        for part in self._parts:
            if not isinstance(part, ctypes.Array):
                part()
                continue
            progress, status = abi.Progress(), 1
            while status > 0:
                status = lib.lc_run(pool, part, len(part), progress)
            if status < 0:
                raise MemoryError("no memory for activations")


def _parts(calls: Sequence[Step]) -> Iterator[ctypes.Array[abi.Op] | Callable[[], object]]:
    """Operations that follow one another, and what is called between them."""
    ops: list[abi.Op] = []
    for call in calls:
        if isinstance(call, Call):
            ops.append(abi.Op(call.kind, ctypes.addressof(call)))
            continue
        if ops:
            yield (abi.Op * len(ops))(*ops)
        ops = []
        yield call
    if ops:
        yield (abi.Op * len(ops))(*ops)
