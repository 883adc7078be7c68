"""Loading holds one weight at a time beside what is packed already."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llamachat
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.checkpoints.stored import Place

FUSED_BYTES = 2 * 96 * 64 * 4  # gate and up, which are packed as one
TABLE_BYTES = 272 * 64 * 4
NORMS_BYTES = 17 * 64 * 4  # which are kept as they are


class Live:
    """Bytes of the tensors that were read and are not dropped yet."""

    def __init__(self) -> None:
        self.now = self.peak = self.total = 0

    def watch(self, tensor: Any) -> None:
        if self.now + tensor.nbytes > self.peak:
            gc.collect()  # what only a cycle holds is no longer held
        self.now += tensor.nbytes
        self.total += tensor.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, tensor.nbytes)

    def _drop(self, n_bytes: int) -> None:
        self.now -= n_bytes


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Counts every tensor that a folder gives."""
    live, tensors = Live(), FolderCheckpoint.tensors

    def watched(self: FolderCheckpoint, place: Place) -> Iterator[tuple[str, Any]]:
        for name, tensor in tensors(self, place):
            live.watch(tensor)
            yield name, tensor
            del tensor

    monkeypatch.setattr(FolderCheckpoint, "tensors", watched)
    return live


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "none", "dtype": "bfloat16"},
        {"quantize": "none", "dtype": "float32"},
        {"quantize": "none", "dtype": "bfloat16", "backend": "reference"},
        {"quantize": "int8"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_a_weight_is_dropped_before_the_next_is_read(
    tiny_llama: Callable[..., Path], live: Live, options: dict[str, Any]
) -> None:
    model = llamachat.load(tiny_llama(num_hidden_layers=8), threads=1, **options)
    assert live.total == model.config.n_params * 4
    assert live.peak <= max(FUSED_BYTES, TABLE_BYTES) + NORMS_BYTES
