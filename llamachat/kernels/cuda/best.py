"""The largest logits: torch's own takes ten microseconds and more (docs/kernels.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.step import Source

THREADS = 256
EACH, MOST_BLOCKS = 16, 32  # numbers of a thread; blocks that share a row


class Best:
    """On one GPU, in passes' order."""

    def __init__(self, compiler: Source, device: torch.device) -> None:
        self._compiler = compiler
        # by row: what was found, and how many blocks are done; zeros between two calls
        self._found = torch.zeros((2, 1), dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """The ids (B,) of the largest of logits (B, V), of equal ones the lowest."""
        rows, width = logits.shape
        logits = logits.float().contiguous()
        if rows > self._found.shape[1]:
            self._found = self._found.new_zeros((2, rows))
        found, tickets = self._found
        ids = logits.new_empty(rows, dtype=torch.int64)
        args = structures.Best(
            logits=logits.data_ptr(),
            found=found.data_ptr(),
            tickets=tickets.data_ptr(),
            ids=ids.data_ptr(),
            width=width,
        )
        blocks = min(-(-width // (THREADS * EACH)), MOST_BLOCKS)
        kernel = self._compiler.kernel("stream.cu", "best", WEIGHTS=0)
        kernel((blocks, rows), THREADS, args)
        return ids
