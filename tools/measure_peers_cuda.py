"""Decoding by transformers on a random model of a real shape, beside tools/measure_cuda.py.

    python tools/measure_peers_cuda.py bfloat16|nf4|int4 [--shape 7b|8b] [--layers 32]

bfloat16 is the model as it is, nf4 has the modules of bitsandbytes, and int4 those of torchao in
groups of 64, compiled: the kernel and the way of gpt-fast. llama.cpp has llama-bench:

    python tools/write_random_model.py llama-2-7b q4_0 7b.gguf
    llama-bench -m 7b.gguf -ngl 99 -fa 1 -p 512 -n 128 -d 0,3500
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measure_cuda import SHAPES, config_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

PEERS = ("bfloat16", "nf4", "int4")
DEPTH, STEPS = 128, 128


class Clock:
    """A streamer that notes when each token reached the host."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def put(self, _: Tensor) -> None:
        """The prompt, then one token at a time."""
        self._moments.append(time.perf_counter())

    def end(self) -> None:
        """The reply is over."""

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        return (len(self._moments) - 2) / (self._moments[-1] - self._moments[1])


def model_of(peer: str, shape: str, layers: int, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, its linear layers in the peer's form."""
    ours = config_of(shape, layers)
    config = LlamaConfig(
        hidden_size=ours.dim,
        intermediate_size=ours.hidden_dim,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_seq_len,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    if peer == "nf4":
        to_nf4(model.model, device)
    elif peer == "int4":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(model, Int4WeightOnlyConfig(64, int4_packing_format="tile_packed_to_4d"))
    return model


def to_nf4(blocks: nn.Module, device: str) -> None:
    """What transformers does at loading: the head stays as it is."""
    import bitsandbytes as bnb

    for name, linear in list(blocks.named_modules()):
        if isinstance(linear, nn.Linear):
            coded = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            coded.weight = weight.to(device)
            blocks.set_submodule(name, coded)


def decode_rate(model: LlamaForCausalLM, is_compiled: bool) -> float:
    """Tokens a second of one greedy reply."""
    ids = torch.arange(1, DEPTH + 1, device=model.device).view(1, -1)
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 1, do_sample=False,
        cache_implementation="static" if is_compiled else None, streamer=clock,
    )  # fmt: skip
    return clock.rate


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    model = model_of(asked.peer, asked.shape, asked.layers, asked.device)
    is_compiled = asked.peer == "int4"
    began = time.perf_counter()
    decode_rate(model, is_compiled)
    print(f"first reply after {time.perf_counter() - began:.1f} s")
    rates = sorted(decode_rate(model, is_compiled) for _ in range(3))
    rate = statistics.median(rates)
    print(
        f"transformers {asked.peer}, {asked.shape}, {STEPS} tokens at {DEPTH}: {rate:.1f} tok/s "
        f"({rates[0]:.1f} to {rates[-1]:.1f}), torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
