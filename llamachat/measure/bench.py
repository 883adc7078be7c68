"""Speed by llama-bench's conventions, beside the bandwidth that bounds it."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import llamachat
from llamachat import hardware
from llamachat.checkpoints import open_checkpoint
from llamachat.engine.engine import Engine
from llamachat.engine.events import EngineEvent, Token
from llamachat.engine.strategies import Greedy
from llamachat.errors import UsageError
from llamachat.kernels.backends import gpu_of
from llamachat.library.store import require
from llamachat.loading import Model, load
from llamachat.loading.device import peak_bytes, reset_peak
from llamachat.measure.plan import Plan, Setup, Workload
from llamachat.measure.rates import GIGA, read_bandwidth

SEED = 1  # of the tokens that are read


@dataclass(frozen=True, slots=True)
class Row:
    """What one test gave.

    Attributes:
        model: as it was asked for.
        form: how most weights are stored in its file.
        quantize: how they are run.
        backend: what computed it.
        threads: CPU threads.
        tensor_parallel: processes that share the model; bytes are those of the first one's part.
        test: its name, such as "tg128@d2048".
        avg_ts: tokens a second, the mean of `samples_ts`.
        stddev_ts: their standard deviation (of a sample); 0 for a single one.
        samples_ts: of each repetition.
        bytes_per_token: of "tg": what a step reads of memory, at the mean depth of its steps.
        gb_per_s: of "tg": `bytes_per_token * avg_ts`.
        bandwidth_gb_per_s: what as many threads read at most, measured after the test.
        bandwidth_share: `gb_per_s / bandwidth_gb_per_s`.
        load_s: to load the model, torch being imported already.
        ttft_s: from handing over the tokens that are timed to the first token of the reply, on
            average: of "pp" that of such a prompt, of "tg" that of a single token.
        peak_bytes: the most memory resident so far since loading began; where a system cannot
            tell, since the process began. On a GPU the most that was taken of its memory.
        device: "cpu" or "cuda:N".
        cpu: its name.
        gpu: the name of the GPU, or None.
        version: of llamachat.
    """

    model: str
    form: str
    quantize: str
    backend: str
    threads: int
    tensor_parallel: int
    test: str
    avg_ts: float
    stddev_ts: float
    samples_ts: tuple[float, ...]
    bytes_per_token: int | None
    gb_per_s: float | None
    bandwidth_gb_per_s: float
    bandwidth_share: float | None
    load_s: float
    ttft_s: float
    peak_bytes: int
    device: str
    cpu: str
    gpu: str | None
    version: str


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from handing over a test's tokens to its first token, and to its last one."""

    first_s: float
    last_s: float


def measure(
    plan: Plan,
    *,
    force: bool = False,
    status: Callable[[str], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Measure test after test; each row comes when its test is done.

    Args:
        plan: what to measure.
        force: load what is forecast not to fit in memory, too.
        status: told what is going on.
        notice: told what the user should know, each thing once.

    Raises:
        ModelNotFoundError: a model is not on disk.
        LlamachatError: it cannot be loaded.
        UsageError: a test needs more context than the model has.
    """
    for model in plan.models:
        _check_context(model, plan)
    once = cache(notice)  # each setup would say the same
    for setup in plan.setups:
        yield from _measured(setup, plan, status, once, force=force)


def _check_context(model: str, plan: Plan) -> None:
    limit = open_checkpoint(require(model).path).config.max_seq_len
    for test in plan.tests:
        if test.depth + test.n > limit:
            raise UsageError(
                f"{test.name} fills {test.depth + test.n} tokens of context, {model} has {limit}"
            )


def _measured(
    setup: Setup,
    plan: Plan,
    status: Callable[[str], None],
    notice: Callable[[str], None],
    *,
    force: bool,
) -> Iterator[Row]:
    """The rows of one load. The model is gone when they are over."""
    status(f"{setup.model}: loading")
    began = time.perf_counter()
    model = load(
        setup.model,
        quantize=setup.quantize,
        threads=setup.threads,
        device=plan.device,
        tensor_parallel=plan.tensor_parallel,
        ctx_size=plan.ctx_size,
        force=force,
        notice=notice,
    )
    load_s = time.perf_counter() - began
    peak, gpu = 0, gpu_of(model.device)
    for test in plan.tests:
        times = list(_repeated(model, test, plan.repetitions, status))
        peak = max(peak, peak_bytes(gpu))
        status(f"{setup.model}: memory bandwidth")
        bandwidth = read_bandwidth(model.threads, model.device)
        reset_peak(gpu)  # what was read is no part of the model
        yield _row(model, test, times, bandwidth, load_s=load_s, peak_bytes=peak)


def _repeated(
    model: Model, test: Workload, repetitions: int, status: Callable[[str], None]
) -> Iterator[Times]:
    """The times of each repetition, after one that is not counted."""
    title = f"{model.name}, threads {model.threads}: {test.name}"
    status(f"{title}, warming up")
    _timed(model, test if test.kind == "pp" else replace(test, n=1))
    for repetition in range(repetitions):
        status(f"{title}, {repetition + 1} of {repetitions}")
        yield _timed(model, test)


def _timed(model: Model, test: Workload) -> Times:
    """Time a test from the state that it begins in: `test.depth` tokens are held, no more."""
    engine, reads = model.engine, test.n if test.kind == "pp" else 1
    ids = _some_ids(model, test.depth + reads)
    if test.depth:
        deque(_reply(engine, ids[: test.depth], 1), maxlen=0)
    else:
        engine.clear()
    began = time.perf_counter()
    moments = [
        time.perf_counter() - began
        for event in _reply(engine, ids, 1 if test.kind == "pp" else test.n)
        if isinstance(event, Token)
    ]
    return Times(moments[0], moments[-1])


def _reply(engine: Engine, ids: Sequence[int], n: int) -> Iterator[EngineEvent]:
    return engine.generate(ids, Greedy(), max_new_tokens=n, stop_ids=frozenset())


def _some_ids(model: Model, n: int) -> list[int]:
    """The first n of a random text, always the same; BOS comes first where the model wants it."""
    tokenizer, draw = model.tokenizer, random.Random(SEED)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(n)]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        ids[0] = tokenizer.bos_id
    return ids


def _row(
    model: Model,
    test: Workload,
    times: Sequence[Times],
    bandwidth: float,
    *,
    load_s: float,
    peak_bytes: int,
) -> Row:
    samples = tuple(test.n / time.last_s for time in times)
    average, gpu = statistics.fmean(samples), gpu_of(model.device)
    n_bytes = gb_per_s = None
    if test.kind == "tg":  # its steps see depth + 1 to depth + n tokens
        n_bytes = model.engine.bytes_per_token(test.depth + (test.n + 1) // 2)
        gb_per_s = n_bytes * average / GIGA
    return Row(
        model=model.name,
        form=open_checkpoint(model.located.path).form,
        quantize=model.quantize,
        backend=model.backend,
        threads=model.threads,
        tensor_parallel=model.ranks,
        test=test.name,
        avg_ts=average,
        stddev_ts=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        samples_ts=samples,
        bytes_per_token=n_bytes,
        gb_per_s=gb_per_s,
        bandwidth_gb_per_s=bandwidth,
        bandwidth_share=None if gb_per_s is None else gb_per_s / bandwidth,
        load_s=load_s,
        ttft_s=statistics.fmean(time.first_s for time in times),
        peak_bytes=peak_bytes,
        device=model.device,
        cpu=hardware.cpu_name(),
        gpu=None if gpu is None else hardware.gpus()[gpu].name,
        version=llamachat.__version__,
    )
