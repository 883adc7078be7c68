"""The Llama decoder, written once: pre-norm blocks of attention and SwiGLU over any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.kernels import Batch, Cache, CacheShape, Kernels, Norm, Weight
from llamachat.model import Places
from llamachat.model.packing import Packer
from llamachat.model.rope import inverse_frequencies, query_scale
from llamachat.quant.tensor import QTensor

# Which weights of a block are multiplied as one, and in which order their rows are stacked.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


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

    def unbroken(self, ids: Sequence[int]) -> int:
        """See `LanguageModel.unbroken`."""
        return 0

    def places(self, ids: Callable[[], Sequence[int]], at: Sequence[int]) -> Places:
        """See `LanguageModel.places`."""
        return Places([place + 1 for place in at], [at])

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
    packer = Packer(config, kernels, FUSED)
    scale = query_scale(config)
    divisors = None
    for name, tensor in tensors:
        if name == "rope_freqs" and isinstance(tensor, Tensor):
            divisors = tensor
        else:
            packer.take(name, tensor * scale if scale != 1 and "q_proj" in name else tensor)

    def norm(name: str) -> Norm:
        return Norm(packer.vector(f"{name}.weight"), config.norm_eps)

    def block(layer: int) -> Block:
        name = f"model.layers.{layer}"
        return Block(
            attention_norm=norm(f"{name}.input_layernorm"),
            ffn_norm=norm(f"{name}.post_attention_layernorm"),
            **{fused: packer.weight(layer, fused) for fused in FUSED},
        )

    return Decoder(
        config,
        kernels,
        embedding=packer.embedding,
        blocks=tuple(map(block, range(config.n_layers))),
        norm=norm("model.norm"),
        head=packer.head,
        frequencies=inverse_frequencies(config, divisors).to(kernels.device),
    )
