"""Weights as they stream by, packed as soon as all that is multiplied as one is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.errors import DamagedFileError
from llamachat.kernels import Kernels, Weight
from llamachat.quant.tensor import QTensor

T = TypeVar("T")

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BIASED = {"qkv": "qkv_bias", "o": "o_bias"}  # what says so in a config, of Llama


class Packer:
    """Collects the parts of each fused weight and packs it when the last one is there.

    Args:
        config: how many layers there are, and what has a bias.
        kernels: what packs.
        fused: which weights of a block are multiplied as one, in the order of their rows.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels, fused: Mapping[str, Sequence[str]]
    ) -> None:
        self._config = config
        self._kernels = kernels
        self._waiting: dict[str, Tensor | QTensor] = {}
        self._packed: dict[str, Weight] = {}
        self._vectors: dict[str, Tensor] = {}
        self._weight_of = {
            name: (f"{layer}.{key}", names)
            for layer in range(config.n_layers)
            for key, parts in fused.items()
            for names in [self._names(layer, key, parts)]
            for name in names
        }

    @property
    def embedding(self) -> Weight:
        """The table that ids are looked up in."""
        return self._found(self._packed, _EMBEDDING)

    @property
    def head(self) -> Weight:
        """What makes logits; it may be the table."""
        return self._found(self._packed, _EMBEDDING if self._config.tied else _HEAD)

    def weight(self, layer: int, key: str) -> Weight:
        """A fused weight of a layer.

        Raises:
            DamagedFileError: a part of it is missing.
        """
        return self._found(self._packed, f"{layer}.{key}")

    def vector(self, name: str) -> Tensor:
        """(D,) float32, a weight or a bias of a norm.

        Raises:
            DamagedFileError: it is missing.
        """
        return self._found(self._vectors, name)

    def take(self, name: str, tensor: Tensor | QTensor) -> None:
        """A weight by its Hugging Face name; one that no block has is left out."""
        if name in (_EMBEDDING, _HEAD):
            self._packed[name] = self._kernels.pack([tensor], lookup=name == _EMBEDDING)
        elif name.endswith(("norm.weight", "norm.bias")) and isinstance(tensor, Tensor):
            self._vectors[name] = tensor.to(self._kernels.device, torch.float32)
        elif name in self._weight_of:
            self._waiting[name] = tensor
            self._pack_if_complete(name)

    def _pack_if_complete(self, name: str) -> None:
        key, names = self._weight_of[name]
        if all(n in self._waiting for n in names):
            found = {n: self._waiting.pop(n) for n in names}
            biases = [b for n, b in found.items() if n.endswith("bias") and isinstance(b, Tensor)]
            self._packed[key] = self._kernels.pack(
                [weight for n, weight in found.items() if n.endswith("weight")],
                bias=torch.cat(biases) if biases else None,
                gated=key.endswith("gate_up"),
            )

    def _names(self, layer: int, key: str, parts: Sequence[str]) -> list[str]:
        """Of all that is packed as one: weights in the order of their rows, then their biases."""
        is_biased = self._config.prefix is not None or (
            key in _BIASED and getattr(self._config, _BIASED[key])
        )
        kinds = ("weight", "bias") if is_biased else ("weight",)
        return [f"model.layers.{layer}.{part}.{kind}" for kind in kinds for part in parts]

    def _found(self, table: Mapping[str, T], name: str) -> T:
        if name not in table:
            missing = [n for n, (key, _) in self._weight_of.items() if key == name] or [name]
            missing = [n for n in missing if n not in self._waiting] or missing
            raise DamagedFileError(f"{missing[0]} is missing")
        return table[name]
