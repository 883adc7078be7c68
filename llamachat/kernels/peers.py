"""The processes that run one model together, over `torch.distributed`.

The first one leads: it says what is done next, and the others do it. Tensors are summed by NCCL on
GPUs and by gloo on CPUs; messages are bytes that gloo brings, JSON or int32, never pickles. Ids
that the host does not know yet go the way of the sums, after the message about their pass.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from llamachat import settings
from llamachat.errors import LlamachatError, UsageError
from llamachat.kernels import Batch

PATIENCE = timedelta(days=3650)  # of who waits for the next message: users think
LONGEST_PASS = timedelta(minutes=10)  # of who waits for a sum
ENDING_S = 5  # that a watcher of the processes has to end this one
HEADER = 9  # numbers: of the data, the kind, and of a pass seven more
FRAME = 512  # numbers that travel at once: a token's batch, the header before it
WORD = 4  # bytes of a number
JSON, PASS, QUEUED = range(3)  # kinds of messages; a queued pass is told without its ids
LEAST_TABLE = 256  # entries of a table that travel


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Memory on the GPU of every process, which all of them reach.

    Attributes:
        tensor: this process's, int64.
        addresses: of every process's, as this one's kernels see them.
        rank: of this process.
        mapping: what keeps the memory of the others mapped.
    """

    tensor: Tensor
    addresses: tuple[int, ...]
    rank: int
    mapping: object


