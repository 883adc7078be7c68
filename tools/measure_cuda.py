"""Speed of the CUDA backend on a random model of a real shape, which is made on the GPU.

    python tools/measure_cuda.py [--form int4] [--shape 7b|8b] [--layers 32] [--step | --sweep]

Prints tokens a second by depth, of a prompt of 512 and of passes of several tokens, and what each
kernel takes, measured alone in a CUDA graph over all layers, beside the bandwidth of the GPU.
`--step` runs passes of up to 8 tokens as one kernel, and `--sweep` compares ways to compile it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.kernels import Batch, Norm
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.products import ADD
from llamachat.kernels.cuda.step import SHARED_BYTES, TUNED, Tuning
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.quant.form import CODEBOOK, SHIFTS, Form
from llamachat.quant.tensor import QTensor

SHAPES = {  # dim, heads, kv heads, hidden_dim, vocab_size
    "7b": (4096, 32, 32, 11008, 32000),
    "8b": (4096, 32, 8, 14336, 128256),
}
STEPS = 64
PASSES = (1, 2, 4, 8)  # tokens of those that a step is compiled for


def config_of(shape: str, layers: int) -> ModelConfig:
    """A Llama of this shape."""
    dim, heads, kv_heads, hidden_dim, vocab_size = SHAPES[shape]
    return ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim // heads,
        hidden_dim=hidden_dim, vocab_size=vocab_size, norm_eps=1e-5, rope_theta=1e4,
        max_seq_len=8192, tied=False,
    )  # fmt: skip


def random_weight(shape: tuple[int, ...], form: str) -> Tensor | QTensor:
    """Values about N(0, 1 / columns)."""
    if len(shape) == 1:
        return torch.ones(shape, device="cuda")
    out, columns = shape
    if form == "bfloat16":
        return (torch.randn(out, columns, device="cuda") / math.sqrt(columns)).bfloat16()
    scales = torch.rand(out, columns // 32, device="cuda") + 0.5
    if form == "int8":
        codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device="cuda")
        return QTensor(codes, (scales / 73 / math.sqrt(columns)).half(), 8, 32)
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device="cuda")
    if form == "q4_0":
        return QTensor(codes, (scales / 4.6 / math.sqrt(columns)).half(), 4, 32)
    book, shifts = (torch.tensor(it).float() for it in (CODEBOOK, SHIFTS))
    halves = (scales / 72 / math.sqrt(columns)).half()
    return QTensor(codes, halves, 4, 32, codebook=book, shifts=shifts)


def weights(config: ModelConfig, form: str) -> Iterator[tuple[str, Tensor | QTensor]]:
    """All of a model, one at a time."""
    for weight in iter_weights(config):
        yield weight.hf, random_weight(weight.shape, form)


def decode_rate(engine: Engine, depth: int, decoding: Decoding | None = None) -> float:
    """Tokens a second of a reply at this depth, greedy by default, the prompt not counted."""
    ids = [1 + i % 30000 for i in range(depth)]
    moments = [
        time.perf_counter()
        for event in engine.generate(
            ids, decoding or Greedy(), max_new_tokens=STEPS + 8, stop_ids=frozenset()
        )
        if isinstance(event, Token)
    ]
    return STEPS / (moments[-1] - moments[-1 - STEPS])


def batch_of(tokens: int, depth: int, slots: int) -> Batch:
    """A row's next tokens at this depth, of which the last is wanted."""
    index = torch.arange(tokens, dtype=torch.int32)
    at, table = index + depth, torch.arange(slots, dtype=torch.int32).view(1, -1)
    return Batch(index + 5, index * 0, at, at + 1, at, table, index[-1:])


def pass_seconds(decoder: Decoder, tokens: int, depth: int, times: int = 20) -> float:
    """Median seconds of a pass of so many tokens, of which one is wanted, host included."""
    cache = decoder.new_cache(depth + tokens)
    batch = batch_of(tokens, depth, depth + tokens)
    taken = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        decoder(batch, cache)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


