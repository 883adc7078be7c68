"""What an engine drives: one decoder for all families of Llama, and ChatGLM-6B's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.kernels import Batch, Cache, Kernels, Weight


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a pass stand.

    Attributes:
        seen: how many entries of its row each token attends to.
        positions: what rope turns each by; several where it turns by several.
    """

    seen: Sequence[int]
    positions: Sequence[Sequence[int]]


class LanguageModel(Protocol):
    """Tokens in, logits out; keys and values go to the cache that is passed in."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def kernels(self) -> Kernels:
        """What multiplies."""
        ...

    @property
    def embedding(self) -> Weight:
        """The table that ids are looked up in."""
        ...

    def new_cache(self, slots: int, form: str = "auto") -> Cache:
        """A cache for `slots` tokens."""
        ...

    def bytes_per_token(self, cache: Cache, depth: int) -> int:
        """What one step of decoding reads: every weight once and `depth` tokens of the cache."""
        ...

    def unbroken(self, ids: Sequence[int]) -> int:
        """How many leading ids must be run in one pass, and can be reused only together."""
        ...

    def places(self, ids: Callable[[], Sequence[int]], at: Sequence[int]) -> Places:
        """Where the tokens of a pass stand.

        Args:
            ids: gives those of a row up to the end of the pass, which takes as long as they are
                many; rows side by side have one prompt.
            at: the index of each token in its row.
        """
        ...

    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """One pass: logits (L, V) float32 of the tokens that `batch` wants."""
        ...
