"""CUDA kernels on the CPU: what they compute, and that they wait for what they need.

Threads take turns at random, and copies come late and in any order (native/emulated.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from acts import values_of
from emulated import COMPILER, Compiler, Emulated
from exchanging import Sums
from prompt_rows import check_rows
from quantized import SMALL, random_qtensor, random_quantized_decoder
from rows import Rows
from torch import Tensor

from llamachat.kernels import Batch, Cache, CacheShape
from llamachat.kernels.cuda import prompts
from llamachat.kernels.cuda.attention import Asked
from llamachat.kernels.cuda.passes import Pass, Shape, Staging
from llamachat.kernels.cuda.prompts import Prompts
from llamachat.kernels.cuda.step import Launch, Tuning
from llamachat.kernels.cuda.weights import pack
from llamachat.kernels.reference import Reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here")

REFERENCE = Reference(activation_bits=8)
STEPS = {1: Tuning(4, ring_bytes=50_000, entries=1024), 8: Tuning(8, entries=1024, arriving=32)}
FORMS = ["shifted", "8 bits", "4 bits with minimum", "bfloat16", "4 bits", "8 bits with minimum"]
# Rows of which some are beyond the last of 32, columns that fill some boxes of a stage, and fewer
# heads than blocks.
CONFIG = replace(
    SMALL, dim=256, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=128, hidden_dim=1280,
    vocab_size=70, tied=False,
)  # fmt: skip
IDS = [5, 9, 17, 3, 33, 60, 2, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_products_are_the_reference_s(folder: Path) -> None:
    kernels = Emulated(Compiler(folder))
    parts = [
        random_qtensor(form, (rows, 96), 32)
        for form, rows in (("shifted", 33), ("8 bits", 20), ("4 bits with minimum", 40))
    ]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    expected = REFERENCE.linear(x, REFERENCE.pack(parts))
    assert off(kernels.linear(x, kernels.pack(parts)), expected) < 1e-6


@pytest.mark.parametrize("at_once", [1 << 20, 40])  # rows
def test_parts_are_unpacked_in_turn(
    folder: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "UNPACKED_BYTES", 2 * 90 * at_once)
    forms = (("shifted", 33), ("shifted", 7), ("8 bits", 20))
    parts = [random_qtensor(form, (rows, 90), 30) for form, rows in forms]
    tiles = Prompts(Compiler(folder), torch.device("cpu"))._tiles(pack(parts, None, Tensor.cpu))
    found = torch.cat([tile.clone() for tile in tiles])
    assert torch.equal(found, torch.cat([part.dequantize() for part in parts]).bfloat16())


@pytest.mark.parametrize("dim", [96, 1100, 4097])
def test_norms_and_gates_of_a_prompt_are_the_reference_s(folder: Path, dim: int) -> None:
    check_rows(Prompts(Compiler(folder), torch.device("cpu")), "cpu", dim)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 128), (5, 5, 24), (1, 1, 256)])
def test_queries_of_a_prompt_are_turned_and_keys_are_kept(
    folder: Path, heads: int, kv_heads: int, head_dim: int
) -> None:
    kernels, n, slots = Emulated(Compiler(folder)), 17, 40
    generator = torch.Generator().manual_seed(heads)
    qkv = torch.randn(n, (heads + 2 * kv_heads) * head_dim, generator=generator)
    angle = torch.rand(n, head_dim // 2, generator=generator) * 100
    order = torch.randperm(slots, generator=generator).int()
    at = torch.arange(n, dtype=torch.int32)
    batch = Batch(at, at * 0, order[:n], at + 1, at, order.view(1, -1), at)
    cache = kernels.cache(CacheShape(1, kv_heads, head_dim), slots, "bf16")
    asked = Asked(qkv, (angle.cos(), angle.sin()), batch, cache, 0)
    found = kernels._attention.turned(asked)
    first, second = qkv.view(n, -1, head_dim).double().chunk(2, dim=-1)
    c, s = (turn.double().unsqueeze(1) for turn in (angle.cos(), angle.sin()))
    turned = torch.cat((first * c - second * s, first * s + second * c), dim=-1)
    q, k = turned[:, :heads], turned[:, heads : heads + kv_heads]
    v = qkv.view(n, -1, head_dim)[:, heads + kv_heads :]
    kept = (cache.keys, cache.values)
    keys, values = (held[0][:, order[:n].long()].transpose(0, 1) for held in kept)
    for coded, expected in ((found, q), (keys, k), (values, v)):
        torch.testing.assert_close(coded.double(), expected.double(), rtol=2**-8, atol=1e-6)
    assert not cache.keys[0][:, order[n:].long()].any()


@pytest.mark.parametrize("form", ["shifted", "8 bits with minimum", "4 bits"])
def test_rows_are_looked_up_though_no_norm_follows(folder: Path, form: str) -> None:
    weight = random_qtensor(form, (50, 96), 32)
    at = torch.tensor([49, 0, 7], dtype=torch.int32)
    kernels = Emulated(Compiler(folder))
    packed = kernels.pack([weight], lookup=True)
    batch = Batch(at, at, at, at, at, at.view(1, -1), at)
    found = kernels.run(lambda static: kernels.embed(static, packed), batch)
    assert off(found, weight.dequantize()[at.long()]) < 1e-6


class Late:
    """A GPU that does nothing before it is waited for; it launches kernels, and is its events."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._launched: list[Callable[[], None]] = []

    def kernel(self, source: str, name: str, **defines: object) -> Launch:
        launch = self._compiler.kernel(source, name, **defines)
        return lambda *asked: self._launched.append(partial(launch, *asked))

    def synchronize(self) -> None:
        while self._launched:
            self._launched.pop(0)()

    def record(self) -> None:
        pass


