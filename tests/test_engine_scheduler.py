"""Replies that join and leave a running batch: each is what it is alone, and none waits long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, Prefill, Token
from llamachat.engine.pool import PAGE
from llamachat.engine.scheduler import Failed, Job, Request, Scheduler, Told
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import DamagedFileError, PromptTooLongError, UsageError
from llamachat.model.decoder import Decoder

CTX, CHUNK, PARALLEL = 400, 32, 6
STOP_IDS = frozenset(range(0, 64, 9))
DECODINGS: tuple[Decoding, ...] = (
    Greedy(),
    Greedy(repetition_penalty=1.5),
    Sample(temperature=1.2, top_p=0.95, seed=5),
    Sample(temperature=1.0, top_k=20, top_p=1.0, seed=6),
    Beam(width=4, length_penalty=0.5),
    Beam(width=3, sampling=Sample(temperature=1.5, top_p=1.0, seed=8)),
)


def prompt(n: int, seed: int = 1) -> tuple[int, ...]:
    return tuple((seed * 13 + 7 * i * i + 3 * i) % 64 for i in range(n))


@pytest.fixture
def engine(exact_decoder: Decoder) -> Engine:
    return Engine(exact_decoder, ctx_size=CTX, stop_ids=STOP_IDS, chunk=CHUNK)


@pytest.fixture
def scheduler(engine: Engine) -> Scheduler:
    return Scheduler(engine, parallel=PARALLEL)


def alone(engine: Engine, request: Request, i: int = 0) -> tuple[list[int], str]:
    engine.clear()
    events = engine.generate(
        request.ids,
        request.decodings[i],
        max_new_tokens=request.max_new_tokens,
        stop_ids=request.stop_ids,
        turn=request.turn,
        attempt=i,
    )
    return said(list(events))


def said(events: Sequence[object]) -> tuple[list[int], str]:
    done = [event.finish_reason for event in events if isinstance(event, Done)]
    return [event.id for event in events if isinstance(event, Token)], *done  # type: ignore[return-value]


def run(scheduler: Scheduler, steps: int = 10_000) -> list[Told]:
    told: list[Told] = []
    while not scheduler.is_idle and steps:
        told += scheduler.step()
        steps -= 1
    return told


def of(told: Sequence[Told], job: Job, i: int = 0) -> tuple[list[int], str]:
    return said([event for one, n, event in told if one is job and n == i])


def test_replies_that_join_at_any_time_are_what_they_are_alone(
    engine: Engine, scheduler: Scheduler
) -> None:
    requests = [
        Request(prompt(length, seed), (decoding,), max_new_tokens=25, turn=seed)
        for seed, (length, decoding) in enumerate(
            zip((40, 7, 150, 33, 64, 1), DECODINGS, strict=True)
        )
    ]
    told, jobs = [], []
    for request in requests:
        jobs.append(scheduler.submit(request))
        told += run(scheduler, 3)
    told += run(scheduler)
    lengths = set()
    for request, job in zip(requests, jobs, strict=True):
        assert of(told, job) == alone(engine, request)
        lengths.add(len(of(told, job)[0]))
    assert len(lengths) > 2


def test_several_replies_to_one_prompt_read_it_once(
    engine: Engine, scheduler: Scheduler, passes: list[int]
) -> None:
    request = Request(prompt(60), DECODINGS[:4], max_new_tokens=12, stop_ids=frozenset())
    job = scheduler.submit(request)
    told = run(scheduler)
    assert sum(passes) == 60 + 4 * 11
    for i in range(4):
        assert of(told, job, i) == alone(engine, request, i)


def test_a_prompt_that_begins_like_one_before_runs_only_what_is_new(
    engine: Engine, scheduler: Scheduler
) -> None:
    first = Request(prompt(200), (Greedy(),), max_new_tokens=8, stop_ids=frozenset())
    job = scheduler.submit(first)
    ids, _ = of(run(scheduler), job)
    second = Request((*first.ids, *ids[:5], 3, 1, 4), (Greedy(),), max_new_tokens=20)
    third = Request((*first.ids[:150], 60, 61), (Greedy(),), max_new_tokens=20)
    for request, reused in ((second, 205), (third, 150), (second, 207)):
        job = scheduler.submit(request)
        told = run(scheduler)
        assert Prefill(0, len(request.ids) - reused, reused) in [event for _, _, event in told]
        assert of(told, job) == alone(engine, request)


def test_a_long_prompt_does_not_hold_up_replies(scheduler: Scheduler, passes: list[int]) -> None:
    """It is read a few tokens at a time; alone, in whole chunks."""
    talking = scheduler.submit(Request(prompt(5), (Greedy(),), stop_ids=frozenset()))
    run(scheduler, 3)
    passes.clear()
    scheduler.submit(Request(prompt(300, 2), (Greedy(),), max_new_tokens=1))
    told = run(scheduler, 10)
    assert max(passes) == 1 + CHUNK // 4
    assert len(of(told, talking)[0]) == 10
    scheduler.cancel(talking)
    run(scheduler, 1)
    assert passes[-1] == CHUNK


def test_a_short_prompt_does_not_wait_for_a_long_one(scheduler: Scheduler) -> None:
    scheduler.submit(Request(prompt(390), (Greedy(),), max_new_tokens=1))
    run(scheduler, 1)
    short = scheduler.submit(Request(prompt(20, 3), (Greedy(),), stop_ids=frozenset()))
    told = run(scheduler, 3)
    assert any(job is short and isinstance(event, Token) for job, _, event in told)


def test_what_exceeds_the_rows_waits_its_turn(scheduler: Scheduler) -> None:
    many = [Request(prompt(4, n), (Greedy(),) * 4, max_new_tokens=3) for n in range(3)]
    jobs = [scheduler.submit(request) for request in many]
    scheduler.step()
    assert (scheduler.running, list(scheduler.waiting)) == (jobs[:1], jobs[1:])
    told = run(scheduler)
    ends = [job for job, _, event in told if isinstance(event, Done)]
    assert ends == [job for job in jobs for _ in range(4)]


def test_what_exceeds_the_slots_waits_and_is_what_it_is_alone(engine: Engine) -> None:
    scheduler = Scheduler(engine, parallel=4, slots=6 * PAGE)
    requests = [
        Request(prompt(200, n), (Sample(seed=n, temperature=1.5),), max_new_tokens=150)
        for n in range(5)
    ]
    jobs = [scheduler.submit(request) for request in requests]
    scheduler.step()
    assert scheduler.waiting
    told = run(scheduler)
    for request, job in zip(requests, jobs, strict=True):
        assert of(told, job) == alone(engine, request)


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_request_that_is_cancelled_gives_its_rows_back_at_once(
    scheduler: Scheduler, steps: int
) -> None:
    """Waiting, while its prompt is read, and while it is answered."""
    job = scheduler.submit(Request(prompt(100), (Greedy(), Beam(width=4)), stop_ids=frozenset()))
    run(scheduler, steps)
    scheduler.cancel(job)
    assert scheduler.n_rows == 0
    assert scheduler.is_idle
    full = scheduler.submit(Request(prompt(9), (Greedy(),) * PARALLEL, max_new_tokens=2))
    told = run(scheduler)
    assert {one for one, _, _ in told} == {full}


def test_a_cache_full_of_texts_that_ended_makes_room(engine: Engine) -> None:
    scheduler = Scheduler(engine, parallel=2)
    for n in range(30):
        request = Request(prompt(150, n), (Greedy(),), max_new_tokens=4)
        job = scheduler.submit(request)
        assert of(run(scheduler), job) == alone(engine, request)


def test_a_seed_of_ones_own_gives_each_reply_draws_of_its_own(scheduler: Scheduler) -> None:
    request = Request(prompt(9), (Sample(temperature=2.0, top_p=1.0, seed=3),) * 3, 12)
    first, again = scheduler.submit(request), scheduler.submit(request)
    told = run(scheduler)
    texts = [tuple(of(told, first, i)[0]) for i in range(3)]
    assert len(set(texts)) == 3
    assert texts == [tuple(of(told, again, i)[0]) for i in range(3)]


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request((), (Greedy(),)), UsageError, "no tokens"),
        (Request((64,), (Greedy(),)), UsageError, "0 to 63"),
        (Request(prompt(CTX + 1), (Greedy(),)), PromptTooLongError, f"{CTX + 1} tokens"),
        (Request(prompt(3), (Greedy(),) * 7), UsageError, "7 rows"),
        (Request(prompt(3), (Beam(width=7),)), UsageError, "7 rows"),
        (Request(prompt(3), (Greedy(),), logprobs=21), UsageError, "0 to 20"),
        (Request(prompt(3), (Beam(width=2),), logprobs=1), UsageError, "contradict"),
    ],
)
def test_what_can_never_be_answered_is_refused(
    scheduler: Scheduler, request_: Request, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        scheduler.check(request_)


def test_a_failing_pass_ends_what_runs_and_nothing_else(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    running = scheduler.submit(Request(prompt(5), (Greedy(),), stop_ids=frozenset()))
    run(scheduler, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", _out_of_memory)
        ((job, _, event),) = scheduler.step()
    assert (job, type(event)) == (running, Failed)
    request = Request(prompt(12), (Greedy(),), max_new_tokens=5)
    later = scheduler.submit(request)
    assert of(run(scheduler), later) == alone(engine, request)


def _out_of_memory(*_: object) -> torch.Tensor:
    raise MemoryError


def test_damaged_weights_fail_a_request_by_name(
    random_decoder: Callable[..., Decoder], exact_decoder: Decoder
) -> None:
    damaged = random_decoder(exact_decoder.kernels, damaged="model.norm.weight")
    scheduler = Scheduler(Engine(damaged, ctx_size=CTX), parallel=2)
    scheduler.submit(Request(prompt(5), (Greedy(),)))
    failed = run(scheduler)[-1][2]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DamagedFileError)
    assert scheduler.is_idle
