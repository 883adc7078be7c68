"""Tensors of files that hold one weight each or several, and which of their rows are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import Shape, WeightName, half_split_rows, iter_weights

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

Rows = npt.NDArray[np.intp]
RowsOf = Callable[[Sequence[WeightName]], Iterator[Rows]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a form of files stores the weights of a Llama.

    Attributes:
        stored_name: the tensor that holds the weight of a Hugging Face name.
        rows_of: for each of the weights that a tensor holds its rows there, those that rope turns
            in the half-split order; None where each weight is a tensor, in that order.
    """

    stored_name: Callable[[str], str]
    rows_of: RowsOf | None


HUGGING_FACE = Layout(stored_name=str, rows_of=None)


@dataclass(frozen=True, slots=True)
class Joined:
    """One tensor of a file and the weights that it holds, as `Layout.rows_of` tells them apart."""

    name: str
    weights: tuple[WeightName, ...]
    rows_of: RowsOf | None

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return (sum(weight.shape[0] for weight in self.weights), *self.weights[0].shape[1:])

    def split(self, tensor: Tensor | QTensor) -> Iterator[tuple[str, Tensor | QTensor]]:
        """The weights by their Hugging Face names; what rope turns is brought to half-split."""
        import torch

        first, *others = self.weights
        if self.rows_of is None or (not others and first.heads is None):
            yield first.hf, tensor
            return
        for weight, numbers in zip(self.weights, self.rows_of(self.weights), strict=True):
            rows = torch.from_numpy(numbers)
            yield weight.hf, tensor[rows] if isinstance(tensor, torch.Tensor) else tensor.rows(rows)


def iter_joined(config: ModelConfig, layout: Layout) -> Iterator[Joined]:
    """Every tensor that the config asks for, in the order of a forward pass; as lazy as weights."""
    for name, weights in groupby(iter_weights(config), lambda it: layout.stored_name(it.hf)):
        yield Joined(name, tuple(weights), layout.rows_of)


def rows_by_weight(weights: Sequence[WeightName]) -> Iterator[Rows]:
    """One weight below the other; the pairs that rope turns are neighbours (GGUF, ChatGLM2).

    The pairs that it leaves alone have frequency 0: which two dimensions make one does not
    matter, as long as it is the same in queries and keys.
    """
    first = 0
    for weight in weights:
        n_rows = weight.shape[0]
        heads = weight.heads
        yield first + (np.arange(n_rows) if heads is None else half_split_rows(n_rows, heads))
        first += n_rows
