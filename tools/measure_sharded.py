"""Speed, memory and correctness of a 70B shape on one GPU and on two, with random int4 weights.

    python tools/measure_sharded.py alone [--layers 80]
    torchrun --nproc-per-node 2 tools/measure_sharded.py together [--layers 80] [--sum nccl]

Weights are made on the GPU from their names, so that each process has its part of the same model.
The second command compares logits with those of the first, and of two layers in float32 on the
reference with those of one process; passes of a few tokens are summed through NCCL, and then by
kernels that write to the memory of the other GPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.engine import GPU_CHUNK, Engine
from llamachat.engine.events import Token
from llamachat.engine.strategies import Greedy
from llamachat.kernels import Kernels
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.peers import Peers
from llamachat.kernels.reference import Reference
from llamachat.kernels.sharded import Sharded
from llamachat.library.forecast import weight_recipe
from llamachat.loading.follower import Follower
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.model.sharding import Part
from llamachat.quant.form import CODEBOOK, SHIFTS, Form
from llamachat.quant.tensor import QTensor

STEPS = 64
KEPT = Path(tempfile.gettempdir()) / "measure_sharded.pt"


def config_of(layers: int) -> ModelConfig:
    """Llama 3 70B's shape."""
    return ModelConfig(
        dim=8192, n_layers=layers, n_heads=64, n_kv_heads=8, head_dim=128, hidden_dim=28672,
        vocab_size=128256, norm_eps=1e-5, rope_theta=5e5, max_seq_len=8192, tied=False,
    )  # fmt: skip


def random_weight(name: str, shape: tuple[int, ...], form: Form | None) -> Tensor | QTensor:
    """Values about N(0, 1 / columns), the same on every GPU."""
    if len(shape) == 1:
        return torch.ones(shape, device="cuda")
    torch.cuda.manual_seed(zlib.crc32(name.encode()))
    out, columns = shape
    if form is None:
        return torch.randn(out, columns, device="cuda") / math.sqrt(columns)
    scales = (torch.rand(out, columns // form.group_size, device="cuda") + 0.5) / columns**0.5
    if form.bits == 8:
        codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device="cuda")
        return QTensor(codes, (scales / 73).half(), 8, form.group_size)
    book, shifts = (torch.tensor(it).float() for it in (CODEBOOK, SHIFTS))
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device="cuda")
    return QTensor(codes, (scales / 72).half(), 4, form.group_size, codebook=book, shifts=shifts)


def weights(
    config: ModelConfig, form: str | None, part: Part | None
) -> Iterator[tuple[str, Tensor | QTensor]]:
    """All of a model, or of a part, one at a time."""
    forms = weight_recipe(config, form).forms if form else {}
    for weight in iter_weights(config):
        made = random_weight(weight.hf, weight.shape, forms.get(weight.hf))
        yield from [(weight.hf, made)] if part is None else part.cut(weight.hf, made)


def decoder_of(
    kernels: Kernels, layers: int, form: str | None, number: int = 0, peers: Peers | None = None
) -> Decoder:
    """A model of so many layers, or this process's part."""
    config = config_of(layers)
    if peers is None:
        return load_decoder(config, weights(config, form, None), kernels)
    part = Part(config, peers.rank, peers.size)
    sharded = Sharded(kernels, peers, number, config.dim, part.head_rows, config.vocab_size)
    return load_decoder(part.own, weights(config, form, part), sharded)


def ids_of(depth: int) -> list[int]:
    """Some prompt."""
    return [1 + i * 7919 % 128000 for i in range(depth)]


def measure(engine: Engine) -> Tensor:
    """Print tokens a second; returns logits of a few tokens."""
    for depth in (128, 3500):
        rates = []
        for _ in range(3):
            moments = [
                time.perf_counter()
                for event in engine.generate(
                    ids_of(depth), Greedy(), max_new_tokens=STEPS + 8, stop_ids=frozenset()
                )
                if isinstance(event, Token)
            ]
            rates.append(STEPS / (moments[-1] - moments[-1 - STEPS]))
        print(f"decode at {depth}: {statistics.median(rates):.1f} tok/s", flush=True)
    began = time.perf_counter()
    next(iter(engine.generate(ids_of(512)[::-1], Greedy(), max_new_tokens=1)))
    for _ in engine.generate(ids_of(513)[::-1], Greedy(), max_new_tokens=1):
        pass
    print(f"prefill of 513: {513 / (time.perf_counter() - began):.0f} tok/s")
    print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most", flush=True)
    return torch.cat([engine.logits(ids_of(8)), engine.logits(ids_of(64))[-8:]]).cpu()


