"""Loading to an NVIDIA GPU and running there, beside the CPU; on a machine with one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from quantized import random_qtensor
from torch import Tensor

import llamachat
from llamachat.architecture import ModelConfig
from llamachat.checkpoints.blocks import read_blocks
from llamachat.checkpoints.gguf_types import BLOCK_TYPES
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.engine import Engine
from llamachat.engine.events import Token
from llamachat.errors import UsageError, WillNotFitError
from llamachat.kernels import Kernels
from llamachat.kernels.backends import choose, make
from llamachat.kernels.cuda import Cuda
from llamachat.kernels.cuda.staging import BUFFER_BYTES
from llamachat.kernels.reference import Reference
from llamachat.measure import bench
from llamachat.measure.doctor import examine
from llamachat.measure.plan import plan
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.quant.form import Form, FormName
from llamachat.quant.quantize import quantize
from llamachat.quant.tensor import QTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not find_spec("cuda"), reason="no NVIDIA GPU here"
    ),
]

QUANTIZED = [kind for kind in BLOCK_TYPES.values() if kind.is_quantized]
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="not installed")


@cache
def kernels() -> Cuda:
    return Cuda("cuda:0", torch.float32)


@pytest.fixture(scope="module")
def story() -> Path:
    if not (named := os.environ.get("LLAMACHAT_TEST_DATA")):
        pytest.skip("LLAMACHAT_TEST_DATA is not set")
    return Path(named) / "models" / "stories260K" / "stories260K.gguf"


def off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "n_bytes", [1, 70_001, BUFFER_BYTES, 2 * BUFFER_BYTES + 1, 5 * BUFFER_BYTES - 3]
)
def test_tensors_of_any_size_arrive_whole_whatever_becomes_of_their_source(n_bytes: int) -> None:
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
    expected = source.clone()
    placed = kernels().place(source)
    source.zero_()
    assert torch.equal(placed.cpu(), expected)


def test_columns_of_a_matrix_arrive_in_order() -> None:
    source = torch.randn(300, 500, dtype=torch.bfloat16).T
    assert torch.equal(kernels().place(source).cpu(), source)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_blocks_are_taken_apart_on_the_gpu_as_on_the_cpu(kind: object) -> None:
    from llamachat.checkpoints.gguf_types import BlockType

    assert isinstance(kind, BlockType)
    raw = torch.randint(0, 256, (kind.n_bytes(70 * 512),), dtype=torch.uint8)
    view = memoryview(raw.numpy().tobytes())
    found, expected = (
        read_blocks(view, kind, (70, 512), place) for place in (kernels().place, lambda raw: raw)
    )
    assert isinstance(found, QTensor)
    assert isinstance(expected, QTensor)
    assert found.codes.device.type == "cuda"
    assert torch.equal(found.codes.cpu(), expected.codes)
    for ours, theirs in ((found.scales, expected.scales), (found.mins, expected.mins)):
        if ours is not None and theirs is not None:
            assert torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form", [Form("int8"), Form("int4"), Form("int8", 256), Form("int8", 192), Form("int4", 64)],
    ids=lambda form: f"{form.name}-g{form.group_size}",
)  # fmt: skip
def test_quantizing_on_the_gpu_gives_the_cpu_s_codes_but_for_ties(
    form: Form, dtype: torch.dtype
) -> None:
    """Sums in another order choose another one of two scales that are as good."""
    weight = torch.randn(513, 4 * form.group_size).to(dtype)
    found, expected = kernels().quantize(weight, form), quantize(weight, form)
    codes = found.codes.cpu().view(*expected.scales.shape, -1) == expected.codes.view(
        *expected.scales.shape, -1
    )
    is_same = found.scales.cpu() == expected.scales
    assert is_same.double().mean() > 0.85
    assert codes[is_same].all()
    assert off(found.dequantize(), weight) < off(expected.dequantize(), weight) * 1.0001


@pytest.mark.parametrize("form", ["int8", "int4", "none"])
def test_a_model_is_quantized_on_the_gpu_as_on_the_cpu(story: Path, form: str) -> None:
    ids = [1, 403, 407, 261, 378]
    found, expected = (
        llamachat.load(story, device=device, quantize=form, backend=backend).logits(ids)
        for device, backend in (("cuda", "auto"), ("cpu", "reference"))
    )
    assert off(found, expected) < {"int8": 0.03, "int4": 0.05, "none": 0.02}[form]


def test_loading_takes_little_beside_weights_and_context(story: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = llamachat.load(story, device="cuda", ctx_size=256)
    list(model.generate([1], llamachat.Greedy(), max_new_tokens=4, stop_ids=()))
    beside = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    assert beside < 2**30


def all_that_is_left(n_bytes: int) -> list[Tensor]:
    """In pieces of such a size."""
    held = []
    with suppress(torch.OutOfMemoryError):
        while True:
            held.append(torch.empty(n_bytes, dtype=torch.uint8, device="cuda"))
    return held


def test_without_memory_loading_says_what_it_needs_and_what_there_is(story: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    held = [*all_that_is_left(2**20), *all_that_is_left(2**12)]
    try:
        with pytest.raises(WillNotFitError, match=r"out of memory: needs .* are free on cuda:0"):
            llamachat.load(story, device="cuda", force=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()


def test_a_gpu_that_is_not_there_is_refused() -> None:
    n = torch.cuda.device_count()
    with pytest.raises(UsageError, match=f"there is no GPU {n}, the last one is {n - 1}"):
        choose(device=f"cuda:{n}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_runs_on_the_second_gpu(story: Path) -> None:
    first, second = (llamachat.load(story, device=f"cuda:{i}", ctx_size=128) for i in range(2))
    assert second.device == "cuda:1"
    replies = [
        list(model.generate([1], llamachat.Greedy(), max_new_tokens=40, stop_ids=()))
        for model in (first, second)
    ]
    assert replies[0] == replies[1]


def test_kernels_are_compiled_once_before_the_first_token_and_that_is_said(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    first = llamachat.load(story, device="cuda", dtype="float32", notice=said.append)
    kept = set(tmp_path.glob("cuda/*.cubin"))
    assert f"compiling kernels for {torch.cuda.get_device_name()}, once: 0/{len(kept)}" in said
    replies = [list(islice(first.generate([1], llamachat.Greedy(), stop_ids=()), 20))]
    assert set(tmp_path.glob("cuda/*.cubin")) == kept  # nothing is left for the first question
    said.clear()
    again = llamachat.load(story, device="cuda", dtype="float32", notice=said.append)
    replies += [list(islice(again.generate([1], llamachat.Greedy(), stop_ids=()), 20))]
    assert not [line for line in said if "compiling" in line]
    assert replies[0] == replies[1]


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
def test_bitsandbytes_quantizes_on_the_gpu_as_on_the_cpu(name: FormName) -> None:
    weight = torch.randn(96, 256)
    found = kernels().quantize(weight, Form(name))
    expected = Reference().quantize(weight, Form(name))
    assert found.codes.device.type == "cuda"
    assert off(found.dequantize(), expected.dequantize()) < 5e-3  # of codes at bounds


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_its_own_modules_and_our_kernels_give_one_product(name: FormName, n_tokens: int) -> None:
    theirs = make(choose("bitsandbytes", "cuda:0"), 1, torch.bfloat16)
    weight, x = torch.randn(256, 512), torch.randn(n_tokens, 512)
    coded = kernels().quantize(weight, Form(name))
    found = [k.linear(x.cuda(), k.pack([coded])) for k in (kernels(), theirs)]
    expected = x.double() @ coded.dequantize().cpu().double().T
    assert off(found[0], expected) < 1e-2
    assert off(found[1], expected) < 1.5e-2


def test_bench_sweeps_depths_and_tells_of_the_gpu(story: Path) -> None:
    asked = plan(str(story), n_prompt="32", n_gen="8", depth="0,64", repetitions=2, device="cuda")
    rows = list(bench.measure(asked))
    assert [row.test for row in rows] == ["pp32", "tg8", "pp32@d64", "tg8@d64"]
    assert {(row.backend, row.device) for row in rows} == {("cuda", "cuda:0")}
    assert {row.gpu for row in rows} == {torch.cuda.get_device_name()}
    assert all(0 < row.peak_bytes < 2**30 and row.avg_ts > 0 for row in rows)


def test_doctor_measures_the_gpu_beside_its_limit() -> None:
    findings = examine()
    assert (findings["backend"], findings["device"]) == ("cuda", "cuda:0")
    assert findings["gpu_driver"]
    assert 0.5 < findings["measured"]["bandwidth_share"] < 1.05
    assert "shipped" in findings["kernel_table"]


# A float model of SmolLM2-135M's shape.
SMOL = ModelConfig(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=49152,
    norm_eps=1e-5, rope_theta=1e5, max_seq_len=8192, tied=True,
)  # fmt: skip
# Sums of n products err by sqrt(n) 2^-24 on average where roundings are random, seven of them in
# each of 30 layers; later layers make of that ten times as much at most.
TOLERANCE = 10 * math.sqrt(30 * 7) * math.sqrt(1536) * 2**-24


def smol(k: Kernels) -> Decoder:
    def weights() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        for weight in iter_weights(SMOL):
            is_norm = len(weight.shape) == 1
            values = torch.randn(weight.shape, generator=generator)
            yield weight.hf, 1 + values / 10 if is_norm else values / math.sqrt(weight.shape[1])

    return load_decoder(SMOL, weights(), k)


@cache
def smols() -> tuple[Engine, Engine]:
    made = (smol(k) for k in (kernels(), Reference()))
    gpu, cpu = (Engine(decoder, ctx_size=256, kv_cache="f32") for decoder in made)
    return gpu, cpu


def test_twenty_prompts_get_the_logits_of_the_cpu() -> None:
    gpu, cpu = smols()
    generator = torch.Generator().manual_seed(2)
    for n in range(5, 45, 2):  # of both kinds of pass
        ids = torch.randint(0, SMOL.vocab_size, (n,), generator=generator).tolist()
        found, expected = gpu.logits(ids).cpu(), cpu.logits(ids)
        assert off(found, expected) < TOLERANCE
        best = expected.topk(2).values
        is_clear = best[:, 0] - best[:, 1] > 1e-2
        assert torch.equal(found.argmax(1)[is_clear], expected.argmax(1)[is_clear])


def test_recorded_steps_choose_the_ids_of_unrecorded_ones() -> None:
    gpu, _ = smols()
    replies = []
    for is_recorded in (True, False):
        gpu.clear()
        reply = []
        events = gpu.generate(
            [5, 9, 17], llamachat.Greedy(), max_new_tokens=40, stop_ids=frozenset()
        )
        for event in events:
            if not is_recorded:
                gpu._cache.passes.clear()
            if isinstance(event, Token):
                reply.append(event.id)
        replies.append(reply)
    assert replies[0] == replies[1]


def test_a_part_on_the_gpu_and_one_on_the_host_make_one_weight() -> None:
    parts = [random_qtensor("shifted", (64, 96), 32, seed=seed) for seed in range(2)]
    placed = [kernels().place(parts[0].codes), kernels().place(parts[0].scales)]
    mixed = [QTensor(placed[0], placed[1], 4, 32, None, parts[0].codebook, parts[0].shifts)]
    x = torch.randn(3, 96).cuda()
    found, expected = (
        kernels().linear(x, kernels().pack(it)) for it in ([*mixed, parts[1]], parts)
    )
    assert torch.equal(found, expected)
