"""CUDA kernels beside the reference, on a machine with an NVIDIA GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from acts import values_of
from prompt_rows import check_rows
from quantized import FORMS, random_qtensor, random_quantized_decoder
from rows import Rows, alone
from torch import Tensor

import llamachat
from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.beam import Beam
from llamachat.engine.engine import Engine
from llamachat.engine.events import Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import DamagedFileError, UsageError
from llamachat.kernels import Batch, CacheShape, Kernels, Norm
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.products import FEW
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.quant.form import Form
from llamachat.quant.tensor import QTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not find_spec("cuda"), reason="no NVIDIA GPU here"
    ),
]

REFERENCE = Reference(activation_bits=8)
EXACT = [form for form in FORMS if form != "NF4"]  # its codebook is rounded to 8 bits
TOKENS = (1, 2, 3, 4, 5, 8, 11, 16)
SHAPES = [
    *((1, 32, 32), (40, 64, 16), (33, 96, 32), (70, 192, 96), (100, 256, 64), (65, 4096, 128)),
    *((96, 1280, 32), (2080, 256, 32)),
]
IDS = [5, 9, 17, 3, 33, 60, 2, 2, 41]


@cache
def kernels(dtype: torch.dtype = torch.float32) -> Cuda:
    return Cuda("cuda", dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """How far off, relatively; NaN where something is no number."""
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def multiplied(parts: Sequence[Tensor | QTensor], x: Tensor, bias: Tensor | None = None) -> float:
    weight = kernels().pack(parts, bias=bias)
    expected = REFERENCE.linear(x, REFERENCE.pack(parts, bias=bias))
    return off(kernels().linear(x.cuda(), weight), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", EXACT)
def test_products_are_the_reference_s(form: str, shape: tuple[int, int, int]) -> None:
    out, columns, group = shape
    weight = random_qtensor(form, (out, columns), group)
    for n in TOKENS:
        assert multiplied([weight], random(n, columns, seed=n)) < 2e-6


def test_a_codebook_of_fractions_is_rounded_to_8_bits() -> None:
    weight = random_qtensor("NF4", (40, 256), 64)
    assert multiplied([weight], random(2, 256)) < 4e-3


@pytest.mark.parametrize("form", ["8 bits", "4 bits with minimum"])
def test_a_group_may_be_a_whole_row_of_odd_length(form: str) -> None:
    columns = 50 if form == "8 bits" else 34
    assert multiplied([random_qtensor(form, (9, columns), columns)], random(3, columns)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (17, 48), (33, 100), (100, 7), (3, 4096)], ids=str)
def test_float_weights_multiply_unrounded_activations(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random(*shape).to(dtype)
    for n in (1, 3, 16):
        assert multiplied([weight], random(n, shape[1], seed=2)) < 2e-5


def test_parts_of_different_forms_stack_under_one_bias() -> None:
    parts = [
        random_qtensor("shifted", (64, 96), 32),
        random_qtensor("8 bits", (40, 96), 16),
        random(24, 96),
    ]
    assert multiplied(parts, random(2, 96), bias=random(128)) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_prompts_multiply_unpacked_weights(form: str) -> None:
    weight, x = random_qtensor(form, (70, 192), 32), random(FEW + 1, 192)
    expected = x.double() @ weight.dequantize().double().T
    assert off(kernels().linear(x.cuda(), kernels().pack([weight])), expected) < 6e-3


@pytest.mark.parametrize("dim", [96, 1100, 4097])
def test_norms_and_gates_of_a_prompt_are_the_reference_s(dim: int) -> None:
    check_rows(kernels()._prompts, "cuda", dim)


@pytest.mark.parametrize(("rows", "columns"), [(72, 160), (96, 512)])
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("form", ["shifted", "4 bits with minimum", "8 bits"])
def test_a_norm_stands_before_products(form: str, n_tokens: int, rows: int, columns: int) -> None:
    """It is divided by after the product: a code may fall to the other side of a half."""
    h, gain = random(n_tokens, columns) * 3, random(columns, seed=3).abs()
    parts = [random_qtensor(form, (rows, columns), 32, seed=i) for i in range(2)]
    ours, theirs = kernels().pack(parts, gated=True), REFERENCE.pack(parts, gated=True)
    found = kernels().norm_linear(h.cuda(), Norm(gain.cuda(), 1e-5), ours)
    assert off(found, REFERENCE.norm_linear(h, Norm(gain, 1e-5), theirs)) < 2e-3


@pytest.mark.parametrize(("dim", "hidden_dim"), [(64, 96), (256, 4608)])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_what_a_gate_gives_is_added_to_the_stream(n_tokens: int, dim: int, hidden_dim: int) -> None:
    h, norm = random(n_tokens, dim) * 2, torch.ones(dim)
    gate_up = [random_qtensor("shifted", (hidden_dim, dim), 32, seed=i) for i in range(2)]
    down = [random_qtensor("8 bits", (dim, hidden_dim), 32, seed=3)]
    streams = []
    for k in (kernels(), REFERENCE):
        stream = h.clone().to(k.device)
        act = k.norm_swiglu(stream, Norm(norm.to(k.device), 1e-5), k.pack(gate_up, gated=True))
        k.linear_add(act, k.pack(down), stream)
        streams.append(stream.cpu() - h)
    assert off(*streams) < 4e-3


@pytest.mark.parametrize("form", ["shifted", "8 bits with minimum", "4 bits"])
def test_rows_are_looked_up(form: str) -> None:
    weight = random_qtensor(form, (50, 96), 32)
    at = torch.tensor([49, 0, 7], dtype=torch.int32)
    batch = Batch(at, at, at, at, at, at.view(1, -1), at)
    found = kernels().run(
        lambda b: kernels().embed(b, kernels().pack([weight], lookup=True)), batch
    )
    assert off(found, weight.dequantize()[at.long()]) < 1e-6


@pytest.mark.parametrize("form", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("heads", [(1, 1, 8), (8, 8, 64), (9, 3, 128), (12, 2, 80), (6, 1, 256)])
@pytest.mark.parametrize("n_tokens", [1, 4, 20])
def test_attention_over_scattered_slots_is_the_reference_s(
    heads: tuple[int, int, int], form: str, n_tokens: int
) -> None:
    """Other slots are full of NaN."""
    n_heads, kv_heads, dim = heads
    past, capacity = 300, 512
    order = torch.randperm(capacity, generator=torch.Generator().manual_seed(0)).int()
    found = []
    for k in (kernels(), Reference()):
        held = k.cache(CacheShape(2, kv_heads, dim), capacity, form)
        for tensor in (held.keys, held.values, held.scales):
            if tensor is not None and tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for start, n in ((0, past), (past, n_tokens)):
            qkv = random(n, (n_heads + 2 * kv_heads) * dim, seed=n).to(k.device)
            turns = random(n, dim // 2, seed=5).to(k.device)
            zeros = torch.zeros(n, dtype=torch.int32)
            seen = torch.arange(start + 1, start + n + 1, dtype=torch.int32)
            slot = order[start : start + n].contiguous()
            batch = Batch(zeros, zeros, slot, seen, seen - 1, order.view(1, -1), zeros[:1])
            out = k.run(
                lambda b, q=qkv, t=turns, k=k, held=held: values_of(
                    k.attention(q, (t.cos(), t.sin()), b, held, 1)
                ),
                batch,
            )
        found.append(out.float().cpu())
    assert off(*found) < {"f32": 1e-5, "bf16": 6e-3, "int8": 2e-2}[form]


def float_decoder(k: Kernels) -> Decoder:
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=80,
        norm_eps=1e-5, rope_theta=1e4, max_seq_len=512, tied=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tensors = [
        (weight.hf, torch.randn(weight.shape, generator=generator) * 0.3)
        for weight in iter_weights(config)
    ]
    return load_decoder(config, tensors, k)


@pytest.mark.parametrize("n_tokens", [1, 9, 30])
def test_a_float_decoder_gives_the_reference_s_logits(n_tokens: int) -> None:
    ids = (IDS * 4)[:n_tokens]
    found, expected = (alone(float_decoder(k), ids, "f32") for k in (kernels(), Reference()))
    assert off(found, expected) < 2e-5


@pytest.mark.parametrize("form", EXACT)
def test_a_quantized_decoder_is_nearer_to_the_integer_reference_than_that_to_floats(
    form: str,
) -> None:
    found, integer, plain = (
        alone(random_quantized_decoder(k, [form]), IDS, "f32").cpu()
        for k in (kernels(), REFERENCE, Reference())
    )
    assert (found - integer).norm() < (integer - plain).norm()


def test_mixed_forms_make_one_decoder() -> None:
    forms = ["shifted", "8 bits", "float"]
    found, integer, plain = (
        alone(random_quantized_decoder(k, forms), IDS, "f32").cpu()
        for k in (kernels(), REFERENCE, Reference())
    )
    assert (found - integer).norm() < (integer - plain).norm()


@pytest.mark.parametrize("tokens", [1, 3])
def test_recorded_passes_give_what_unrecorded_ones_do(tokens: int) -> None:
    decoder = random_quantized_decoder(kernels(), ["shifted"])
    ids = [(7 * i) % 80 for i in range(24)]
    recorded = Rows(decoder, form="bf16").run_text(ids, tokens)
    fresh = Rows(decoder, form="bf16")
    rows = []
    for i in range(0, len(ids), tokens):
        fresh.cache.passes.clear()
        torch.cuda._sleep(10_000_000)  # cycles, by which the GPU is late
        rows.append(fresh.run([(0, token) for token in ids[i : i + tokens]]))
    assert torch.equal(recorded, torch.cat(rows))


def test_passes_that_are_no_longer_recorded_are_recorded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llamachat.kernels.cuda, "MOST_PASSES", 2)
    found, expected = (Rows(float_decoder(k), form="f32") for k in (kernels(), Reference()))
    for n in (1, 1, 2, 2, 3, 3, 1, 1, 2, 3):
        part = [(0, token) for token in IDS[:n]]
        assert off(found.run(part), expected.run(part)) < 2e-5
    assert len(found.cache.passes) == 2


def test_a_token_s_result_does_not_depend_on_those_beside_it() -> None:
    decoder = random_quantized_decoder(kernels(), ["shifted", "8 bits"])
    ids = [(7 * i) % 80 for i in range(16)]
    alone_, together = (Rows(decoder, form="f32").run_text(ids, n) for n in (1, 16))
    assert off(together, alone_) < 1e-4


def test_rows_of_a_table_do_not_see_each_other() -> None:
    decoder, expected = float_decoder(kernels()), float_decoder(Reference())
    tokens = [(0, 5), (1, 9), (1, 3), (0, 7), (0, 9), (1, 1)]
    found = [Rows(d, 2, form="f32").run(tokens) for d in (decoder, expected)]
    assert off(*found) < 2e-5


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantizing_errs_no_more_than_on_the_cpu(name: str) -> None:
    weight = random(24, 256)
    found = kernels().quantize(weight, Form(name))  # type: ignore[arg-type]
    expected = REFERENCE.quantize(weight, Form(name))  # type: ignore[arg-type]
    assert off(found.dequantize(), weight) <= off(expected.dequantize(), weight) * 1.001


def test_a_trained_model_tells_its_story_word_for_word() -> None:
    if not (named := os.environ.get("LLAMACHAT_TEST_DATA")):
        pytest.skip("LLAMACHAT_TEST_DATA is not set")
    folder = Path(named) / "models" / "stories260K"
    model = llamachat.load(folder / "stories260K.gguf", device="cuda", dtype="float32")
    assert (model.backend, model.device) == ("cuda", "cuda:0")
    assert model.tokenizer.bos_id is not None
    ids = model.generate([model.tokenizer.bos_id], llamachat.Greedy(), 200, stop_ids=())
    story = (folder / "expected_stdout_200steps.txt").read_text("utf-8")
    assert model.tokenizer.decode(list(ids)) == story


def test_draws_of_equal_logits_are_those_of_the_cpu() -> None:
    logits = random(1, 500) * 3
    start = llamachat.Start((1,), frozenset(), 20, (7, 0, 0))
    sample = llamachat.Sample(temperature=0.9, top_k=60, top_p=0.9)
    chosen = []
    for device in ("cpu", "cuda"):
        strategy = sample.start(replace(start, device=device))
        steps = [strategy.choose(logits.to(device), torch.tensor(i)) for i in range(20)]
        chosen.append([int(choice.tokens[0]) for choice in steps])
    assert chosen[0] == chosen[1]


def test_heads_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(UsageError, match="heads of a multiple of 8 up to 256 elements"):
        kernels().cache(CacheShape(1, 1, 12), 16, "bf16")


def test_kernels_are_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))
    weight = random_qtensor("4 bits", (32, 32), 32)
    for _ in range(2):
        fresh = Cuda("cuda")
        fresh.linear(torch.ones(1, 32, device="cuda"), fresh.pack([weight]))
    kept = sorted(tmp_path.glob("cuda/*"))
    assert kept
    assert all(path.suffix == ".cubin" for path in kept)
    for path in kept:
        path.write_bytes(b"damaged")
    fresh = Cuda("cuda")
    fresh.linear(torch.ones(1, 32, device="cuda"), fresh.pack([weight]))


@pytest.mark.parametrize("n_new", [1, 30])
def test_what_is_queued_before_it_is_read_is_what_would_have_been_run(n_new: int) -> None:
    """Greedy, drawn and penalized; ended by a stop id, and by the caller."""
    engines = []
    for queues in (True, False):
        made = Cuda("cuda", torch.float32)
        made.queues = queues  # type: ignore[misc]
        engines.append(Engine(float_decoder(made), ctx_size=64))
    ways = (
        (Greedy(), {}),
        (Sample(temperature=1.5, top_k=20, top_p=0.9, seed=4), {}),
        (Greedy(repetition_penalty=1.4), {"stop_ids": frozenset(range(0, 80, 9))}),
        (Sample(temperature=1.2, seed=4), {"ends": lambda ids: len(ids) == 7}),
        (Beam(width=3), {}),
        (Greedy(), {"logprobs": 2}),
    )
    for way, settings in ways:
        ahead, plain = (
            list(engine.generate(IDS, way, max_new_tokens=n_new, **settings)) for engine in engines
        )
        assert [e.id for e in ahead if isinstance(e, Token)] == [
            e.id for e in plain if isinstance(e, Token)
        ]
        assert engines[0].held == engines[1].held


def test_weights_that_are_not_numbers_are_told_though_a_pass_is_queued() -> None:
    decoder = float_decoder(kernels())
    decoder.norm.weight.fill_(torch.nan)
    engine = Engine(decoder, ctx_size=64)
    for way in (Greedy(), Sample(seed=1)):
        with pytest.raises(DamagedFileError, match="not numbers"):
            list(engine.generate(IDS, way, max_new_tokens=4))
    torch.cuda.synchronize()


def test_a_prompt_in_many_passes_is_the_same_prompt() -> None:
    prompt = [(7 * i) % 80 for i in range(150)]
    whole, parts = (
        list(Engine(float_decoder(kernels()), ctx_size=192, chunk=chunk).generate(prompt, Greedy()))
        for chunk in (256, 24)
    )
    assert [e.id for e in whole if isinstance(e, Token)] == [
        e.id for e in parts if isinstance(e, Token)
    ]