def test_what_was_staged_is_read_though_its_pass_is_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, staging, given, found = Late(Compiler(folder)), Staging(), [], []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **of: empty(*size, **of))
    monkeypatch.setattr(torch.cuda, "Event", lambda: late)
    for n in range(3):
        at = torch.tensor([n, n + 7], dtype=torch.int32)
        given.append(Batch(at, at * 0, at, at + 1, at, torch.arange(40).int().view(1, -1) + n, at))
        dropped = Pass(Shape.of(given[-1]), late, torch.device("cpu"), staging)
        found.append(dropped.run(lambda batch: batch, given[-1]))
        del dropped
    late.synchronize()
    for one, other in zip(found, given, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize(("size", "tokens", "dim"), [(2, 1, 64), (3, 2, 100)])
def test_products_of_several_processes_are_added_and_coded(
    folder: Path, size: int, tokens: int, dim: int
) -> None:
    sums = Sums([Emulated(Compiler(folder, seed)) for seed in range(size)], tokens, dim)
    sums.add_twice()
    sums.check(sums.add_twice(), 4)


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_two_steps_give_the_reference_s_logits_whatever_comes_first(
    folder: Path, n_tokens: int
) -> None:
    def logits(kernels: Reference) -> Tensor:
        decoder = random_quantized_decoder(kernels, FORMS, CONFIG)
        return Rows(decoder, form="f32").run_text(IDS[: 2 * n_tokens], n_tokens)

    results = []
    for seed in range(1 + (n_tokens == 1)):
        kernels = Emulated(Compiler(folder, seed), steps=STEPS)
        results.append(logits(kernels))
        assert kernels.launched == ["angles", "embed", "run_step"] * 2
    assert off(results[0], logits(REFERENCE)) < 1e-5
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("n_tokens", [1, 2, 4])
@pytest.mark.parametrize("processors", [1, 14])  # by which tiles are chosen
def test_kernels_of_their_own_give_the_reference_s_logits(
    folder: Path, n_tokens: int, processors: int
) -> None:
    def logits(kernels: Reference, forms: list[str]) -> Tensor:
        decoder = random_quantized_decoder(kernels, forms, CONFIG)
        return Rows(decoder, form="f32").run_text(IDS[:n_tokens], n_tokens)

    for forms in (["shifted"], FORMS):  # parts of a weight alike, and not
        kernels = Emulated(Compiler(folder, 2), processors, steps={})
        assert off(logits(kernels, forms), logits(REFERENCE, forms)) < 1e-5


@pytest.mark.parametrize(("n_tokens", "form"), [(1, "int8"), (3, "bf16")])
def test_a_step_attends_over_a_long_context_in_splits(
    folder: Path, n_tokens: int, form: str
) -> None:
    """Query heads that share a key are in one block then, and the last one adds the splits up."""
    heads, kv_heads, dim, past = 4, 1, 64, 530
    order = torch.randperm(past + n_tokens, generator=torch.Generator().manual_seed(0)).int()
    seen = torch.arange(past + 1, past + n_tokens + 1, dtype=torch.int32)
    zeros = torch.zeros(n_tokens, dtype=torch.int32)
    batch = Batch(zeros, zeros, order[past:], seen, seen - 1, order.view(1, -1), zeros[:1])
    generator = torch.Generator().manual_seed(1)
    filled = torch.randn(2, past + n_tokens, dim, generator=generator)
    qkv = torch.randn(n_tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    turns = torch.randn(n_tokens, dim // 2, generator=generator)
    found = []
    for kernels in (Emulated(Compiler(folder), 8, STEPS), Reference()):
        cache = kernels.cache(CacheShape(1, kv_heads, dim), past + n_tokens, form)
        for tensor, values in zip((cache.keys, cache.values), filled, strict=True):
            tensor.copy_(values * 40 if form == "int8" else values)
        if cache.scales is not None:
            cache.scales.fill_(1 / 40)

        def attended(b: Batch, kernels: Reference = kernels, cache: Cache = cache) -> Tensor:
            act = kernels.attention(qkv, (turns.cos(), turns.sin()), b, cache, 0)
            kernels.then(lambda: None)
            return values_of(act)

        found.append(kernels.run(attended, batch))
        if isinstance(kernels, Emulated):
            assert kernels.launched == ["run_step"]
    assert off(*found) < {"int8": 2e-2, "bf16": 6e-3}[form]


@pytest.mark.parametrize("width", [1, 33, 20_000])
def test_the_largest_logits_are_found_and_of_equal_ones_the_first(folder: Path, width: int) -> None:
    kernels = Emulated(Compiler(folder))
    logits = torch.randn(3, width).mul(5).round()  # many are equal
    logits[1] = -0.0
    logits[1, width // 2] = 0.0
    logits[2, width // 3 :] = float("inf")
    for _ in range(2):  # what is kept between two calls is as it was
        assert torch.equal(kernels.best(logits), logits.argmax(-1))
    logits[0, width // 2] = float("nan")
    assert kernels.best(logits)[0] == width // 2
