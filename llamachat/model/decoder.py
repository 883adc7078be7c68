"""The Llama decoder, written once: pre-norm blocks of attention and SwiGLU over any backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.errors import DamagedFileError
from llamachat.kernels import Batch, Cache, CacheShape, Kernels, Norm, Weight
from llamachat.model.rope import inverse_frequencies, query_scale
from llamachat.quant.tensor import QTensor

T = TypeVar("T")

# Which weights of a block are multiplied as one, and in which order their rows are stacked.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's weights, as the backend packed them."""

    attention_norm: Norm
    qkv: Weight
    o: Weight
    ffn_norm: Norm
    gate_up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class Decoder:
    """Tokens in, logits out; keys and values go to the cache that is passed in."""

    config: ModelConfig
    kernels: Kernels
    embedding: Weight
    blocks: tuple[Block, ...]
    norm: Norm
    head: Weight
    frequencies: Tensor  # (head_dim / 2,)

    def new_cache(self, slots: int, form: str = "auto") -> Cache:
        """A cache for `slots` tokens."""
        config = self.config
        shape = CacheShape(config.n_layers, config.n_kv_heads, config.head_dim)
        return self.kernels.cache(shape, slots, form)

    def bytes_per_token(self, cache: Cache, depth: int) -> int:
        """What one step of decoding reads: every weight once and `depth` tokens of the cache.

        Of an embedding table that is not the head, too, it is one row.
        """
        n_bytes = self.kernels.n_bytes
        norms = [self.norm, *(n for b in self.blocks for n in (b.attention_norm, b.ffn_norm))]
        weights = [w for b in self.blocks for w in (b.qkv, b.o, b.gate_up, b.down)]
        row = 0 if self.config.tied else n_bytes(self.embedding) // self.config.vocab_size
        return (
            sum(norm.weight.nbytes for norm in norms)
            + sum(n_bytes(weight) for weight in (*weights, self.head))
            + row
            + depth * self.kernels.slot_bytes(cache)
        )

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Logits (L, V) float32 of the tokens that `batch` wants."""
        kernels = self.kernels
        angles = kernels.angles(batch.position, self.frequencies)
        h = kernels.embed(batch, self.embedding)  # (T, D)
        for layer, block in enumerate(self.blocks):
            qkv = kernels.norm_linear(h, block.attention_norm, block.qkv)
            mixed = kernels.attention(qkv, angles, batch, cache, layer)
            kernels.linear_add(mixed, block.o, h)
            gated = kernels.norm_swiglu(h, block.ffn_norm, block.gate_up)
            kernels.linear_add(gated, block.down, h)
        return kernels.logits(h, self.norm, self.head, batch.wanted)

    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """One pass through the backend: logits (L, V) float32."""
        return self.kernels.run(lambda static: self.forward(static, cache), batch, cache)


def load_decoder(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor | QTensor]], kernels: Kernels
) -> Decoder:
    """Pack weights as they stream by, under their Hugging Face names; each is dropped once packed.

    Raises:
        DamagedFileError: a weight is missing.
    """
    loader = _Loader(config, kernels)
    for name, tensor in tensors:
        loader.take(name, tensor)
    return loader.decoder()


class _Loader:
    """Collects the parts of each fused weight and packs it when the last one is there."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self.config = config
        self.kernels = kernels
        self.waiting: dict[str, Tensor | QTensor] = {}
        self.packed: dict[str, Weight] = {}
        self.norms: dict[str, Norm] = {}
        self.divisors: Tensor | None = None
        self.query_scale = query_scale(config)
        self.weight_of = {
            name: (f"{layer}.{fused}", names)
            for layer in range(config.n_layers)
            for fused in FUSED
            for names in [_names(config, layer, fused)]
            for name in names
        }

    def take(self, name: str, tensor: Tensor | QTensor) -> None:
        if name == "rope_freqs" and isinstance(tensor, Tensor):
            self.divisors = tensor
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            self.packed[name] = self.kernels.pack([tensor], lookup=name.startswith("model"))
        elif name.endswith("norm.weight") and isinstance(tensor, Tensor):
            self.norms[name] = Norm(
                tensor.to(self.kernels.device, torch.float32), self.config.norm_eps
            )
        elif name in self.weight_of:
            self.waiting[name] = self._scaled(tensor) if "q_proj" in name else tensor
            self._pack_if_complete(name)

    def decoder(self) -> Decoder:
        config = self.config
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        return Decoder(
            config,
            self.kernels,
            embedding=self._found(self.packed, "model.embed_tokens.weight"),
            blocks=tuple(self._block(layer) for layer in range(config.n_layers)),
            norm=self._found(self.norms, "model.norm.weight"),
            head=self._found(self.packed, head),
            frequencies=inverse_frequencies(config, self.divisors).to(self.kernels.device),
        )

    def _scaled(self, queries: Tensor | QTensor) -> Tensor | QTensor:
        if self.query_scale == 1:
            return queries
        return queries * self.query_scale

    def _pack_if_complete(self, name: str) -> None:
        key, names = self.weight_of[name]
        if all(n in self.waiting for n in names):
            found = {n: self.waiting.pop(n) for n in names}
            biases = [b for n, b in found.items() if n.endswith("bias") and isinstance(b, Tensor)]
            self.packed[key] = self.kernels.pack(
                [weight for n, weight in found.items() if n.endswith("weight")],
                bias=torch.cat(biases) if biases else None,
                gated=key.endswith("gate_up"),
            )

    def _block(self, layer: int) -> Block:
        norms = {
            field: self._found(self.norms, f"model.layers.{layer}.{name}.weight")
            for field, name in NORMS.items()
        }
        weights = {fused: self._found(self.packed, f"{layer}.{fused}") for fused in FUSED}
        return Block(**norms, **weights)

    def _found(self, table: dict[str, T], name: str) -> T:
        if name not in table:
            missing = [n for n, (key, _) in self.weight_of.items() if key == name] or [name]
            missing = [n for n in missing if n not in self.waiting] or missing
            raise DamagedFileError(f"{missing[0]} is missing")
        return table[name]


def _names(config: ModelConfig, layer: int, fused: str) -> list[str]:
    """Of all that is packed as one: weights in the order of their rows, then their biases."""
    is_biased = {"qkv": config.qkv_bias, "o": config.o_bias}.get(fused, False)
    kinds = ("weight", "bias") if is_biased else ("weight",)
    return [f"model.layers.{layer}.{part}.{kind}" for kind in kinds for part in FUSED[fused]]
