"""The part of a model that one of several processes runs: its shape, and its cut of each weight.

A part is a model of its own, of fewer heads and a smaller hidden dimension, whose head has some of
the rows (`kernels.sharded`). The table of embeddings is whole everywhere: to look up costs no sum
then, and of large models it is a hundredth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.quant.form import BITSANDBYTES, Form
from llamachat.quant.tensor import QTensor

Stored = Tensor | QTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BY_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """One of `size` parts of a model."""

    config: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        assert self.config.undivided(self.size) is None

    @property
    def own(self) -> ModelConfig:
        """The part's shape; its vocabulary is the model's."""
        config = self.config
        return replace(
            config,
            n_heads=config.n_heads // self.size,
            n_kv_heads=max(1, config.n_kv_heads // self.size),
            hidden_dim=config.hidden_dim // self.size,
            tied=False,
        )

    @property
    def head_rows(self) -> range:
        """Rows of the head."""
        return self._share(self.config.vocab_size)

    def cut(self, name: str, weight: Stored) -> Iterator[tuple[str, Stored]]:
        """What the part has of a weight, by its Hugging Face name."""
        if name == EMBEDDING:
            yield name, weight
            if self.config.tied:
                yield HEAD, _rows(weight, self.head_rows)
        elif name == HEAD:
            yield name, _rows(weight, self.head_rows)
        elif name.endswith("o_proj.bias"):
            yield name, weight if self.rank == 0 else weight * 0  # it is added once
        elif name.endswith(tuple(f"{it}.weight" for it in _BY_COLUMNS)):
            yield name, _columns(weight, self._share(weight.shape[1]))
        elif "_proj." in name:
            yield name, _rows(weight, self._rows_of(name, weight.shape[0]))
        else:
            yield name, weight

    def cuts_between_groups(self, name: str, columns: int, form: Form) -> bool:
        """Whether quantizing the part gives the codes that the whole has."""
        if form.name in BITSANDBYTES:
            return False
        return not any(it in name for it in _BY_COLUMNS) or (
            columns // self.size % form.group_size == 0
        )

    def _rows_of(self, name: str, rows: int) -> range:
        kv_heads = self.config.n_kv_heads
        if not any(it in name for it in ("k_proj", "v_proj")) or kv_heads % self.size == 0:
            return self._share(rows)
        head, width = self.rank * kv_heads // self.size, rows // kv_heads  # several have this one
        return range(head * width, (head + 1) * width)

    def _share(self, n: int) -> range:
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def _rows(weight: Stored, rows: range) -> Stored:
    if isinstance(weight, Tensor):
        return weight[rows.start : rows.stop].clone()  # the whole is let go
    return weight.rows(torch.arange(rows.start, rows.stop, device=weight.codes.device))


def _columns(weight: Stored, columns: range) -> Stored:
    if isinstance(weight, Tensor):
        return weight[:, columns.start : columns.stop].contiguous()
    return weight.columns(columns.start, columns.stop)
