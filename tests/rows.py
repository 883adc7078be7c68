"""Passes of a decoder over the rows of one slot table, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamachat.engine.rows import SlotTable
from llamachat.kernels import Batch
from llamachat.model.decoder import Decoder


class Rows:
    """Passes over several rows of one slot table."""

    def __init__(
        self, decoder: Decoder, width: int = 1, *, capacity: int = 64, form: str = "auto"
    ) -> None:
        self.decoder, self.slots = decoder, SlotTable(capacity, width)
        self.cache = decoder.new_cache(capacity, form)

    def run(self, tokens: Sequence[tuple[int, int]]) -> Tensor:
        """(row, id) pairs, in any order of rows: logits (T, V) of all."""
        rows, ids = zip(*tokens, strict=True)
        positions, new = self.slots.reserve(rows)
        position = torch.tensor(positions, dtype=torch.int32)
        batch = Batch(
            *(torch.tensor(x, dtype=torch.int32) for x in (ids, rows, new)),
            position + 1, position, self.slots.table, torch.arange(len(tokens), dtype=torch.int32),
        )  # fmt: skip
        logits = self.decoder(batch, self.cache)
        self.slots.append(rows, ids)
        return logits

    def run_text(self, ids: Sequence[int], chunk: int = 64) -> Tensor:
        """Ids of row 0, so many a pass: logits (T, V)."""
        parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
        return torch.cat([self.run([(0, token) for token in part]) for part in parts])


def alone(decoder: Decoder, ids: Sequence[int], form: str = "auto") -> Tensor:
    """Logits (V,) of the last of `ids`, run in one row and one pass."""
    return Rows(decoder, form=form).run([(0, token) for token in ids])[-1]
