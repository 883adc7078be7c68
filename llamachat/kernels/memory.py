"""Memory for weights and keys: in huge pages where the system gives them, which read faster."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

CHUNK = 64 << 20  # what is asked of the system at a time, at least
PAGE = 2 << 20
ALIGNED = 64  # a cache line


def huge(n_bytes: int) -> Tensor:
    """(n_bytes,) uint8 of zeros that the system backs with huge pages if it can."""
    if n_bytes == 0 or sys.platform == "win32":
        return torch.zeros(n_bytes, dtype=torch.uint8)
    n_bytes_mapped = -(-n_bytes // PAGE) * PAGE
    memory = mmap.mmap(-1, n_bytes_mapped, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:n_bytes]


class Arena:
    """Gives out pieces of large chunks; a chunk lives as long as one of its pieces."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, n_bytes: int) -> Tensor:
        """(n_bytes,) uint8, aligned to a cache line."""
        aligned = -(-n_bytes // ALIGNED) * ALIGNED
        if aligned > len(self._rest):
            self._rest = huge(max(aligned, CHUNK))
        piece, self._rest = self._rest[:n_bytes], self._rest[aligned:]
        return piece
