"""Continuous batching: replies to many prompts over one cache, which join and leave step by step.

Each step is one pass over the next token of every reply, and over some tokens of prompts that are
still being read. A reply is what `Engine.generate` gives for its prompt alone, to the tolerance of
the backend (native has none).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from llamachat.engine.decoding import Decoding, Start, check_ids, check_one_row
from llamachat.engine.engine import Engine
from llamachat.engine.events import EngineEvent, Prefill
from llamachat.engine.passes import batch_of
from llamachat.engine.pool import PAGE, Row, SlotPool, common_prefix
from llamachat.engine.probabilities import check_count
from llamachat.engine.running import Running, running
from llamachat.errors import LlamachatError, PromptTooLongError, UsageError
from llamachat.model import Places

LEAST_KEPT = 16  # rows that have ended and may be begun with
SHARE = 4  # beside replies, prompts have a quarter of the tokens of a pass of their own


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how it is to be answered. See `Engine.generate`.

    Reply i has the attempt i: with the same decoding each draws anew.
    """

    ids: tuple[int, ...]
    decodings: tuple[Decoding, ...]
    max_new_tokens: int | None = None
    stop_ids: frozenset[int] | None = None
    ends: Callable[[Sequence[int]], bool] | None = None
    logprobs: int = 0
    stop_loops: int = 0
    turn: int = 0

    @property
    def width(self) -> int:
        """Rows that all replies have together."""
        return sum(decoding.width for decoding in self.decodings)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request came to nothing."""

    error: Exception


class Job:
    """A request on its way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.replies: list[Running] = []
        self.rows: list[list[Row]] = []  # of each reply; until the prompt is read, its row alone
        self.n_pages = 0  # that are set aside
        self.reused = 0
        self.is_over = False

    @property
    def unread(self) -> int:
        """Tokens of the prompt that were not run."""
        return len(self.request.ids) - len(self.rows[0][0].ids)


Told = tuple[Job, int, EngineEvent | Failed]  # the int: which of its replies


