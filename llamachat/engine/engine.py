"""The engine: prefill what is new, then decode token by token over one cache.

It knows ids only. It keeps what it has run: the next prompt pays for what differs. State changes
after a pass, so a reply may be abandoned (closed, interrupted) at any point.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llamachat.engine.decoding import Decoding, Start, Strategy
from llamachat.engine.events import Done, EngineEvent, Prefill, Token
from llamachat.engine.rows import SlotTable
from llamachat.errors import DamagedFileError, PromptTooLongError, UsageError
from llamachat.kernels import Batch
from llamachat.model.decoder import Decoder

CHUNK = 256  # prompt tokens a pass: as fast as 512, and Ctrl-C lands sooner


class Engine:
    """One decoder, one cache, one owner.

    Attributes:
        ctx_size: tokens that a prompt and its reply may have together.
        stop_ids: what ends a reply unless `generate` is told otherwise.
        kv_cache: the form of keys and values.
    """

    def __init__(
        self,
        decoder: Decoder,
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
        self._n_ids = n_ids or decoder.config.vocab_size
        self._chunk = chunk
        self._device = decoder.kernels.device
        self._cache = decoder.new_cache(ctx_size, kv_cache)
        self._slots = SlotTable(ctx_size, device=self._device)

    @property
    def held(self) -> tuple[int, ...]:
        """The ids whose keys and values are in the cache."""
        return tuple(self._slots.rows[0].ids)

    def clear(self) -> None:
        """Forget what the cache holds."""
        self._slots = SlotTable(self.ctx_size, device=self._device)

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
        turn: int = 0,
        attempt: int = 0,
    ) -> Iterator[EngineEvent]:
        """Run what of `ids` is not in the cache, then decode.

        Args:
            ids: the whole prompt; the longest prefix that the cache holds is not run again.
            decoding: how to choose.
            max_new_tokens: at most so many ids; default and bound: what is left of the context.
            stop_ids: ids that end the reply; default the model's own, empty for none.
            ends: whether a reply so far ends here.
            turn: with `attempt`, part of the key of every draw.
            attempt: see `turn`.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context.
            UsageError: there is no prompt, or an id is not in the vocabulary.
        """
        room = self._room(ids)
        decoding = decoding.seeded(secrets.randbits(32))
        start = Start(
            prompt=tuple(ids),
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            max_new_tokens=room if max_new_tokens is None else min(max_new_tokens, room),
            key=(decoding.seed or 0, turn, attempt),
            device=str(self._device),
            ends=ends,
        )
        return self._reply(start, decoding.start(start))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) float32 of every position of `ids`; what the cache holds stays untouched."""
        return torch.cat(list(self.iter_logits(ids)))

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of `logits` from position `first` on, those of one pass (n, V) at a time."""
        self._check_ids(ids)
        slots = SlotTable(len(ids), device=self._device)
        cache = self.decoder.new_cache(len(ids), self.kv_cache)
        for start in range(0, len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]
            n_wanted = min(len(chunk), start + len(chunk) - first)
            batch, new = self._batch(slots, chunk, wanted=max(1, n_wanted))
            logits = self.decoder(batch, cache)
            slots.append(0, chunk, new)
            if n_wanted > 0:
                yield logits

    def _reply(self, start: Start, strategy: Strategy) -> Iterator[EngineEvent]:
        logits = yield from self._prefill(start.prompt)
        for step in range(start.max_new_tokens):
            commit = strategy.accept(strategy.choose(logits, torch.tensor(step)))
            for token in commit.ids:
                yield Token(token)
            if commit.done:
                yield Done(commit.finish_reason or "stop")
                return
            logits = self._run(commit.ids)
        yield Done("length")

    def _prefill(self, ids: Sequence[int]) -> Generator[Prefill, None, Tensor]:
        """Run the prompt; returns the last token's logits (1, V)."""
        reused = min(self._slots.common_prefix(0, ids), len(ids) - 1)
        with self._all_or_nothing():
            self._slots.truncate(0, reused)
        total = len(ids) - reused
        yield Prefill(0, total, reused)
        for done in range(0, total, self._chunk):
            chunk = ids[reused + done : reused + done + self._chunk]
            logits = self._run(chunk)
            yield Prefill(done + len(chunk), total, reused)
        return logits

    def _run(self, ids: Sequence[int]) -> Tensor:
        """One pass; returns the last token's logits (1, V), of which no choice can fail."""
        batch, slots = self._batch(self._slots, ids, wanted=1)
        logits = self.decoder(batch, self._cache)
        with self._all_or_nothing():
            self._slots.append(0, ids, slots)
        logits = logits[:, : self._n_ids]
        if not math.isfinite(logits.amax().item()):  # of NaN and anything, amax is NaN
            raise DamagedFileError("the model's logits are not numbers: its weights are damaged")
        return logits

    def _batch(
        self, slots: SlotTable, ids: Sequence[int], *, wanted: int
    ) -> tuple[Batch, list[int]]:
        """A pass over the next `ids` of row 0, and the slots it will fill."""
        n, start = len(ids), len(slots.rows[0].ids)
        new = slots.next_slots(n)
        positions = range(start, start + n)
        seen = range(start + 1, start + n + 1)
        whole = torch.tensor([ids, [0] * n, new, seen, positions], dtype=torch.int32)  # one for all
        id_, row, slot, seen_, position = whole.to(self._device).unbind()
        batch = Batch(
            ids=id_,
            row=row,
            slot=slot,
            seen=seen_,
            position=position,
            table=slots.with_slots(0, new),
            wanted=torch.arange(n - wanted, n, dtype=torch.int32, device=self._device),
        )
        return batch, new

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
        if not ids:
            raise UsageError("there is nothing to run: the prompt has no tokens")
        rows = self.decoder.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < rows:
            raise UsageError(f"ids {min(ids)} to {max(ids)} are not all in 0 to {rows - 1}")
