"""A pass over new tokens as the decoder takes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamachat.kernels import Batch
from llamachat.model import Places


def batch_of(
    ids: Sequence[int] | Tensor,
    rows: Sequence[int],
    slots: Sequence[int],
    places: Places,
    table: Tensor,
    wanted: Tensor,
) -> Batch:
    """Tokens with the row, the slot and the place of each; `wanted` (L,) int32 are their indices.

    `table` (B, C) int32 is not copied, nor are ids that are on the device still.
    """
    known = [0] * len(rows) if isinstance(ids, Tensor) else ids
    lists = [known, rows, slots, places.seen, *places.positions]
    whole = torch.tensor(lists, dtype=torch.int32)  # one for all
    id_, row, slot, seen, *position = whole.unbind()
    return Batch(
        ids=ids if isinstance(ids, Tensor) else id_,
        row=row,
        slot=slot,
        seen=seen,
        position=position[0] if len(position) == 1 else torch.stack(position, dim=-1),
        table=table,
        wanted=wanted,
    )