class Scheduler:
    """Answers requests side by side, in the order in which they come.

    Attributes:
        ctx_size: tokens that a prompt and its reply may have together.
        parallel: rows that are decoded at once.
        waiting: requests that did not begin.
        running: those that did.
    """

    def __init__(self, engine: Engine, *, parallel: int, slots: int | None = None) -> None:
        """Reserve a cache beside that of the engine.

        Args:
            engine: whose decoder, context and chunks are used.
            parallel: rows at once.
            slots: of the cache; default as many as all rows can need.
        """
        self.ctx_size = engine.ctx_size
        self.parallel = parallel
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._stop_ids, self._n_ids = engine.stop_ids, engine.n_ids
        self._decoder = engine.decoder
        self._chunk = engine.chunk
        most = parallel * (-(-self.ctx_size // PAGE) + 3)
        n_pages = most if slots is None else min(most, -(-slots // PAGE))
        self._cache = self._decoder.new_cache(n_pages * PAGE, engine.kv_cache)
        self._device = str(self._decoder.kernels.device)
        self._pool = self._new_pool(n_pages)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    @property
    def n_rows(self) -> int:
        """Rows that requests on their way have or will have."""
        return sum(job.request.width for job in self.running)

    @property
    def n_free_slots(self) -> int:
        """Slots that hold nothing."""
        return self._pool.n_free * PAGE

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """The ids of rows that have ended and are kept, the least recently used first."""
        return tuple(tuple(row.ids) for row in self._pool.kept)

    def check(self, request: Request) -> None:
        """Refuse what could never be answered. It may be called by any thread.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context.
            UsageError: there is no prompt, an id is not in the vocabulary, too many rows are asked
                for, or more slots than there are.
        """
        ids = request.ids
        check_ids(ids, self._decoder.config.vocab_size)
        if len(ids) > self.ctx_size:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context {self.ctx_size}"
            )
        self.check_rows(request.width)
        if (needed := self._pages_of(request)) > self._pool.n_pages:
            raise UsageError(
                f"the cache has {self._pool.n_pages * PAGE} slots, this needs {needed * PAGE}",
                hint="bound its new tokens",
            )
        check_count(request.logprobs)
        for decoding in request.decodings:
            check_one_row(decoding, logprobs=request.logprobs)

    def check_rows(self, width: int) -> None:
        """Refuse more rows for one request than there are.

        Raises:
            UsageError: it says how many may be.
        """
        if not 1 <= width <= self.parallel:
            raise UsageError(f"{width} rows are asked for, {self.parallel} may run at once")

    def submit(self, request: Request) -> Job:
        """Take a request that was checked; what it comes to is told by `step`."""
        job = Job(request)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Forget a request; nothing more is told of it, and its rows are free."""
        if job in self.waiting:
            self.waiting.remove(job)
        self._end(job)

    def step(self) -> list[Told]:
        """Run one pass: what it came to, in order."""
        told: list[Told] = []
        try:
            told += self._admitted()
            with torch.inference_mode():
                for job, i, logits in self._pass([job for job in self.running if job.replies]):
                    told += self._chosen(job, i, logits)
        except Exception as error:  # noqa: BLE001  # the others must be told
            told += self._all_failed(error)
        return told

    def _admitted(self) -> Iterator[Told]:
        """Begin requests, as long as there is room for the next one."""
        while self.waiting:
            request = self.waiting[0].request
            if self.n_rows + request.width > self.parallel:
                return
            free = self._pool.n_pages - sum(job.n_pages for job in self.running)
            if self._pages_of(request) > free:
                return
            job = self.waiting.popleft()
            row = self._pool.begin(request.ids, self._decoder.unbroken)
            job.n_pages = self._pages_of(request, row)
            if job.n_pages > free:  # what is shared lies in too many pages
                self._pool.drop(row)
                row, job.n_pages = self._pool.new(), self._pages_of(request)
            job.rows, job.reused = [[row]], len(row.ids)
            self.running.append(job)
            yield from self._told(job, Prefill(0, job.unread, job.reused))

    def _pages_of(self, request: Request, row: Row | None = None) -> int:
        """How many pages a request can take, at most; one of several beams is kept beside."""
        held, length = (len(row.pages), len(row.ids)) if row else (0, 0)
        room = self._room(request)
        lanes = (d.width + (d.width > 1) for d in request.decodings)
        return held + _pages(len(request.ids) - length) + sum(lanes) * (_pages(room) + 1)

    def _room(self, request: Request) -> int:
        room = self.ctx_size - len(request.ids) + 1
        asked = request.max_new_tokens
        return room if asked is None else min(asked, room)

    def _pass(self, choosing: Sequence[Job]) -> list[tuple[Job, int | None, Tensor]]:
        """The logits that each reply, or a prompt that was read to its end, goes on from."""
        runs: list[tuple[Row, Sequence[int]]] = []
        wanting: list[tuple[Job, int | None, int]] = []  # the last: rows of logits
        for job in choosing:
            for i, reply in enumerate(job.replies):
                if not reply.is_over:
                    tokens = self._forked(job, i)
                    runs += zip(job.rows[i], ([token] for token in tokens), strict=False)
                    wanting.append((job, i, len(tokens)))
        n_decoded = len(runs)
        last = list(range(n_decoded))
        n_tokens = n_decoded
        for job, ids in self._portions(is_beside=bool(runs)):
            runs.append((job.rows[0][0], ids))
            n_tokens += len(ids)
            if len(ids) == job.unread:
                last.append(n_tokens - 1)
                wanting.append((job, None, 1))
        if not runs:
            return []
        logits = self._run(runs, last)
        split = torch.split(logits, [n for _, _, n in wanting]) if wanting else ()
        return [(job, i, of_it) for (job, i, _), of_it in zip(wanting, split, strict=True)]

    def _portions(self, *, is_beside: bool) -> Iterator[tuple[Job, Sequence[int]]]:
        """What is read now of which prompts: they take turns, so that short ones come to an end."""
        left = self._chunk // SHARE if is_beside else self._chunk
        for job in [job for job in self.running if not job.replies]:
            if left <= 0:
                return
            ids = job.request.ids
            done = len(job.rows[0][0].ids)
            portion = ids[done : max(done + left, self._decoder.unbroken(ids))]
            left -= len(portion)
            if done + len(portion) < len(ids):  # the others are before it in the next pass
                self.running.remove(job)
                self.running.append(job)
            yield job, portion

    def _run(self, runs: Sequence[tuple[Row, Sequence[int]]], wanted: Sequence[int]) -> Tensor:
        """Run the next ids of rows: the logits (L, V) of the tokens at `wanted`."""
        rows: list[int] = []
        slots: list[int] = []
        places: list[Places] = []
        for row, ids in runs:
            at, new = self._pool.extend(row, ids)
            rows += [row.index] * len(ids)
            slots += new
            places.append(self._decoder.places(partial(list, row.ids), at))
        seen = chain.from_iterable(it.seen for it in places)
        positions = zip(*(it.positions for it in places), strict=True)
        joined = Places([*seen], [[*chain.from_iterable(each)] for each in positions])
        every = [*chain.from_iterable(ids for _, ids in runs)]
        last = torch.tensor([*wanted], dtype=torch.int32)
        batch = batch_of(every, rows, slots, joined, self._pool.table, last)
        return self._decoder(batch, self._cache)[:, : self._n_ids]

    def _forked(self, job: Job, i: int) -> list[int]:
        """The next tokens of a reply, whose rows go on as it chose."""
        branches = job.replies[i].branches
        parents = [branch.parent for branch in branches]
        if parents != [*range(len(job.rows[i]))]:
            job.rows[i] = self._pool.fork(job.rows[i], parents)
        return [branch.token for branch in branches if branch.token is not None]

    def _chosen(self, job: Job, i: int | None, logits: Tensor) -> Iterator[Told]:
        """Let a reply take a step, or all of a job their first one."""
        try:
            if i is None:
                yield from self._begun(job)
            for n in range(len(job.replies)) if i is None else (i,):
                reply = job.replies[n]
                reply.choose(logits)
                yield from ((job, n, event) for event in reply.accept())
                if reply.is_over:
                    yield from ((job, n, event) for event in reply.end())
                    self._keep(job.rows[n], reply.ids)
                    job.rows[n] = []
            if all(reply.is_over for reply in job.replies):
                self._end(job)
        except LlamachatError as error:  # of this reply's own; nothing of it is worth keeping
            self._end(job, keep=False)
            yield from self._told(job, Failed(error))

    def _begun(self, job: Job) -> Iterator[Told]:
        """The prompt is read: a row for each reply."""
        request, n = job.request, len(job.request.decodings)
        total = len(request.ids) - job.reused
        yield from self._told(job, Prefill(total, total, job.reused))
        start = Start(
            prompt=request.ids,
            stop_ids=self._stop_ids if request.stop_ids is None else request.stop_ids,
            max_new_tokens=self._room(request),
            key=(0, request.turn, 0),
            device=self._device,
            best=self._decoder.kernels.best,
            ends=request.ends,
            logprobs=request.logprobs > 0,
        )
        job.rows = [[row] for row in self._pool.fork(job.rows[0], [0] * n)]
        for i, decoding in enumerate(request.decodings):
            own = replace(start, key=(0, request.turn, i))
            reply = running(own, decoding, logprobs=request.logprobs, stop_loops=request.stop_loops)
            job.replies.append(reply)

    def _keep(self, rows: Sequence[Row], ids: Sequence[int]) -> None:
        """Of the rows of a reply that has ended, keep the one that is most like it."""
        best = max(rows, key=lambda row: common_prefix(row.ids, ids))
        self._pool.keep(best)
        for row in rows:
            if row is not best:
                self._pool.drop(row)

    def _end(self, job: Job, *, keep: bool = True) -> None:
        if job.is_over:
            return
        job.is_over = True
        if job in self.running:
            self.running.remove(job)
        for row in chain.from_iterable(job.rows):
            if keep and row.ids:
                self._pool.keep(row)
            else:
                self._pool.drop(row)
        job.rows = []

    def _all_failed(self, error: Exception) -> list[Told]:
        """A pass failed: what the cache holds is not known any more."""
        failed = [*self.running]
        self.running.clear()
        self._pool = self._new_pool(self._pool.n_pages)
        for job in failed:
            job.is_over = True
        return [told for job in failed for told in self._told(job, Failed(error))]

    def _told(self, job: Job, event: EngineEvent | Failed) -> list[Told]:
        return [(job, i, event) for i in range(len(job.request.decodings))]

    def _new_pool(self, n_pages: int) -> SlotPool:
        width = 2 * self.parallel + max(LEAST_KEPT, 2 * self.parallel)
        return SlotPool(n_pages, self.ctx_size, width)


def _pages(n: int) -> int:
    return -(-n // PAGE)
