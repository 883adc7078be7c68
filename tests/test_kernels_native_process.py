"""Native kernels in the life of a process: idle, interrupted, beside torch, deep, and roomy.

Run as a program, this file does one of the things that need a process of their own, and writes
what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import psutil
import pytest
import torch
from quantized import random_qtensor, random_quantized_decoder
from rows import Rows
from torch import Tensor

import llamachat
from llamachat import hardware
from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.engine import Engine
from llamachat.engine.strategies import Greedy
from llamachat.kernels import Kernels, abi
from llamachat.kernels.backends import choose
from llamachat.kernels.native import Native
from llamachat.kernels.reference import Reference
from llamachat.loading import Model
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.quant.tensor import QTensor

pytestmark = pytest.mark.skipif(
    choose().missing is not None, reason=f"no native kernels: {choose().missing}"
)

MIB = 2**20
CACHE_FORMS = ("f32", "bf16", "int8")
IDS = [(7 * i * i + 31 * i + 5) % 80 for i in range(8000)]


def config(dim: int, hidden_dim: int, n_layers: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        dim=dim, hidden_dim=hidden_dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads,
        head_dim=dim // n_heads, vocab_size=256, norm_eps=1e-5, rope_theta=1e4, max_seq_len=8192,
        tied=True,
    )  # fmt: skip


MIDDLE = config(1024, 2816, n_layers=4, n_heads=8)
LAYERS_OF_7B = config(4096, 11_008, n_layers=2, n_heads=32)


def four_bit_decoder(kernels: Native, shape: ModelConfig) -> Decoder:
    """Matrices of one shape are the same: drawing their codes takes the time."""

    @cache
    def matrix(rows: int, columns: int) -> QTensor:
        return random_qtensor("4 bits", (rows, columns), 32, largest=0.05)

    tensors: Iterator[tuple[str, Tensor | QTensor]] = (
        (weight.hf, matrix(*weight.shape) if len(weight.shape) == 2 else torch.ones(weight.shape))
        for weight in iter_weights(shape)
    )
    return load_decoder(shape, tensors, kernels)


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What a function of this file finds in a process of its own."""
    command = [sys.executable, __file__, work.__name__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- a chat in a process ---------------------------------------------------------------------


def chat(folder: str) -> dict[str, Any]:
    """Answers with little context and with much, then waits with the models still loaded."""
    process = psutil.Process()

    def answered(ctx_size: int, form: str) -> Model:
        model = llamachat.load(folder, backend="native", kv_cache=form, ctx_size=ctx_size)
        list(model.generate(range(100), max_new_tokens=20, stop_ids=()))
        return model

    grown = {}
    for form in CACHE_FORMS:
        loaded = [answered(512, form)]
        before = process.memory_info().rss
        loaded.append(answered(2**17, form))
        grown[form] = process.memory_info().rss - before
    time.sleep(0.1)
    before_s = time.process_time()
    time.sleep(1)
    return {"idle_s": time.process_time() - before_s, "grown_bytes": grown}


@pytest.fixture(scope="module")
def chatted(tiny_llama: Callable[..., Path]) -> dict[str, Any]:
    """What a chat took whose context of 128 Ki tokens holds 1 GiB of float32."""
    folder = tiny_llama(
        num_attention_heads=4, num_key_value_heads=4, head_dim=128, max_position_embeddings=2**17
    )
    return in_a_process(chat, folder)


def test_an_idle_chat_takes_no_processor_time(chatted: dict[str, Any]) -> None:
    assert chatted["idle_s"] < 0.02


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_context_takes_no_memory_until_it_is_used(chatted: dict[str, Any], form: str) -> None:
    assert chatted["grown_bytes"][form] < 64 * MIB


# -- Ctrl-C ----------------------------------------------------------------------------------


def interrupted() -> dict[str, Any]:
    """Ctrl-C while layers of a 7B shape read a prompt for seconds."""
    kernels = Native(hardware.usable_cores())
    engine = Engine(four_bit_decoder(kernels, LAYERS_OF_7B), ctx_size=4096)
    calls = timed_calls()
    prompt = [i % 256 for i in range(256)]
    before = engine.logits(prompt)
    longest_call_s = max(calls)
    sent: list[float] = []

    def press() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    Timer(0.3, press).start()
    try:
        list(engine.generate(prompt * 16, Greedy(), max_new_tokens=1))
        answered = float("inf")
    except KeyboardInterrupt:
        answered = time.perf_counter()
    return {
        "longest_call_s": longest_call_s,
        "answered_after_s": answered - sent[0],
        "is_same_afterwards": torch.equal(engine.logits(prompt), before),
    }


def timed_calls() -> list[float]:
    """Seconds of each native call of a pass from now on, as they are made."""
    library: Any = abi.library()
    run, times = library.lc_run, []

    def timed(*arguments: Any) -> int:
        start = time.perf_counter()
        status: int = run(*arguments)
        times.append(time.perf_counter() - start)
        return status

    library.lc_run = timed
    return times


@pytest.fixture(scope="module")
def interruption() -> dict[str, Any]:
    if sys.platform == "win32":
        pytest.skip("no signals to oneself there")
    return in_a_process(interrupted)


def test_no_native_call_of_a_7b_layer_keeps_the_interpreter_waiting(
    interruption: dict[str, Any],
) -> None:
    """A slice is 30 ms; the rest is for a busy machine."""
    assert interruption["longest_call_s"] < 0.15


def test_ctrl_c_is_answered_in_the_middle_of_a_long_prompt(interruption: dict[str, Any]) -> None:
    """It waits for the slice that is running; the rest is for a busy machine."""
    assert interruption["answered_after_s"] < 0.25


def test_an_interrupted_prompt_leaves_the_kernels_whole(interruption: dict[str, Any]) -> None:
    assert interruption["is_same_afterwards"]


# -- beside torch ----------------------------------------------------------------------------


@contextmanager
def torch_at_work() -> Iterator[list[float]]:
    """Torch multiplies in a thread of its own; a figure for each product, in the end."""
    over, done = Event(), []

    def multiply() -> None:
        x = torch.ones(256, 256)
        while not over.is_set():
            done.append(float((x @ x)[0, 0]))

    thread = Thread(target=multiply)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def test_torch_at_work_in_another_thread_changes_no_result() -> None:
    torch.set_num_threads(1)
    decoder = four_bit_decoder(Native(2), MIDDLE)

    def steps() -> Tensor:
        return Rows(decoder).run_text(range(60), chunk=1)

    expected = steps()
    with torch_at_work() as products:
        found = steps()
    assert torch.equal(found, expected)
    assert set(products) == {256.0}


# -- deep contexts ---------------------------------------------------------------------------


def last_logits(kernels: Kernels, form: str, chunk: int) -> Tensor:
    """(64, V) float64 of the last of 8,000 tokens in 4 bits, so many a pass."""
    decoder = random_quantized_decoder(kernels, ["4 bits"])
    return Rows(decoder, capacity=8000, form=form).run_text(IDS, chunk)[-64:].double()


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_4_bit_model_at_depth_8000_does_not_depend_on_how_it_got_there(form: str) -> None:
    whole, cut = (last_logits(Native(2), form, chunk) for chunk in (8000, 300))
    assert torch.equal(whole, cut)


@pytest.fixture(scope="module")
def references() -> Callable[[str], tuple[Tensor, Tensor]]:
    """Gives what the integer reference says, and that in floats, with a form of the cache."""
    integer, plain = Reference(activation_bits=8), Reference()
    return cache(lambda form: (last_logits(integer, form, 1000), last_logits(plain, form, 1000)))


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_4_bit_model_at_depth_8000_is_nearer_to_the_integer_reference_than_that_to_floats(
    references: Callable[[str], tuple[Tensor, Tensor]], form: str
) -> None:
    """With bfloat16 in its cache the reference computes in it, too: it keeps float32 instead."""
    integer, plain = references("f32" if form == "bf16" else form)
    found = last_logits(Native(2), form, 300)
    assert (found - integer).norm() < (integer - plain).norm()


if __name__ == "__main__":
    json.dump(globals()[sys.argv[1]](*sys.argv[2:]), sys.stdout)
