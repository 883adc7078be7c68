"""Bench: the conventions of llama-bench, on a clock that the tests wind; bytes counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Bytes

from llamachat import hardware
from llamachat.checkpoints import open_checkpoint
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, EngineEvent, Prefill, Token
from llamachat.engine.strategies import Greedy
from llamachat.errors import ModelNotFoundError, UsageError
from llamachat.hardware import Gpu
from llamachat.kernels.reference import Reference
from llamachat.measure import bench, rates
from llamachat.measure.plan import Setup, plan
from llamachat.model.decoder import Decoder, load_decoder

READ_S, STEP_S = 0.5, 0.25  # a prompt of any length; a token


@dataclass
class WoundEngine:
    """Takes `READ_S` for a prompt and `STEP_S` for every token; tells what it was asked."""

    slowness: Iterator[float]  # of each reply
    now_s: float = 0.0
    held: list[int] = field(default_factory=list)
    replies: list[tuple[int, int, int]] = field(default_factory=list)  # reused, read, written

    def clear(self) -> None:
        self.held = []

    def bytes_per_token(self, depth: int) -> int:
        return 1000 + depth

    def generate(
        self, ids: Sequence[int], decoding: Greedy, *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> Iterator[EngineEvent]:
        assert stop_ids == frozenset()
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.held, ids, strict=False))
        reused = min(len(list(same)), len(ids) - 1)
        self.replies.append((reused, len(ids) - reused, max_new_tokens))
        slowness = next(self.slowness)
        self.now_s += READ_S * slowness
        yield Prefill(len(ids), len(ids), reused)
        self.held = list(ids)
        for step in range(max_new_tokens):
            self.now_s += STEP_S * slowness if step else 0
            yield Token(7)
            self.held.append(7)
        yield Done("length")


Measure = Callable[..., "tuple[list[bench.Row], WoundEngine]"]


@pytest.fixture
def said() -> list[str]:
    """What the user was told."""
    return []


@pytest.fixture
def measure(said: list[str], tiny_llama: Callable[..., Path], monkeypatch: Any) -> Measure:
    """The rows of a plan over an engine whose n-th reply is as slow as the n-th factor says."""
    folder = tiny_llama()

    def measure(*slowness: float, **changes: Any) -> tuple[list[bench.Row], WoundEngine]:
        engine = WoundEngine(iter(slowness or [1.0] * 1000))

        def load(name: str, **options: Any) -> Any:
            options["notice"]("slow today")
            engine.now_s += 3
            return SimpleNamespace(
                name=name, engine=engine, tokenizer=Bytes(), threads=options["threads"] or 9,
                quantize=options["quantize"], backend="wound", ranks=options["tensor_parallel"],
                device={"auto": "cpu"}.get(options["device"], options["device"]),
                located=SimpleNamespace(path=folder),
            )  # fmt: skip

        monkeypatch.setattr(bench, "load", load)
        monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: engine.now_s))
        monkeypatch.setattr(bench, "read_bandwidth", lambda threads, device: 0.02 / threads)
        return list(bench.measure(plan(str(folder), **changes), notice=said.append)), engine

    return measure


def test_every_combination_is_planned_depth_by_depth() -> None:
    planned = plan(
        "a,b", quantize="auto,none", threads="1,2", n_prompt="5,6", n_gen="7", depth="0,8"
    )
    assert [test.name for test in planned.tests] == [
        "pp5", "pp6", "tg7", "pp5@d8", "pp6@d8", "tg7@d8",
    ]  # fmt: skip
    assert planned.setups == tuple(
        Setup(model, form, threads)
        for model in ("a", "b") for form in ("auto", "none") for threads in (1, 2)
    )  # fmt: skip
    assert planned.models == ("a", "b")
    assert planned.ctx_size == 15


def test_without_options_it_is_what_llama_bench_measures() -> None:
    planned = plan("m")
    assert [test.name for test in planned.tests] == ["pp512", "tg128"]
    assert planned.repetitions == 5


@pytest.mark.parametrize(("option", "left"), [("n_prompt", "tg128"), ("n_gen", "pp512")])
def test_a_count_of_zero_leaves_a_test_out(option: str, left: str) -> None:
    assert [test.name for test in plan("m", **{option: "0"}).tests] == [left]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_prompt": "x"}, {"n_prompt": "-1"}, {"n_gen": "1,,2"}, {"depth": ""}, {"threads": "0"},
        {"threads": "1.5"}, {"n_gen": "9" * 5000}, {"quantize": ","}, {"repetitions": 0},
        {"n_prompt": "0", "n_gen": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        plan("m", **wrong)


def test_each_repetition_after_the_warm_up_gives_a_sample(measure: Measure) -> None:
    rows, _ = measure(n_prompt="16", n_gen="5", repetitions=3)
    assert [(row.test, len(row.samples_ts)) for row in rows] == [("pp16", 3), ("tg5", 3)]


def test_mean_and_deviation_are_those_of_the_samples(measure: Measure) -> None:
    (row,), _ = measure(9, 1, 2, 4, n_prompt="16", n_gen="0", repetitions=3)
    assert row.samples_ts == (32, 16, 8)  # 16 tokens in 0.5, 1 and 2 s
    assert row.avg_ts == pytest.approx(56 / 3)
    assert row.stddev_ts == pytest.approx(12.220202)  # sqrt((177.8 + 7.1 + 113.8) / 2)


def test_a_single_sample_has_no_deviation(measure: Measure) -> None:
    (row,), _ = measure(n_prompt="16", n_gen="0", repetitions=1)
    assert row.stddev_ts == 0


def test_tokens_one_by_one_begin_with_one_that_is_read(measure: Measure) -> None:
    (row,), _ = measure(n_prompt="0", n_gen="5", repetitions=1)
    assert row.samples_ts == (5 / (READ_S + 4 * STEP_S),)
    assert row.ttft_s == READ_S


def test_a_prompt_is_timed_to_its_first_token(measure: Measure) -> None:
    (row,), _ = measure(n_prompt="16", n_gen="0", repetitions=2)
    assert row.ttft_s == READ_S
    assert row.samples_ts == (16 / READ_S, 16 / READ_S)


def test_without_depth_nothing_is_reused(measure: Measure) -> None:
    _, engine = measure(n_prompt="16", n_gen="5", repetitions=2)
    assert engine.replies == [(0, 16, 1)] * 3 + [(0, 1, 1)] + [(0, 1, 5)] * 2


def test_the_depth_is_held_before_each_repetition_and_is_not_timed(measure: Measure) -> None:
    rows, engine = measure(n_prompt="16", n_gen="5", depth="32", repetitions=2)
    timed = engine.replies[1::2]
    assert timed == [(32, 16, 1)] * 3 + [(32, 1, 1)] + [(32, 1, 5)] * 2
    assert rows[0].samples_ts == (16 / READ_S, 16 / READ_S)


def test_a_gpu_is_told_with_the_memory_that_was_taken_of_it(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tuple(Gpu(name, 2**36, (9, 0)) for name in ("slow", "fast"))
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    monkeypatch.setattr(bench, "peak_bytes", lambda gpu: 1000 + gpu)
    monkeypatch.setattr(bench, "reset_peak", lambda gpu: None)
    rows, _ = measure(n_prompt="5", n_gen="0", device="cuda:1")
    assert [(row.device, row.gpu, row.peak_bytes) for row in rows] == [("cuda:1", "fast", 1001)]


def test_a_model_is_loaded_for_each_number_of_threads(measure: Measure) -> None:
    rows, _ = measure(n_prompt="4", n_gen="0", threads="1,2", repetitions=1)
    assert [(row.threads, row.load_s) for row in rows] == [(1, 3), (2, 3)]


def test_what_every_load_says_is_told_once(measure: Measure, said: list[str]) -> None:
    measure(n_prompt="4", n_gen="0", threads="1,2", repetitions=1)
    assert said == ["slow today"]


def test_what_a_step_reads_is_set_beside_the_bandwidth(measure: Measure) -> None:
    rows, _ = measure(n_prompt="16", n_gen="5", depth="32", threads="2", repetitions=1)
    read, written = rows
    assert (read.bytes_per_token, read.gb_per_s, read.bandwidth_share) == (None, None, None)
    assert written.bytes_per_token == 1000 + 35  # its five steps see 33 to 37 tokens
    assert written.gb_per_s == pytest.approx(1035 * written.avg_ts / 1e9)
    assert written.bandwidth_gb_per_s == 0.01
    assert written.bandwidth_share == pytest.approx(written.gb_per_s / 0.01)


def test_a_test_that_needs_more_context_than_there_is_is_refused_first(measure: Measure) -> None:
    with pytest.raises(UsageError, match=r"tg128@d1000 fills 1128 .* has 1024"):
        measure(depth="0,1000", n_prompt="0")


def test_a_model_that_is_not_on_disk_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        next(bench.measure(plan(str(tmp_path / "none.gguf"))))


def test_a_real_engine_gives_all_of_it(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "BUFFER_BYTES", 2**20)
    asked = plan(
        str(tiny_llama()), n_prompt="40", n_gen="4", depth="0,300", repetitions=2, threads="1"
    )
    rows = list(bench.measure(asked))
    assert [row.test for row in rows] == ["pp40", "tg4", "pp40@d300", "tg4@d300"]
    for row in rows:
        assert min(row.samples_ts) > 0
        assert min(row.bandwidth_gb_per_s, row.load_s, row.ttft_s, row.peak_bytes) > 0
    shallow, deep = (row.bytes_per_token for row in rows if row.bytes_per_token)
    assert deep > shallow


# What a Reference in float32 reads of the tiny Llama of conftest.py: D 64, F 96, V 272, two layers
# of four heads and two key/value heads of 16.
LAYERS = 2 * ((4 + 2 + 2) * 16 * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96)
NORMS, HEAD, ROW = 5 * 64, 272 * 64, 64
SLOT = 2 * 2 * 2 * 16


@pytest.mark.parametrize(("tied", "embedding"), [(False, ROW), (True, 0)], ids=["untied", "tied"])
@pytest.mark.parametrize("depth", [0, 100])
def test_a_step_reads_every_weight_once_and_the_context(
    tiny_llama: Callable[..., Path], tied: bool, embedding: int, depth: int
) -> None:
    checkpoint = open_checkpoint(tiny_llama(tie_word_embeddings=tied))
    decoder = load_decoder(checkpoint.config, checkpoint.tensors(), Reference())
    values = LAYERS + NORMS + HEAD + embedding + depth * SLOT
    assert decoder.bytes_per_token(decoder.new_cache(128), depth) == 4 * values


@pytest.mark.parametrize(
    ("form", "slot_bytes"), [("f32", 4 * 64), ("bf16", 2 * 64), ("int8", 64 + 2 * 2 * 2 * 4)]
)
def test_context_is_counted_in_the_form_of_the_cache(
    random_decoder: Callable[..., Decoder], form: str, slot_bytes: int
) -> None:
    decoder = random_decoder()  # two layers of two key/value heads of 8
    cache = decoder.new_cache(32, form)
    shallow, deep = (decoder.bytes_per_token(cache, depth) for depth in (10, 11))
    assert deep - shallow == slot_bytes


def test_a_cleared_engine_reads_its_prompt_again(random_decoder: Callable[..., Decoder]) -> None:
    engine = Engine(random_decoder(), ctx_size=32)
    first = list(engine.generate([1, 2, 3], Greedy(), max_new_tokens=2))
    engine.clear()
    assert engine.held == ()
    assert list(engine.generate([1, 2, 3], Greedy(), max_new_tokens=2)) == first
