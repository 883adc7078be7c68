"""The contract over several processes: each runs a part of every weight on a backend of its own.

Query, key, value, gate, up and head are cut by rows, so that each process has some heads, some of
the hidden dimensions and some of the logits; what reads those (o, down) is cut by columns, and its
products are summed: two sums a layer, and one of the logits (Shoeybi et al. 2019, arXiv
1909.08053). Whoever calls the first process's object needs to know nothing of the others, and the
backend below runs a smaller model. `model.sharding` cuts the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from llamachat.kernels import Act, Angles, Batch, Cache, CacheShape, Kernels, Norm, Weight
from llamachat.kernels.peers import Peers


@dataclass(frozen=True)
class Shared:
    """A cache: this process's part, and the number by which the others know theirs."""

    number: int
    part: Cache


@runtime_checkable
class Joining(Protocol):
    """A backend whose kernels can sum over processes."""

    def join(self, peers: Peers, dim: int) -> int:
        """Let `linear_add` do so; the most tokens of a pass for which it will."""
        ...


class Sharded:
    """`backend` over this process's part of every weight.

    Attributes:
        backend: computes this process's part.
        number: by which the others know this object.
        queues: ids that are on the way go on to the others' devices.
    """

    def __init__(
        self, backend: Kernels, peers: Peers, number: int, dim: int, rows: range, n_rows: int
    ) -> None:
        """Share a model.

        Args:
            backend: computes this process's part.
            peers: this process and the others.
            number: by which the others know this object.
            dim: of the hidden state.
            rows: of the head that this process has.
            n_rows: of the head in all.
        """
        self.name, self.device, self.backend = backend.name, backend.device, backend
        self.place, self.pack, self.quantize = backend.place, backend.pack, backend.quantize
        self.n_bytes = backend.n_bytes
        self.queues = backend.queues
        self.then, self.angles, self.linear = backend.then, backend.angles, backend.linear
        self.embed, self.norm_linear = backend.embed, backend.norm_linear
        self.norm_swiglu, self.best = backend.norm_swiglu, backend.best
        self.number = number
        self._peers = peers
        self._is_alone = False
        self._joined = backend.join(peers, dim) if isinstance(backend, Joining) else 0
        self._rows, self._n_rows = rows, n_rows
        if peers.rank == 0:
            weakref.finalize(self, peers.drop, self.number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the others are left out: passes give nothing but what they leave behind."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def cache(self, shape: CacheShape, slots: int, form: str = "auto") -> Shared:
        """The others reserve theirs, too."""
        part = self.backend.cache(shape, slots, form)
        if self._peers.rank or self._is_alone:
            return Shared(-1, part)  # the first process tells its number
        made = Shared(self._peers.number(), part)
        weakref.finalize(made, self._peers.drop, made.number)
        self._peers.tell({"cache": made.number, "model": self.number, "slots": slots, "form": form})
        return made

    def slot_bytes(self, cache: Shared) -> int:
        """Of this process."""
        return self.backend.slot_bytes(cache.part)

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Shared | None = None
    ) -> Tensor:
        """One pass, which the others run, too; if it is queued here, it is there."""
        assert cache is not None
        if self._is_alone:
            return self.backend.run(forward, batch, cache.part)
        with self._peers.whole_pass():
            if self._peers.rank == 0:
                self._peers.tell_pass(self.number, cache.number, batch)
            return self.backend.run(forward, batch, cache.part)

    def attention(self, qkv: Act, angles: Angles, batch: Batch, cache: Shared, layer: int) -> Act:
        """Over the heads of this process."""
        return self.backend.attention(qkv, angles, batch, cache.part, layer)

    def linear_add(self, x: Act, weight: Weight, h: Tensor) -> None:
        """h (T, D) += W x, a sum over the columns of all; h counts once."""
        if len(h) <= self._joined:
            self.backend.linear_add(x, weight, h)
            return
        if self._peers.rank:
            self.then(h.zero_)
        self.backend.linear_add(x, weight, h)
        self.then(lambda: self._sum(h))

    def logits(self, h: Tensor, norm: Norm, weight: Weight, wanted: Tensor) -> Tensor:
        """(L, V), the same bits everywhere: a sum of rows that are zero where others have them."""
        own = self.backend.logits(h, norm, weight, wanted)  # (L, V / N)
        whole = own.new_empty((len(wanted), self._n_rows))

        def gather() -> None:
            whole.zero_()
            whole[:, self._rows.start : self._rows.stop] = own
            self._sum(whole)

        self.then(gather)
        return whole

    def _sum(self, tensor: Tensor) -> None:
        if not self._is_alone:
            self._peers.sum(tensor)
