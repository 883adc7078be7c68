"""Models that were published as differences from a base: Alpaca, Vicuna v0 and v1.1.

Every weight is base + delta, in the delta's type. A base with fewer ids is given rows first, as
the publisher did: their mean (stanford_alpaca, weight_diff.py) or zeros (FastChat, apply_delta.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llamachat.architecture import ModelConfig
from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.names import check_shapes, iter_weights, located
from llamachat.checkpoints.overlay import EMBEDDING, HEAD, Overlay, as_floats
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.checkpoints.stored import FLOATS, Place, as_read
from llamachat.errors import CheckFailedError, DamagedFileError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

NewRows = Literal["mean", "zero"]
_TOLERANCE = 0.05  # of a published sum: the publisher added in float32


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a publisher says of a delta.

    Attributes:
        new_rows: what a base's new rows hold before the delta is added.
        total: the sum of all recovered values, if it is published.
    """

    new_rows: NewRows
    total: float | None = None


_KNOWN = {
    "alpaca-7b-wdiff": Recovery("mean", 50637.1836),
    "vicuna-7b-delta": Recovery("zero"),
    "vicuna-13b-delta": Recovery("zero"),
}


class DeltaCheckpoint(Overlay):
    """A base with a delta added to all its weights."""

    def __init__(self, base: Checkpoint, folder: Path, new_rows: NewRows | None = None) -> None:
        """Open a delta.

        Args:
            base: what it is added to.
            folder: a Hugging Face folder whose weights are differences.
            new_rows: what rows that the base has not hold; default what is known of the delta.
        """
        super().__init__(base, folder)
        self._delta = FolderCheckpoint(folder)
        self._new_rows = new_rows

    @property
    def changed(self) -> frozenset[str]:
        """All weights."""
        return frozenset(it.hf for it in iter_weights(self.config))

    @property
    def form(self) -> str:
        """The delta's."""
        return self._delta.form

    @cached_property
    def config(self) -> ModelConfig:
        """The base's, with the delta's vocabulary; every other shape is the same in both."""
        base, delta = self.base.config, self._delta.config
        with located(self.folder, hint="the delta is for another base"):
            if self.form not in FLOATS:
                raise DamagedFileError(f"weights are {self.form}, expected {', '.join(FLOATS)}")
            if delta.vocab_size < base.vocab_size:
                raise DamagedFileError(
                    f"{EMBEDDING}: {delta.vocab_size} rows, {self.base.path} has {base.vocab_size}"
                )
            config = replace(base, vocab_size=delta.vocab_size)
            check_shapes(
                {it.hf: it.shape for it in iter_weights(delta)},
                ((it.hf, it.shape) for it in iter_weights(config)),
            )
        return config

    def tensors(self, place: Place = as_read) -> Iterator[tuple[str, Tensor]]:
        """Every weight in the delta's type, on the host.

        Raises:
            UsageError: rows are added, and nothing says what they hold.
            CheckFailedError: at the end, the sum of all is not the one that was published.
        """
        config, total = self.config, 0.0
        weights = (it for it in self.base.tensors() if it[0] != "rope_freqs")
        for (name, base), (same, delta) in zip(weights, self._delta.tensors(), strict=True):
            import torch

            assert name == same
            assert isinstance(delta, torch.Tensor)
            rows = as_floats(base).to(delta.dtype)
            if name in (EMBEDDING, HEAD) and config.vocab_size > len(rows):
                rows = self._grown(rows, config.vocab_size)
            recovered = rows + delta
            total += float(recovered.sum(dtype=torch.float64))
            yield name, recovered
        self._check(total)

    @property
    def _known(self) -> Recovery | None:
        where = str(self.folder.absolute()).lower()
        return next((it for name, it in _KNOWN.items() if name in where), None)

    def _grown(self, rows: Tensor, n_rows: int) -> Tensor:
        """(V, D) with rows appended: (n_rows, D)."""
        import torch

        fill = self._new_rows or (self._known.new_rows if self._known else None)
        if fill is None:
            raise UsageError(
                f"{self.folder} has {n_rows} ids, {self.base.path} {len(rows)}",
                hint="--new-rows mean (as Alpaca) or zero (as Vicuna) says what is added to",
            )
        row = rows.float().mean(0) if fill == "mean" else torch.zeros(rows.shape[1])
        return torch.cat((rows, row.to(rows.dtype).expand(n_rows - len(rows), -1)))

    def _check(self, total: float) -> None:
        """Of the weights, or with the tables of rope, which state dicts of 2023 had as well."""
        config = self.base.config
        if self._known is None or self._known.total is None:
            return
        exponents = (2 * i / config.head_dim for i in range(config.head_dim // 2))
        tables = config.n_layers * sum(config.rope_theta**-exponent for exponent in exponents)
        expected = self._known.total
        if not min(abs(total - expected), abs(total + tables - expected)) <= _TOLERANCE:
            raise CheckFailedError(
                f"{self.folder}: the recovered weights sum to {total:.4f}, published is {expected}",
                hint=f"is {self.base.path} the model that the delta was made from?",
            )
