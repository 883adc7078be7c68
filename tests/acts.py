"""What backends pass from one call to the next, as floats."""

from __future__ import annotations

import torch
from torch import Tensor


def values_of(act: object) -> Tensor:
    """What an act stands for, before it was brought to 8 bits."""
    if isinstance(act, Tensor):
        return act
    struct, memory, tokens = act.struct, act.memory, act.tokens  # type: ignore[attr-defined]  # Coded
    n = tokens * struct.blocks
    floats = memory[32 * n : 160 * n].view(torch.float32).view(tokens, -1)
    return floats[:, : struct.dim].clone()
