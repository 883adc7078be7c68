"""What loading does for the device that it loads to: memory measured, kernels compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

from llamachat import hardware
from llamachat.loading.plan import Plan, available_bytes

if TYPE_CHECKING:
    from llamachat.engine.engine import Engine

SAID_EVERY_S = 2.0


def start_gpu(gpu: int) -> None:
    """Let the driver make its context while torch is imported: neither needs the other."""
    Thread(target=hardware.gpu_memory_bytes, args=(gpu,), daemon=True).start()
    import_module("torch")


class Meter:
    """Memory of the GPU, or of the host, from when it was made.

    Attributes:
        available_bytes: what there was to be had.
    """

    def __init__(self, plan: Plan) -> None:
        self.available_bytes = available_bytes(plan)
        self._gpu = plan.backend.gpu
        reset_peak(self._gpu)
        self._before = _taken_bytes(self._gpu)

    @property
    def peak_bytes(self) -> int:
        """The most that was taken since, beside what was taken before."""
        return peak_bytes(self._gpu) - self._before


def peak_bytes(gpu: int | None) -> int:
    """The most memory of a GPU that torch took, or of the host that was resident."""
    if gpu is None:
        return hardware.peak_memory_bytes()
    import torch

    return torch.cuda.max_memory_allocated(gpu)


def reset_peak(gpu: int | None) -> None:
    """Let `peak_bytes` begin anew, as far as the system can."""
    if gpu is None:
        hardware.reset_peak_memory()
    else:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]  # counting does not do it by itself
        torch.cuda.reset_peak_memory_stats(gpu)


def _taken_bytes(gpu: int | None) -> int:
    if gpu is None:
        return hardware.resident_bytes()
    import torch

    return torch.cuda.memory_allocated(gpu)


def compile_kernels(engine: Engine, notice: Callable[[str], None]) -> None:
    """Compile what passes of an engine will run, all at once, where kernels are compiled at all.

    What is read from a file takes memory that its successor does not need: it is given back.
    """
    kernels = engine.decoder.kernels
    if kernels.device.type != "cuda":
        return
    import torch

    torch.cuda.empty_cache()
    from llamachat.kernels.cuda import Cuda
    from llamachat.kernels.cuda.attention import ALONE
    from llamachat.kernels.cuda.products import FEW, TILES
    from llamachat.kernels.sharded import Sharded

    backend = kernels.backend if isinstance(kernels, Sharded) else kernels
    if not isinstance(backend, Cuda) or engine.decoder.config.prefix is not None:
        return
    # The other processes find what was compiled where it is kept.
    alone = kernels.alone() if isinstance(kernels, Sharded) else nullcontext()
    progress = _Progress(torch.cuda.get_device_name(kernels.device), notice)
    with alone, backend.rehearsal(progress):
        for n_tokens in (*max(TILES.values(), key=len), FEW + 1):
            engine.logits([0] * n_tokens)
        _decode_at(engine, ALONE)


def _decode_at(engine: Engine, depth: int) -> None:
    """A rehearsed pass of one token that sees so many others, which need not be there."""
    import torch

    from llamachat.kernels import Batch

    zero = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros((1, depth + 1), dtype=torch.int32)
    batch = Batch(zero, zero, zero, zero + depth + 1, zero + depth, table, zero)
    engine.decoder(batch, engine.decoder.new_cache(1, engine.kv_cache))


class _Progress:
    """Says now and then how far compiling has come."""

    def __init__(self, gpu: str, notice: Callable[[str], None]) -> None:
        self._gpu, self._notice = gpu, notice
        self._said: float | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._said is None or now - self._said >= SAID_EVERY_S:
            self._said = now
            self._notice(f"compiling kernels for {self._gpu}, once: {done}/{total}")
