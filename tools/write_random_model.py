"""Write a GGUF file of a real shape with random weights: enough to measure speed with.

    python tools/write_random_model.py SHAPE FORM OUT.gguf [--head FORM]

    python tools/write_random_model.py llama-2-7b q4_0 llama-2-7b-q4_0.gguf

llamachat and llama.cpp both read it. What it says is noise; every logit is finite.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.blocks import read_blocks
from llamachat.checkpoints.gguf import LAYOUT
from llamachat.checkpoints.gguf_types import BLOCK_TYPES, BlockType
from llamachat.checkpoints.joined import iter_joined
from llamachat.quant.tensor import QTensor

Blocks = npt.NDArray[Any]


def shape(
    dim: int, hidden_dim: int, n_layers: int, heads: tuple[int, int], **other: Any
) -> ModelConfig:
    """A `ModelConfig`; heads are (n_heads, n_kv_heads)."""
    return ModelConfig(
        dim=dim, n_layers=n_layers, n_heads=heads[0], n_kv_heads=heads[1],
        head_dim=dim // heads[0], hidden_dim=hidden_dim, norm_eps=1e-5, tied=False,
        **{"rope_theta": 1e4, "vocab_size": 32_000, "max_seq_len": 4096} | other,
    )  # fmt: skip


# Columns are multiples of 256, the block of k-quants.
SHAPES = {
    "llama-2-7b": shape(4096, 11_008, 32, (32, 32)),
    "llama-3-8b": shape(
        4096, 14_336, 32, (32, 8), rope_theta=5e5, vocab_size=128_256, max_seq_len=8192
    ),
    "tinyllama-1.1b": shape(2048, 5632, 22, (32, 4), max_seq_len=2048),
    "llama-160m": shape(768, 3072, 12, (12, 12), max_seq_len=2048),
    "tiny": shape(256, 512, 2, (4, 2), vocab_size=1024),
}
TYPES = {kind.name.lower(): (number, kind) for number, kind in BLOCK_TYPES.items()}
# The minimum, in scales, that brings the mean of uniform codes to zero. The k-quants subtract it.
CENTRES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
N_BLOCKS = 100_003  # of random blocks, over and over; a prime, so that rows of a matrix differ
SEED = 1


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("form", choices=TYPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", choices=TYPES, help="form of token_embd and output")
    asked = parser.parse_args()
    config = SHAPES[asked.shape]
    writer = gguf.GGUFWriter(asked.out, "llama")
    add_metadata(writer, config, name=f"{asked.shape} {asked.form}, random")
    write_weights(writer, config, form=asked.form, head=asked.head or asked.form)


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, name: str) -> None:
    """The keys that describe the decoder and its tokenizer."""
    writer.add_name(name)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: three special tokens, the bytes, and words that nobody says."""
    kind = gguf.TokenType
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    n_words = size - 3 - len(bytes_)
    words = [f"▁w{number}" for number in range(n_words)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *words])
    writer.add_token_scores([0.0] * 259 + [float(-number) for number in range(n_words)])
    writer.add_token_types(
        [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * n_words
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_weights(writer: gguf.GGUFWriter, config: ModelConfig, *, form: str, head: str) -> None:
    """Every tensor, one in memory at a time: norms of ones, else values about N(0, 1 / columns)."""
    tensors = [
        (
            tensor,
            TYPES["f32" if len(tensor.shape) == 1 else head if _is_head(tensor.name) else form],
        )
        for tensor in iter_joined(config, LAYOUT)
    ]
    for tensor, (number, kind) in tensors:
        n_bytes = kind.n_bytes(int(np.prod(tensor.shape)))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype("f4"), n_bytes, gguf.GGMLQuantizationType(number)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(SEED)
    stocks: dict[tuple[str, int], Blocks] = {}
    for tensor, (_, kind) in tensors:
        if len(tensor.shape) == 1:
            writer.write_tensor_data(np.ones(tensor.shape, np.float32))
            continue
        rows, columns = tensor.shape
        key = (kind.name, columns)
        if key not in stocks:
            stocks[key] = random_blocks(kind, columns**-0.5, random)
        start = random.integers(N_BLOCKS)
        writer.write_tensor_data(
            np.resize(np.roll(stocks[key], -start), rows * columns // kind.values)
        )
    writer.close()


def random_blocks(kind: BlockType, deviation: float, random: np.random.Generator) -> Blocks:
    """(N_BLOCKS,) blocks of random values: the mean is near zero, `deviation` the standard one."""
    if not kind.is_quantized:
        values = random.normal(0, deviation, N_BLOCKS).astype(np.float32)
        bits = values.view("<u4") >> 16 if kind.name == "BF16" else values
        return bits.astype(kind.layout)
    blocks = np.frombuffer(random.bytes(N_BLOCKS * kind.layout.itemsize), kind.layout).copy()
    _set_scales(blocks, kind, np.ones(N_BLOCKS))
    sample = read_blocks(memoryview(blocks[:1000].tobytes()), kind, (1000, kind.values))
    assert isinstance(sample, QTensor)
    scales = random.uniform(0.5, 1.5, N_BLOCKS) * deviation / float(sample.dequantize().std())
    if kind.name not in CENTRES:  # whose codes may have a mean, as -8 to 7 have
        scales *= random.choice((-1, 1), N_BLOCKS)
    _set_scales(blocks, kind, scales)
    return blocks


def _set_scales(blocks: Blocks, kind: BlockType, scales: npt.NDArray[np.float64]) -> None:
    blocks["d"] = scales
    if kind.name in CENTRES:
        blocks["m"] = CENTRES[kind.name] * scales


def _is_head(name: str) -> bool:
    return name in ("token_embd.weight", "output.weight")


if __name__ == "__main__":
    main()
