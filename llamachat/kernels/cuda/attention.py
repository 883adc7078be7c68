"""Attention of a few tokens; of a prompt, what comes before it (attention.cu)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamachat.kernels import Angles, Batch
from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.step import Launch, Steps
from llamachat.kernels.cuda.weights import BLOCK
from llamachat.kernels.reference import Cache

THREADS, COMBINING, PREPARING = 512, 128, 256  # of a block
CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
SHARED_HEADS, ALONE = 4, 512  # query heads that a block has at most; one, of so many entries
WHOLE, LEAST_SPLIT, MOST_SPLITS = 256, 64, 32  # entries that are not split; of a split
TICKETS = 1 << 14


@dataclass(frozen=True, slots=True)
class Asked:
    """One call: what it is asked, and of which layer.

    Attributes:
        qkv: (T, (H + 2K) E).
        angles: of its tokens.
        batch: on the GPU.
        cache: of all layers.
        layer: the one.
    """

    qkv: Tensor
    angles: Angles
    batch: Batch
    cache: Cache
    layer: int

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.qkv)

    @property
    def heads(self) -> int:
        """H."""
        return self.qkv.shape[1] // self.cache.shape.head_dim - 2 * self.cache.shape.n_kv_heads

    @property
    def tile(self) -> int:
        """Query heads of a block: of a short context keys are few, and so would blocks be."""
        shared_by = self.heads // self.cache.shape.n_kv_heads
        return 1 if self.entries <= ALONE else min(shared_by, SHARED_HEADS)

    @property
    def entries(self) -> int:
        """Of the table, at most so many of which are seen."""
        return self.batch.table.shape[1]

    def args(self) -> structures.Attention:
        """For any of the kernels."""
        cache, batch = self.cache, self.batch
        scales = (None, None) if cache.scales is None else cache.scales[:, self.layer]
        held = (cache.keys[self.layer], cache.values[self.layer], *scales)
        given = (self.qkv, *self.angles, batch.row, batch.slot, batch.seen, batch.table)
        return structures.Attention(
            *map(pointer, (*given, *held)),
            slots=cache.keys.shape[2],
            table_stride=batch.table.stride(0),
            heads=self.heads,
            kv_heads=cache.shape.n_kv_heads,
            is_stored=self.tokens > 1,
        )


class Attention:
    """The kernels on one GPU."""

    def __init__(self, steps: Steps, device: torch.device, processors: int) -> None:
        self._steps = steps
        self._processors = processors
        self._tickets = torch.zeros(TICKETS, dtype=torch.int32, device=device)

    def turned(self, asked: Asked) -> Tensor:
        """Store keys and values; the queries (T, H, E), turned, as bfloat16."""
        args = asked.args()
        self._store(asked, args, PREPARING)
        size = (asked.tokens, asked.heads, asked.cache.shape.head_dim)
        q = asked.qkv.new_empty(size, dtype=torch.bfloat16)
        args.partial = q.data_ptr()
        blocks = -(-q[0].numel() // (8 * PREPARING))
        self._kernel(asked, "turn")((blocks, asked.tokens), PREPARING, args)
        return q

    def attend(self, asked: Asked, out: structures.Acts) -> None:
        """Store, attend, and bring what it gives to 8 bits."""
        tokens, heads = asked.tokens, asked.heads
        shape = asked.cache.shape
        blocks = shape.n_kv_heads * -(-(heads // shape.n_kv_heads) // asked.tile)
        splits = self._splits(blocks * tokens, asked.entries)
        args = asked.args()
        is_whole = shape.head_dim % BLOCK == 0 and blocks * tokens <= TICKETS
        args.tickets = self._tickets.data_ptr() if is_whole else None
        if tokens > 1:  # which see each other
            self._store(asked, args, 32)
        n_parts = tokens * heads * splits
        partial, weights = (asked.qkv.new_empty(n_parts * n) for n in (shape.head_dim, 2))
        args.partial, args.weights = partial.data_ptr(), weights.data_ptr()
        args.out, args.splits = out, splits
        self._kernel(asked, "attend")((blocks, splits, tokens), THREADS, args)
        if not is_whole:
            self._kernel(asked, "combine")(
                (-(-out.blocks // (COMBINING // 32)), tokens), COMBINING, args
            )

    def _store(self, asked: Asked, args: structures.Attention, threads: int) -> None:
        blocks = -(-asked.cache.shape.n_kv_heads // (threads // 32))  # a warp for each head
        self._kernel(asked, "store")((blocks, asked.tokens), threads, args)

    def _kernel(self, asked: Asked, name: str) -> Launch:
        cache = asked.cache
        return self._steps.kernel(
            "attention.cu",
            name,
            HEAD_DIM=cache.shape.head_dim,
            HEADS=asked.tile,
            CACHE=CACHES[cache.keys.dtype],
        )

    def _splits(self, blocks: int, entries: int) -> int:
        """Parts of the context: no more blocks than processors, which all begin at once."""
        if entries <= WHOLE:
            return 1
        return max(1, min(self._processors // blocks, entries // LEAST_SPLIT, MOST_SPLITS))


def pointer(tensor: Tensor | None) -> int | None:
    """Where it is on the GPU."""
    return None if tensor is None else tensor.data_ptr()
