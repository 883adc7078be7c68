"""How fast this machine reads memory and multiplies: what bounds decode and prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llamachat.kernels.library import LibraryMissing
from llamachat.kernels.memory import huge
from llamachat.kernels.native import Native
from llamachat.quant.tensor import QTensor

GIGA = 1e9
BUFFER_BYTES = 2**29  # many times what caches hold
READS = 5
T, O, I = 256, 4096, 4096  # tokens and matrix of the products: those of a 7B model
MEASURED_S = 0.3


def read_bandwidth(threads: int, device: str = "cpu") -> float:
    """GB/s that the CPU, or a GPU, reads at most: the best of several passes over much memory."""
    if device != "cpu":
        return _gpu_bandwidth(device)
    buffer = huge(BUFFER_BYTES).view(torch.float32)  # where weights are; its sum keeps up
    buffer.fill_(1)
    if native := _native(threads):
        return max(native.read_bandwidth(buffer) for _ in range(READS))
    with _torch_threads(threads):
        return max(buffer.nbytes / _seconds(buffer.sum) / GIGA for _ in range(READS))


def _gpu_bandwidth(device: str) -> float:
    """GB/s of a sum, of more than its caches hold."""
    buffer = torch.ones(8 * BUFFER_BYTES // 4, device=device)
    times: list[float] = []
    for _ in range(READS + 1):
        torch.cuda.synchronize(device)
        times.append(_seconds(lambda: buffer.sum().item()))
    return buffer.nbytes / min(times[1:]) / GIGA


def int8_gop_per_s(threads: int) -> float | None:
    """Operations (2 a product) of a 256-token linear at 8 bits; None without native kernels."""
    native = _native(threads)
    if native is None:
        return None
    codes = torch.randint(-127, 128, (O, I), dtype=torch.int8)
    scales = torch.full((O, I // 32), 2.0**-10, dtype=torch.float16)
    weight = native.pack([QTensor(codes, scales, bits=8, group_size=32)])
    x = torch.randn(T, I)
    return _gop_per_s(lambda: native.linear(x, weight))


def bfloat16_gop_per_s(threads: int) -> float:
    """Operations of the same linear in bfloat16, as torch does it."""
    x, weight = torch.randn(T, I).bfloat16(), torch.randn(O, I).bfloat16()
    with _torch_threads(threads):
        return _gop_per_s(lambda: torch.nn.functional.linear(x, weight))


def _native(threads: int) -> Native | None:
    try:
        return Native(threads)
    except LibraryMissing:
        return None


def _gop_per_s(product: Callable[[], object]) -> float:
    """The best of as many as there is time for, two at least."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < MEASURED_S:
        times.append(_seconds(product))
    return 2 * T * O * I / min(times) / GIGA


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