def replay_seconds(decoder: Decoder, depth: int, form: str, tokens: int = 1) -> float:
    """Seconds on the GPU of one recorded pass at this depth, the host left out."""
    cache = decoder.new_cache(4096, form)
    batch = batch_of(tokens, depth, 4096)
    for _ in range(2):
        decoder(batch, cache)
    (recorded,) = cache.passes.values()
    return timed(recorded._graph.replay, 50)


def passes(decoder: Decoder, form: str) -> Iterator[str]:
    """What passes of several tokens take."""
    for tokens in (1, 2, 4, 8, 16):
        took = pass_seconds(decoder, tokens, 128), replay_seconds(decoder, 128, form, tokens)
        whole, alone = (f"{seconds * 1e3:.3f} ms" for seconds in took)
        yield f"pass of {tokens} at 128: {whole}, GPU alone {alone}"


def sweep(decoder: Decoder, form: str) -> Iterator[str]:
    """Lines of a table: a recorded pass by how it is compiled, kernels of their own first."""
    yield "| warps | KiB of the ring | ms of 1, 2, 4, 8 tokens | tok/s | 4 beside 1 |"
    yield "|---|---|---|---|---|"
    rings = (SHARED_BYTES, 128 << 10)
    tunings = [Tuning(warps, ring) for warps in (8, 12, 16) for ring in rings]
    for tuning in (None, *tunings):
        steps = {} if tuning is None else dict.fromkeys(PASSES, tuning)
        tried = replace(decoder, kernels=Cuda("cuda", steps=steps))
        few = PASSES if tuning is None or tuning.ring_bytes == SHARED_BYTES else (1, 4)
        ms = {n: 1e3 * replay_seconds(tried, 128, form, n) for n in few}
        name = "-" if tuning is None else f"{tuning.warps} | {tuning.ring_bytes >> 10}"
        times = ", ".join(f"{n}: {value:.3f}" for n, value in ms.items())
        yield f"| {name} | {times} | {1e3 / ms[1]:.0f} | {ms[4] / ms[1]:.2f} |"


