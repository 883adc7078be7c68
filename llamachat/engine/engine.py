"""The engine: prefill what is new, then decode token by token over one cache.

It knows ids only. It keeps what it has run: the next prompt pays for what differs. State changes
after a pass, so a reply may be abandoned (closed, interrupted) at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import Tensor

from llamachat.engine.decoding import Commit, Decoding, Start, check_ids, check_one_row
from llamachat.engine.draft import Drafts
from llamachat.engine.events import EngineEvent, Prefill
from llamachat.engine.passes import batch_of
from llamachat.engine.probabilities import check_count
from llamachat.engine.rows import SlotTable
from llamachat.engine.running import Running, indexed, running
from llamachat.errors import PromptTooLongError, UsageError
from llamachat.kernels import Batch
from llamachat.model import LanguageModel

CHUNK = 256  # prompt tokens a pass: as fast as 512, and Ctrl-C lands sooner
GPU_CHUNK = 1024  # where a pass takes 50 ms


class Engine:
    """One decoder, one cache, one owner.

    Attributes:
        ctx_size: tokens that a prompt and its reply may have together.
        stop_ids: what ends a reply unless `generate` is told otherwise.
        kv_cache: the form of keys and values.
        n_ids: ids that may be chosen.
        chunk: prompt tokens a pass.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        *,
        ctx_size: int,
        stop_ids: frozenset[int] = frozenset(),
        n_ids: int | None = None,
        kv_cache: str = "auto",
        chunk: int = CHUNK,
    ) -> None:
        """Reserve the cache.

        Args:
            decoder: the model.
            ctx_size: slots of the cache.
            stop_ids: the model's own end-of-turn ids.
            n_ids: ids that the tokenizer knows; rows of the head beyond are never chosen.
            kv_cache: the form of keys and values; default the backend's own.
            chunk: prompt tokens a pass.
        """
        self.decoder = decoder
        self.ctx_size = ctx_size
        self.stop_ids = stop_ids
        self.kv_cache = kv_cache
        self.n_ids = n_ids or decoder.config.vocab_size
        self.chunk = chunk
        self._device = decoder.kernels.device
        # With a prefix, where a token stands may depend on which it is.
        self._queues = decoder.kernels.queues and decoder.config.prefix is None
        self._cache = decoder.new_cache(ctx_size, kv_cache)
        self._slots = SlotTable(ctx_size)

    @property
    def held(self) -> tuple[int, ...]:
        """The ids whose keys and values are in the cache."""
        return tuple(self._slots.rows[0].ids)

    def clear(self) -> None:
        """Forget what the cache holds."""
        self._slots = SlotTable(self.ctx_size)

    def close(self) -> None:
        """Let go of weights and cache: there are no replies any more."""
        self.clear()
        del self.decoder, self._cache

    def bytes_per_token(self, depth: int) -> int:
        """What one step of decoding reads of memory at `depth` tokens of context."""
        return self.decoder.bytes_per_token(self._cache, depth)

    def generate(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        logprobs: int = 0,
        draft: int = 0,
        stop_loops: int = 0,
        turn: int = 0,
        attempt: int = 0,
        continued: int = 0,
    ) -> Generator[EngineEvent, None, None]:
        """Run what of `ids` is not in the cache, then decode.

        Of KeyboardInterrupt a reply is told first: what it still held back comes before it leaves.
        Several rows share one context: they may fill it, and end the reply, before one alone would.

        Args:
            ids: the whole prompt; the longest prefix that the cache holds is not run again.
            decoding: how to choose.
            max_new_tokens: at most so many ids; default and bound: what is left of the context.
            stop_ids: ids that end the reply; default the model's own, empty for none.
            ends: whether a reply so far ends here.
            logprobs: with every token come its probabilities and those of so many alternatives.
            draft: run at most so many tokens ahead that the text so far suggests; what is chosen
                is the same (to the tolerance of the backend; native has none).
            stop_loops: end a reply that repeats itself so many times; 0 for never.
            turn: with `attempt`, part of the key of every draw.
            attempt: see `turn`.
            continued: how many ids at the end of `ids` are the beginning of this reply.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context.
            UsageError: there is no prompt, an id is not in the vocabulary, more alternatives are
                asked for than `MOST`, or several rows should have drafts or probabilities.
        """
        check_count(logprobs)
        check_one_row(decoding, draft=draft, logprobs=logprobs)
        start = self._start(ids, max_new_tokens, stop_ids, ends, (turn, attempt))
        start = replace(start, logprobs=logprobs > 0, continued=continued)
        reply = running(start, decoding, logprobs=logprobs, stop_loops=stop_loops)
        return self._reply(reply, Drafts(ids, draft))

    def generate_many(
        self,
        ids: Sequence[int],
        decodings: Sequence[Decoding],
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        stop_loops: int = 0,
        turn: int = 0,
        attempt: int = 0,
    ) -> Generator[tuple[int, EngineEvent], None, None]:
        """Run what of `ids` is not in the cache once, then decode several replies side by side.

        Yields events, each with the index of its decoding. Every reply is the one that `generate`
        gives, to the tolerance of the backend; it has rows of its own in the passes that all share.
        The first one's `Prefill` tells what is run, those of the others that nothing is. All share
        one context: where it is full the last ones end first. See `generate` for the arguments.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context.
            UsageError: there is no prompt, or an id is not in the vocabulary.
        """
        start = self._start(ids, max_new_tokens, stop_ids, ends, (turn, attempt))
        return self._replies(
            [running(start, it, stop_loops=stop_loops, scored=True) for it in decodings]
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) float32 of every position of `ids`; what the cache holds stays untouched."""
        return torch.cat(list(self.iter_logits(ids)))

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of `logits` from position `first` on, those of one pass (n, V) at a time."""
        self._check_ids(ids)
        slots = SlotTable(len(ids))
        cache = self.decoder.new_cache(len(ids), self.kv_cache)
        for start, end in self._passes(ids):
            chunk = ids[start:end]
            n_wanted = min(len(chunk), start + len(chunk) - first)
            rows = [0] * len(chunk)
            logits = self.decoder(self._batch(slots, rows, chunk, max(1, n_wanted)), cache)
            slots.append(rows, chunk)
            if n_wanted > 0:
                yield logits

    def _start(
        self,
        ids: Sequence[int],
        max_new_tokens: int | None,
        stop_ids: frozenset[int] | None,
        ends: Callable[[Sequence[int]], bool] | None,
        key: tuple[int, int],
    ) -> Start:
        """What a reply begins with, for any seed."""
        room = self._room(ids)
        return Start(
            prompt=tuple(ids),
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            max_new_tokens=room if max_new_tokens is None else min(max_new_tokens, room),
            key=(0, *key),
            device=str(self._device),
            ends=ends,
            best=self.decoder.kernels.best,
        )

    def _reply(self, reply: Running, drafts: Drafts) -> Generator[EngineEvent, None, None]:
        logits = yield from self._prefill(reply.start.prompt)
        try:
            while not reply.is_over:
                chosen = reply.choose(logits)
                ahead = self._ahead(chosen, reply, drafts)
                yield from reply.accept()
                if reply.is_over or len(reply.commit.rows) > self._slots.n_free:
                    break
                if ahead is None:
                    logits = self._step(reply.commit, drafts, room=reply.left - 1)
                else:
                    logits = self._taken(ahead, [0], reply.commit.ids)
        except KeyboardInterrupt:
            yield from reply.rest()
            raise
        self._keep_row_of(reply.ids)
        yield from reply.end(drafts.speculation)

    def _replies(
        self, replies: Sequence[Running]
    ) -> Generator[tuple[int, EngineEvent], None, None]:
        prompt = replies[0].start.prompt
        logits = yield from indexed(0, self._prefill(prompt))
        yield from ((i, Prefill(0, 0, len(prompt))) for i in range(1, len(replies)))
        rows = [[0] for _ in replies]  # of the table, those that each reply has
        following = dict.fromkeys(range(len(replies)), logits)  # what those choose from that go on
        try:
            while following:
                for i, of_its_rows in following.items():
                    if not replies[i].is_over:
                        replies[i].choose(of_its_rows)
                        yield from indexed(i, replies[i].accept())
                    if replies[i].is_over:
                        rows[i] = [self._row_like(replies[i].ids, rows[i])]
                        yield from indexed(i, replies[i].end())
                following = self._step_of_all(replies, rows)
        except KeyboardInterrupt:
            for i in following:
                yield from indexed(i, replies[i].rest())
            raise
        for i, reply in enumerate(replies):  # those that the context had no room for
            if not reply.is_over:
                yield from indexed(i, reply.end())

    def _prefill(self, ids: Sequence[int]) -> Generator[Prefill, None, Tensor]:
        """Run the prompt; returns the last token's logits (1, V)."""
        self._keep_row_of(ids)
        reused = min(self._reusable(ids), len(ids) - 1)
        with self._all_or_nothing():
            self._slots.truncate(0, reused)
        total = len(ids) - reused
        yield Prefill(0, total, reused)
        for start, end in self._passes(ids, reused):
            logits = self._run([0] * (end - start), ids[start:end], wanted=1)
            yield Prefill(end - reused, total, reused)
        return logits

    def _reusable(self, ids: Sequence[int]) -> int:
        """How many leading ids the cache holds, as they would be run."""
        common = self._slots.common_prefix(0, ids)
        unbroken = max(map(self.decoder.unbroken, (ids, self.held)))
        return common if common >= unbroken else 0

    def _passes(self, ids: Sequence[int], start: int = 0) -> Iterator[tuple[int, int]]:
        """From where to where each pass goes."""
        end = max(start + self.chunk, self.decoder.unbroken(ids))
        while start < len(ids):
            yield start, min(end, len(ids))
            start, end = end, end + self.chunk

    def _ahead(self, chosen: Tensor | None, reply: Running, drafts: Drafts) -> Tensor | None:
        """The pass after a choice, queued before the host knows it: of a GPU it hides the host.

        Its slot is not taken yet: if the reply is over, the next pass overwrites it.
        """
        if chosen is None or not self._queues or reply.left <= 1 or drafts.speculation is not None:
            return None
        return self._pass([0], chosen, wanted=1)

    def _step(self, commit: Commit, drafts: Drafts, room: int) -> Tensor:
        """Logits (B, V) after what was chosen, a row for each branch that has a token."""
        if not commit.rows:
            (token,) = commit.ids
            return self._decode(token, drafts, room)
        self._fork([[branch.parent for branch in commit.rows]])
        tokens = [branch.token for branch in commit.rows if branch.token is not None]
        return self._run(range(len(tokens)), tokens, wanted=len(tokens))

    def _step_of_all(self, replies: Sequence[Running], rows: list[list[int]]) -> dict[int, Tensor]:
        """Logits (B, V) of each reply that goes on, of one pass over the tokens of all.

        There are none where the context has no room for it. Updates the rows that each has; of a
        reply that is over one is kept, while there is room.
        """
        n_needed = sum(b.token is not None for reply in replies for b in reply.branches)
        if n_needed > self._slots.n_free:
            going = zip(replies, rows, strict=True)
            rows[:] = self._fork([[] if reply.is_over else own for reply, own in going])
        if not 0 < n_needed <= self._slots.n_free:
            return {}
        branches = [reply.branches if own else () for reply, own in zip(replies, rows, strict=True)]
        parents = [[own[b.parent] for b in to] for own, to in zip(rows, branches, strict=True)]
        rows[:] = self._fork(parents)
        tokens = [[b.token for b in to if b.token is not None] for to in branches]
        used = [own[: len(new)] for own, new in zip(rows, tokens, strict=True)]
        logits = self._run([*chain(*used)], [*chain(*tokens)], wanted=n_needed)
        each = torch.split(logits, [len(new) for new in tokens])
        return {i: own for i, own in enumerate(each) if len(own)}

    def _fork(self, parents: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows go on from those in `parents`, group by group; returns which rows they are now."""
        flat = [parent for group in parents for parent in group]
        if flat != list(range(self._slots.width)):
            with self._all_or_nothing():
                self._slots.fork(flat)
        rows = iter(range(len(flat)))
        return [list(islice(rows, len(group))) for group in parents]

    def _decode(self, token: int, drafts: Drafts, room: int) -> Tensor:
        """The logits (1, V) that follow `token`: of the pass that ran it ahead, or of a new one."""
        logits = drafts.take(token)
        if logits is None:
            ids = [token, *drafts.propose(room)]
            passed = self._pass([0] * len(ids), ids, wanted=len(ids))
            logits = passed[:1]
            drafts.ran(ids[1:], passed[1:])
        return self._taken(logits, [0], [token])  # a draft's slots are one by one, as it is chosen

    def _run(self, rows: Sequence[int], ids: Sequence[int], *, wanted: int) -> Tensor:
        """The logits (wanted, V) of the last of the next ids of `rows`, whose slots are taken."""
        return self._taken(self._pass(rows, ids, wanted=wanted), rows, ids)

    def _taken(self, logits: Tensor, rows: Sequence[int], ids: Sequence[int]) -> Tensor:
        """The logits of a pass, whose slots are taken now."""
        with self._all_or_nothing():
            self._slots.append(rows, ids)
        return logits

    def _pass(self, rows: Sequence[int], ids: Sequence[int] | Tensor, *, wanted: int) -> Tensor:
        """The same, but the slots are not taken yet; `ids` may be on the device still."""
        batch = self._batch(self._slots, rows, ids, wanted)
        return self.decoder(batch, self._cache)[:, : self.n_ids]

    def _batch(
        self, slots: SlotTable, rows: Sequence[int], ids: Sequence[int] | Tensor, wanted: int
    ) -> Batch:
        """A pass over the next `ids`, each of its row; the logits of the last ones are wanted."""
        at, new = slots.reserve(rows)
        known = [0] * len(rows) if isinstance(ids, Tensor) else ids

        def of_first() -> list[int]:
            new = (token for row, token in zip(rows, known, strict=True) if row == rows[0])
            return [*slots.ids(rows[0]), *new]

        places = self.decoder.places(of_first, at)
        last = torch.arange(len(rows) - wanted, len(rows), dtype=torch.int32)
        return batch_of(ids, rows, new, places, slots.table, last)

    def _keep_row_of(self, ids: Sequence[int]) -> None:
        """Of several rows, keep the one that begins most like `ids`."""
        if self._slots.width > 1:
            self._fork([[self._row_like(ids, range(self._slots.width))]])

    def _row_like(self, ids: Sequence[int], rows: Sequence[int]) -> int:
        """Which of the rows begins most like `ids`."""
        return max(rows, key=lambda row: self._slots.common_prefix(row, ids))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An interrupt inside leaves an empty table rather than one changed halfway."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    def _room(self, ids: Sequence[int]) -> int:
        """Ids that a reply may have after `ids`; the last one needs no slot."""
        self._check_ids(ids)
        if len(ids) > self.ctx_size:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context {self.ctx_size}",
                hint="shorten it, or raise --ctx-size if the model allows",
            )
        return self.ctx_size - len(ids) + 1

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not hasattr(self, "decoder"):
            raise UsageError("the model is not loaded any more")
        check_ids(ids, self.decoder.config.vocab_size)
