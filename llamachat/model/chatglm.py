"""ChatGLM-6B: a prefix-LM with LayerNorm, GELU, biases everywhere and rope in two dimensions.

It is a block of its own over the backend's `linear`; attention is the reference's, whatever
multiplies. Source: THUDM/chatglm-6b, modeling_chatglm.py (Du et al. 2022, arXiv 2103.10360).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.kernels import Angles, Batch, CacheShape, Kernels, Weight
from llamachat.kernels.reference import Cache, Reference
from llamachat.model import Places
from llamachat.model.packing import Packer
from llamachat.quant.tensor import QTensor

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Weight and bias (D,) float32, and the epsilon inside the root."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, h: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return F.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps)

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's weights, as the backend packed them."""

    attention_norm: LayerNorm
    qkv: Weight
    o: Weight
    ffn_norm: LayerNorm
    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class ChatGLM:
    """Tokens in, logits out. All of a prompt up to "sop" is seen by all of it.

    Attributes:
        frequencies: (head_dim / 4,), of each half of a head.
        attention: rotates, stores and attends.
    """

    config: ModelConfig
    kernels: Kernels
    embedding: Weight
    blocks: tuple[Block, ...]
    norm: LayerNorm
    head: Weight
    frequencies: Tensor
    attention: Reference

    def new_cache(self, slots: int, form: str = "auto") -> Cache:
        """A cache for `slots` tokens."""
        config = self.config
        shape = CacheShape(config.n_layers, config.n_kv_heads, config.head_dim)
        return self.attention.cache(shape, slots, form)

    def bytes_per_token(self, cache: Cache, depth: int) -> int:
        """See `LanguageModel.bytes_per_token`; of a table that is not the head it is one row."""
        n_bytes = self.kernels.n_bytes
        norms = [self.norm, *(n for b in self.blocks for n in (b.attention_norm, b.ffn_norm))]
        weights = [w for b in self.blocks for w in (b.qkv, b.o, b.up, b.down)]
        row = 0 if self.config.tied else n_bytes(self.embedding) // self.config.vocab_size
        return (
            sum(norm.nbytes for norm in norms)
            + sum(map(n_bytes, (*weights, self.head)))
            + row
            + depth * self.attention.slot_bytes(cache)
        )

    def unbroken(self, ids: Sequence[int]) -> int:
        """The prefix, and "sop": each of its tokens depends on all of them."""
        length = self._prefix_length(ids)
        return length + 1 if length else 0

    def places(self, ids: Callable[[], Sequence[int]], at: Sequence[int]) -> Places:
        """Two positions: in the prefix, where what follows all has that of the gap, and in that.

        Ids without a "sop" are read as if it stood before them: what follows an empty prefix.
        """
        whole = ids()
        length = self._prefix_length(whole)
        prefix = self.config.prefix
        assert prefix is not None
        before = list(whole[:length])
        gaps = (before.index(gap) for gap in prefix.gaps if gap in before)
        gap = next(gaps, max(length - 1, 0))
        return Places(
            seen=[max(place + 1, length) for place in at],
            positions=[
                [place if place < length else gap for place in at],
                [max(0, place + 1 - length) for place in at],
            ],
        )

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Logits (L, V) float32 of the tokens that `batch` wants."""
        kernels, alpha = self.kernels, math.sqrt(2 * self.config.n_layers)
        angles = self._angles(batch.position)
        h = kernels.run(lambda batch: kernels.embed(batch, self.embedding), batch)  # (T, D)
        for layer, block in enumerate(self.blocks):
            x = block.attention_norm(h)
            qkv = kernels.linear(x, block.qkv)
            mixed = self.attention.attention(qkv, angles, batch, cache, layer)
            h = alpha * x + kernels.linear(mixed, block.o)
            x = block.ffn_norm(h)
            wide = F.gelu(kernels.linear(x, block.up), approximate="tanh")  # (T, F)
            h = alpha * x + kernels.linear(wide, block.down)
        return kernels.linear(self.norm(h[batch.wanted]), self.head).float()

    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """One pass: logits (L, V) float32."""
        return self.attention.run(lambda batch: self.forward(batch, cache), batch, cache)

    def _angles(self, position: Tensor) -> Angles:
        """(T, 2) -> (T, E / 2) each: the first half of a head, then the second."""
        angle = (position.unsqueeze(-1) * self.frequencies).flatten(1)
        return angle.cos(), angle.sin()

    def _prefix_length(self, ids: Sequence[int]) -> int:
        """How many ids stand before "sop"."""
        prefix = self.config.prefix
        assert prefix is not None
        return ids.index(prefix.end) if prefix.end in ids else 0


def load_chatglm(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor | QTensor]], kernels: Kernels
) -> ChatGLM:
    """Pack weights as they stream by; see `load_decoder`.

    Raises:
        DamagedFileError: a weight is missing.
    """
    packer = Packer(config, kernels, FUSED)
    for name, tensor in tensors:
        packer.take(name, tensor)

    def norm(name: str) -> LayerNorm:
        weight, bias = (packer.vector(f"{name}.{kind}") for kind in ("weight", "bias"))
        return LayerNorm(weight, bias, config.norm_eps)

    def block(layer: int) -> Block:
        name = f"model.layers.{layer}"
        return Block(
            attention_norm=norm(f"{name}.input_layernorm"),
            ffn_norm=norm(f"{name}.post_attention_layernorm"),
            **{fused: packer.weight(layer, fused) for fused in FUSED},
        )

    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    return ChatGLM(
        config,
        kernels,
        embedding=packer.embedding,
        blocks=tuple(map(block, range(config.n_layers))),
        norm=norm("model.norm"),
        head=packer.head,
        frequencies=frequencies.half().float().to(kernels.device),  # rounded where it was trained
        attention=Reference(kernels.device),
    )
