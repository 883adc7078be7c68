"""Native kernels and the threads and processes around them."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from threading import Thread

import psutil
import pytest
import torch
from quantized import random_qtensor
from test_kernels_native_attention import HEADS, random_text
from torch import Tensor

from llamachat.kernels import Batch
from llamachat.kernels.native import Native

MakeNative = Callable[[int], Native]


class Work:
    """A product that is big enough to be shared out, always the same."""

    def __init__(self, kernels: Native, form: str = "4 bits") -> None:
        self.kernels = kernels
        self.weight = kernels.pack([random_qtensor(form, (2048, 256), 32)])

    def run(self) -> Tensor:
        x = torch.linspace(-1, 2, 8 * 256).view(8, 256)
        return self.kernels.linear(x, self.weight)


def n_threads() -> int:
    return psutil.Process().num_threads()


def test_two_backends_work_at_once_in_one_process(isa: str) -> None:
    works = [Work(Native(2, isa), form) for form in ("4 bits", "8 bits")]
    expected = [work.run() for work in works]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(40):
            if not torch.equal(works[i].run(), expected[i]):
                wrong.append(i)

    threads = [Thread(target=repeat, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_backend_that_is_dropped_leaves_no_thread(isa: str) -> None:
    Work(Native(3, isa)).run()
    gc.collect()
    before = n_threads()
    work = Work(Native(3, isa))
    work.run()
    assert n_threads() == before + 2
    del work
    gc.collect()
    assert n_threads() == before


def test_an_idle_backend_uses_no_processor_time(isa: str) -> None:
    work = Work(Native(2, isa))
    work.run()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
# From 3.12 on Python warns of a fork beside threads: that is what is tested.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_parent_and_child_both_go_on_after_a_fork(isa: str) -> None:
    work = Work(Native(2, isa))
    expected = work.run()
    child = os.fork()
    if not child:  # no cleaning up of pytest's in the child, whatever happens
        try:
            os._exit(0 if torch.equal(work.run(), expected) else 1)
        finally:
            os._exit(2)
    assert torch.equal(work.run(), expected)
    assert exit_status(child) == 0


def exit_status(child: int, timeout_s: float = 20) -> int:
    """Of a child of ours, which is ended if it hangs."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def enough_for(seconds: float, run: Callable[[int], object], most: int) -> int:
    """So much work that `run` takes about that long."""
    run(8)
    start = time.perf_counter()
    run(8)
    return max(8, min(most, int(8 * seconds / (time.perf_counter() - start))))


@pytest.mark.parametrize("threads", [1, 2])
def test_products_longer_than_a_time_slice_are_added_once(native: MakeNative, threads: int) -> None:
    """Native calls return after about 30 ms to let an interrupt in, and are resumed."""
    kernels = native(threads)
    weight = kernels.pack([random_qtensor("4 bits", (2048, 2048), 32)])
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))

    def run(n: int) -> Tensor:
        h = torch.ones(n, 2048)
        kernels.linear_add(x.expand(n, -1).contiguous(), weight, h)
        return h

    found = run(enough_for(0.1, run, most=4096))
    assert torch.equal(found, run(1).expand_as(found))


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_longer_than_a_time_slice_is_finished(native: MakeNative, threads: int) -> None:
    kernels, text = native(threads), random_text(HEADS["wide"], (0,) * 3000, scattered=False)
    cache = text.new_cache(kernels, "bf16")
    text.store(kernels, cache, range(3000))

    def run(n: int) -> Tensor:
        return text.run(kernels, cache, range(3000 - n, 3000))

    n = enough_for(0.1, run, most=3000)
    found = run(n)
    for token in (3000 - n, 3000 - n // 2, 2999):
        assert torch.equal(found[token - 3000 + n], text.run(kernels, cache, [token])[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to oneself there")
def test_a_pass_of_many_seconds_is_interrupted_at_once(native: MakeNative) -> None:
    """Garbage is not collected meanwhile: what is raised in callbacks of that is lost."""
    kernels = native(1)
    weight = kernels.pack([random_qtensor("4 bits", (2048, 2048), 32)])
    x, nothing = torch.ones(64, 2048), torch.zeros(64, dtype=torch.int32)
    batch = Batch(*[nothing] * 5, nothing.view(1, -1), nothing)

    def forward(_: Batch) -> Tensor:
        outs = [kernels.linear(x, weight) for _ in range(10_000)]
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return outs[-1]

    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.perf_counter()
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            kernels.run(forward, batch)
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - start < 2