def graph_seconds(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of the work as one graph."""
    with torch.inference_mode():
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return timed(graph.replay, times)


def timed(work: Callable[[], object], times: int) -> float:
    """Median seconds on the GPU."""
    work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    for event in events:
        event.record()
        work()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def kernel_table(decoder: Decoder, depth: int) -> Iterator[tuple[str, float, float]]:
    """Name, microseconds a layer and GB/s of each call, for one token."""
    k, config = decoder.kernels, decoder.config
    assert isinstance(k, Cuda)
    cache = decoder.new_cache(depth + 1)
    one = torch.zeros(1, dtype=torch.int32, device="cuda")
    table = torch.arange(depth + 1, dtype=torch.int32, device="cuda").view(1, -1)
    batch = Batch(one, one, one + depth, one + depth + 1, one + depth, table, one)
    h = torch.randn(1, config.dim, device="cuda")
    norm = Norm(torch.ones(config.dim, device="cuda"), 1e-5)
    angles = k.angles(batch.position, decoder.frequencies)
    act = k._normed(h, norm)
    blocks, n = decoder.blocks, len(decoder.blocks)
    qkv = k._product(act, blocks[0].qkv)
    mixed = k.attention(qkv, angles, batch, cache, 0)
    gated = k.norm_swiglu(h, norm, blocks[0].gate_up)
    products = k._products
    out = products.acts(1, config.dim, norm)

    def add(x: Any, name: str) -> Callable[[], object]:
        return lambda: [
            products.multiply(x, getattr(b, name), ADD, h, out=out, gain=norm.weight)
            for b in blocks
        ]

    kv = depth * k.slot_bytes(cache) / n
    yield "norm", graph_seconds(lambda: [k._normed(h, norm) for _ in blocks]) / n, 0
    for name, work, size in (
        ("qkv", lambda: [k._product(act, b.qkv) for b in blocks], blocks[0].qkv.n_bytes),
        ("attention", lambda: [k.attention(qkv, angles, batch, cache, i) for i in range(n)], kv),
        ("o + norm", add(mixed, "o"), blocks[0].o.n_bytes),
        (
            "gate, up, silu",
            lambda: [k._gated(act, b.gate_up) for b in blocks],
            blocks[0].gate_up.n_bytes,
        ),
        ("down + norm", add(gated, "down"), blocks[0].down.n_bytes),
    ):
        yield name, graph_seconds(work) / n, size
    head = decoder.head
    yield "head", graph_seconds(lambda: [k._product(act, head) for _ in range(4)]) / 4, head.n_bytes


def quantize_rate(kernels: Cuda, form: Form) -> float:
    """Values a second of a float16 matrix of the shape of a 7B's gate."""
    weight = torch.randn(11008, 4096, device="cuda").half()
    return weight.numel() / timed(lambda: kernels.quantize(weight, form), 10)


def copy_bandwidth() -> float:
    """GB/s of a large copy, bytes read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / graph_seconds(lambda: b.copy_(a)) / 1e9


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", default="int4", choices=("int4", "q4_0", "int8", "bfloat16"))
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-cache", default="bf16")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--step", action="store_true", help="passes as one kernel")
    parser.add_argument("--warps", type=int, default=8, help="of a step, that multiply")
    parser.add_argument("--sweep", action="store_true", help="ways to compile a step, no more")
    args = parser.parse_args()
    steps = dict.fromkeys(PASSES, Tuning(args.warps)) if args.step else TUNED
    kernels = Cuda("cuda", steps=steps)
    config = config_of(args.shape, args.layers)
    decoder = load_decoder(config, weights(config, args.form), kernels)
    torch.cuda.synchronize()
    if args.sweep:
        print(f"{torch.cuda.get_device_name()}, {args.shape} {args.form}, kv {args.kv_cache}")
        for line in sweep(decoder, args.kv_cache):
            print(line, flush=True)
        return
    began = time.perf_counter()
    engine = Engine(decoder, ctx_size=4096, kv_cache=args.kv_cache, chunk=1024)
    read = engine.bytes_per_token(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape} {args.form}, "
        f"kv {args.kv_cache}: {read / 1e9:.2f} GB a token, {copy_bandwidth():.0f} GB/s copied"
    )
    decode_rate(engine, 16)
    print(f"first reply after {time.perf_counter() - began:.1f} s")
    for depth in (128, 3500):
        rates = [decode_rate(engine, depth) for _ in range(3)]
        rate = statistics.median(rates)
        print(
            f"decode at {depth}: {rate:.1f} tok/s, "
            f"{rate * engine.bytes_per_token(depth) / 1e9:.0f} GB/s"
        )
        step = replay_seconds(decoder, depth, args.kv_cache)
        print(f"step at {depth} on the GPU alone: {step * 1e3:.3f} ms, {1 / step:.1f} tok/s")
    if args.brief:
        return
    for decoding in (Sample(seed=1), Sample(seed=1, top_k=40, top_p=1)):
        rate = statistics.median(decode_rate(engine, 128, decoding) for _ in range(3))
        print(f"decode at 128, top-k {decoding.top_k}, top-p {decoding.top_p}: {rate:.1f} tok/s")
    for line in passes(decoder, args.kv_cache):
        print(line)
    print(f"prefill 512: {512 / pass_seconds(decoder, 512, 0, 8):.0f} tok/s")
    for depth in (160, 3500):
        print(f"| kernel at {depth} | us | GB/s |\n|---|---|---|")
        for name, seconds, size in kernel_table(decoder, depth):
            print(f"| {name} | {seconds * 1e6:.2f} | {size / seconds / 1e9:.0f} |")
    for form in (Form("int4"), Form("int8")):
        print(f"quantized to {form.name}: {quantize_rate(kernels, form) / 1e9:.1f}e9 values/s")
    print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


if __name__ == "__main__":
    main()