def report(name: str, found: Tensor, expected: Tensor) -> None:
    """Print how far they are from each other."""
    error = (found - expected).norm() / expected.norm()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"{name}: relative error {error:.1e}, the same best token in {same:.0%}", flush=True)


def engine_of(decoder: Decoder, ctx_size: int = 4096) -> Engine:
    """Over it."""
    return Engine(decoder, ctx_size=ctx_size, chunk=GPU_CHUNK)


def alone(layers: int) -> None:
    """One process."""
    began = time.perf_counter()
    decoder = decoder_of(Cuda("cuda:0"), layers, "int4")
    torch.cuda.synchronize()
    print(f"one GPU: made in {time.perf_counter() - began:.1f} s", flush=True)
    torch.cuda.reset_peak_memory_stats()
    torch.save(measure(engine_of(decoder)), KEPT)


class Separate(Cuda):
    """Kernels that leave sums to NCCL."""

    def join(self, peers: Peers, dim: int) -> int:
        """For no pass."""
        return 0


SUMS: dict[str, type[Cuda]] = {"nccl": Separate, "symmetric": Cuda}


def together(layers: int, sums: Sequence[str]) -> None:
    """One of several processes."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    peers = Peers(rank, size, gpu=rank, store=None)
    device = f"cuda:{rank}"
    follower = Follower(peers, rank)
    expected = None
    if rank == 0:
        expected = engine_of(decoder_of(Reference(device), 2, None), 64).logits(ids_of(16)).cpu()
    time_sums(peers, device)

    def exact(decoder: Decoder) -> None:
        assert expected is not None
        report("two layers in float32", engine_of(decoder, 64).logits(ids_of(16)).cpu(), expected)

    share(follower, peers, 1000, lambda: Reference(device), 2, None, exact)
    for number, name in enumerate(sums, 2000):

        def whole(decoder: Decoder, name: str = name) -> None:
            print(f"sums: {name}", flush=True)
            report(f"{layers} layers as int4", measure(engine_of(decoder)), torch.load(KEPT))

        share(follower, peers, number, lambda: SUMS[name](device), layers, "int4", whole)  # noqa: B023  # called at once


def share(
    follower: Follower,
    peers: Peers,
    number: int,
    kernels: Callable[[], Kernels],
    layers: int,
    form: str | None,
    lead: Callable[[Decoder], None],
) -> None:
    """Make a model in all processes; the first does `lead` with it, and the others follow."""
    decoder = decoder_of(kernels(), layers, form, number, peers)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if peers.rank == 0:
        if (joined := getattr(decoder.kernels, "_joined", 0)) or form:
            print(f"passes of up to {joined} tokens are summed by kernels", flush=True)
        lead(decoder)
        peers.tell({"drop": [number]})
    else:
        follower._models[number] = decoder
        is_over = False
        while not is_over:
            heard = peers.hear()
            is_over = isinstance(heard, Mapping) and number in heard.get("drop", ())
            follower.do(heard)
    del decoder
    gc.collect()
    torch.cuda.empty_cache()


def time_sums(peers: Peers, device: str) -> None:
    """Print microseconds of a sum in a graph."""
    h = torch.zeros(1, 8192, device=device)
    peers.sum(h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(160):
            peers.sum(h)
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    if peers.rank == 0:
        print(f"a sum of 8192: {took / 160 * 1e6:.1f} us", flush=True)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=("alone", "together"))
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--sum", nargs="+", choices=[*SUMS], default=[*SUMS])
    args = parser.parse_args()
    if args.how == "alone":
        alone(args.layers)
    else:
        together(args.layers, args.sum)
    os._exit(0)


if __name__ == "__main__":
    main()