class Peers:
    """This process and the others.

    Attributes:
        rank: 0 leads.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int, *, gpu: int | None, store: str | None) -> None:
        """Meet the others; returns when all are there.

        Args:
            rank: of this process.
            size: of the group.
            gpu: the GPU that this process uses, or None.
            store: a file by which they find each other; None: torchrun's environment.

        Raises:
            LlamachatError: they did not come together.
            UsageError: this process belongs to others already.
        """
        if dist.is_initialized():
            raise UsageError("a process shares models with as many others as it began with")
        self.rank, self.size, self._gpu = rank, size, gpu
        self._device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
        self._numbers = count()
        self._dropped: list[int] = []
        self._is_lost = False
        backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
        found = None if store is None else dist.FileStore(store, size)  # type: ignore[attr-defined]  # torch
        with self._together():
            if gpu is not None:
                torch.cuda.set_device(gpu)
            dist.init_process_group(
                backend, store=found, rank=rank, world_size=size, timeout=PATIENCE
            )
            self._sums = dist.new_group(backend=backend, timeout=LONGEST_PASS)

    def number(self) -> int:
        """A new one, for what the others shall keep."""
        return next(self._numbers)

    def drop(self, number: int) -> None:
        """Let the others forget what has this number, with the next pass or load."""
        self._dropped.append(number)

    def tell_dropped(self) -> None:
        """Let them forget it now."""
        if self._dropped:
            dropped, self._dropped = self._dropped, []
            self.tell({"drop": dropped})

    def sum(self, tensor: Tensor) -> None:
        """Of the tensors of all, in place; all get the same bits."""
        with self._together():
            dist.all_reduce(tensor, group=self._sums)

    def symmetric(self, n_bytes: int) -> Symmetric | None:
        """So many zeros in each process; None where GPUs cannot reach each other.

        All processes ask for it at once.
        """
        if not self._agree(self._reaches_all()):
            return None
        made: Symmetric | None = None
        with suppress(ImportError, AttributeError, TypeError, RuntimeError):  # it is torch's alpha
            made = self._rendezvous(n_bytes)
        return made if self._agree(made is not None) else None

    def _reaches_all(self) -> bool:
        """Whether the GPUs from the first process's on are of this machine, and linked."""
        if self._gpu is None:
            return False
        first = self._gpu - self.rank
        return 0 <= first <= torch.cuda.device_count() - self.size and all(
            gpu == self._gpu or torch.cuda.can_device_access_peer(self._gpu, gpu)
            for gpu in range(first, first + self.size)
        )

    def _rendezvous(self, n_bytes: int) -> Symmetric:
        import torch.distributed._symmetric_memory as symmetric

        settings.disable_multicast()
        tensor = symmetric.empty(n_bytes // 8, dtype=torch.int64, device=self._device)
        mapping = symmetric.rendezvous(tensor, self._sums)
        addresses = tuple(mapping.buffer_ptrs)
        if addresses[self.rank] != tensor.data_ptr() or len(addresses) != self.size:
            raise RuntimeError("the memory is not where it is said to be")
        tensor.zero_()
        torch.cuda.synchronize(self._device)
        return Symmetric(tensor, addresses, self.rank, mapping)

    def _agree(self, is_so: bool) -> bool:
        """Whether it is so in all processes."""
        with self._together():
            n = torch.tensor(int(is_so))
            dist.all_reduce(n, dist.ReduceOp.MIN, group=self._sums)
            return bool(n)

    def tell(self, message: Mapping[str, Any], *, source: int = 0) -> None:
        """Send a message to all the others."""
        text = json.dumps(message).encode()
        words = bytearray(text.ljust(-(-len(text) // WORD) * WORD))
        self._send([JSON], torch.frombuffer(words, dtype=torch.int32), source)

    def tell_pass(self, model: int, cache: int, batch: Batch) -> None:
        """Let the others run a batch, too; nobody waits for ids that are on the way."""
        self.tell_dropped()
        is_known = _is_known(batch)
        rows, entries = batch.table.shape
        n = min(max(int(batch.seen.max()), LEAST_TABLE), entries)
        lists = (batch.row, batch.slot, batch.seen, batch.position, batch.wanted)
        told = ([batch.ids] if is_known else []) + [*lists, batch.table[:, :n]]
        kind = PASS if is_known else QUEUED
        header = [kind, len(batch.ids), len(batch.wanted), rows, entries, n, model, cache]
        self._send(header, torch.cat([it.flatten() for it in told]), 0)
        if not is_known:
            self._share(batch.ids.long())

    def hear(self, source: int = 0) -> Mapping[str, Any] | tuple[int, int, Batch]:
        """The next message; or a model, a cache, and the batch to run."""
        with self._together():
            frame = torch.empty(FRAME, dtype=torch.int32)
            dist.broadcast(frame, source)
            n_data, kind, *sizes = frame[:HEADER].tolist()
            data = frame[HEADER : HEADER + n_data]
            if n_data > len(data):
                rest = torch.empty(n_data - len(data), dtype=torch.int32)
                dist.broadcast(rest, source)
                data = torch.cat([data, rest])
        if kind == JSON:
            message: Mapping[str, Any] = json.loads(data.numpy().tobytes())
            return message
        n_ids = sizes[0]
        if kind == PASS:
            return _pass_of(data[:n_ids], data[n_ids:], sizes)
        ids = torch.empty(n_ids, dtype=torch.int64, device=self._device)
        self._share(ids)
        return _pass_of(ids, data, sizes)

    def _share(self, tensor: Tensor) -> None:
        """What the first process has, to the devices of all, in place; queued as a sum is."""
        with self._together(), torch.inference_mode():
            dist.broadcast(tensor, 0, group=self._sums)

    def _send(self, header: list[int], data: Tensor, source: int) -> None:
        numbers = [len(data), *header]
        numbers += [0] * (HEADER - len(numbers))
        whole = torch.cat([torch.tensor(numbers, dtype=torch.int32), data])
        frame = pad(whole[:FRAME], (0, max(0, FRAME - len(whole))))
        with self._together():
            dist.broadcast(frame, source)
            if len(whole) > FRAME:
                dist.broadcast(whole[FRAME:], source)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever fails inside is that another process is not there any more."""
        said = f"one of the {self.size} processes that run the model together has ended"
        if self._is_lost:
            raise LlamachatError(said)
        try:
            yield
        except RuntimeError as error:
            self._is_lost = True
            time.sleep(ENDING_S if self.rank == 0 else 0)
            raise LlamachatError(said) from error

    @contextmanager
    def whole_pass(self) -> Iterator[None]:
        """Ctrl-C inside comes at its end: the others would wait for what is left of it.

        After any other exception they cannot go on.
        """
        is_main = threading.current_thread() is threading.main_thread()
        came: list[Any] = []
        previous = (
            signal.signal(signal.SIGINT, lambda *args: came.append(args)) if is_main else None
        )
        try:
            yield
        except BaseException:
            self._is_lost = True
            raise
        finally:
            if is_main:
                signal.signal(signal.SIGINT, previous)
        if came and callable(previous):
            previous(*came[-1])


def _is_known(batch: Batch) -> bool:
    """Whether the host made the ids, as it did the rest."""
    ids, table = batch.ids, batch.table
    return (ids.device, ids.dtype) == (table.device, table.dtype)


def _pass_of(ids: Tensor, data: Tensor, sizes: Sequence[int]) -> tuple[int, int, Batch]:
    """What `Peers.tell_pass` told: `data` after the ids, `sizes` after the kind."""
    tokens, wanted, rows, entries, n, model, cache = sizes
    parts = torch.split(data, [*[tokens] * 4, wanted, rows * n])
    row, slot, seen, position, wanted_ids, known = parts
    table = torch.zeros((rows, entries), dtype=torch.int32)
    table[:, :n] = known.view(rows, n)
    return model, cache, Batch(ids, row, slot, seen, position, table, wanted_ids)
