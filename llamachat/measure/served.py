"""Speed of a server, by the tests of llama-bench, as one client meets it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llamachat import __version__
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import Server
from llamachat.chat.templates import Message, encode
from llamachat.engine.events import Done, Token, Usage
from llamachat.engine.strategies import Greedy
from llamachat.errors import TransferError
from llamachat.measure.plan import Plan, Workload

_WORDS = ("river", "stone", "green", "seven", "paper", "light", "house", "north", "glass", "music")
_TASK = "\nWrite a very long story about these words."
_UNENDING = {"ignore_eos": True}
_WARM_UP = 64  # words of the prompt that tells how many tokens a word is


@dataclass(frozen=True, slots=True)
class ServedRow:
    """What one test gave.

    Attributes:
        model: as the server calls it.
        server: its kind.
        endpoint: where it is.
        test: its name, such as "tg128@d2048".
        prompt_tokens: what the server counted of the prompt, on average.
        avg_ts: tokens a second, the mean of `samples_ts`: of "pp" those of the prompt until the
            first text, of "tg" those of the reply after it.
        stddev_ts: their standard deviation (of a sample); 0 for a single one.
        samples_ts: of each repetition.
        ttft_s: from asking to the first text, on average.
        version: of llamachat.
    """

    model: str
    server: str
    endpoint: str
    test: str
    prompt_tokens: int
    avg_ts: float
    stddev_ts: float
    samples_ts: tuple[float, ...]
    ttft_s: float
    version: str


@dataclass(frozen=True, slots=True)
class _Sample:
    """One reply: seconds to its first and last text, and what the server counted."""

    first_s: float
    last_s: float
    usage: Usage


def measure_server(
    server: Server, plan: Plan, *, status: Callable[[str], None] = lambda _: None
) -> Iterator[ServedRow]:
    """Measure test after test; each row comes when its test is done. Prompts are never the same.

    Raises:
        TransferError: the server does not count tokens, or says too little.
        LlamachatError: see `Remote.generate`.
    """
    draw = random.Random()
    status(f"{server.name}: warming up")
    per_word = _asked(server, _words(draw, _WARM_UP), 1).usage.prompt / _WARM_UP
    for test in plan.tests:
        samples = []
        for repetition in range(plan.repetitions):
            status(f"{server.name}: {test.name}, {repetition + 1} of {plan.repetitions}")
            tokens = test.depth + (test.n if test.kind == "pp" else 0)
            words = _words(draw, max(1, round(tokens / per_word)))
            samples.append(_asked(server, words, 1 if test.kind == "pp" else test.n))
        yield _row(server, test, samples)


def _asked(server: Server, words: str, n: int) -> _Sample:
    """Have n tokens said about words."""
    ids = encode(AsMessages().segments([Message("user", words + _TASK)]), server.tokenizer)
    began = time.perf_counter()
    moments, usage = [], None
    unending = replace(server.engine, fields=_UNENDING if server.dialect.ignores_ends else {})
    for event in unending.generate(ids, Greedy(), max_new_tokens=n):
        if isinstance(event, Token):
            moments.append(time.perf_counter() - began)
        elif isinstance(event, Done):
            usage = event.usage
            if event.problem is not None:
                raise event.problem
    if usage is None or not moments:
        raise TransferError(f"{server.endpoint.url}: the server said nothing, or not how much")
    return _Sample(moments[0], moments[-1], usage)


def _words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(_WORDS, k=n))


def _row(server: Server, test: Workload, samples: Sequence[_Sample]) -> ServedRow:
    rates = tuple(_rate(test, sample) for sample in samples)
    return ServedRow(
        model=server.name,
        server=server.dialect.name,
        endpoint=server.endpoint.url,
        test=test.name,
        prompt_tokens=round(statistics.fmean(it.usage.prompt for it in samples)),
        avg_ts=statistics.fmean(rates),
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples_ts=rates,
        ttft_s=statistics.fmean(it.first_s for it in samples),
        version=__version__,
    )


def _rate(test: Workload, sample: _Sample) -> float:
    if test.kind == "pp":
        return sample.usage.prompt / sample.first_s
    seconds = sample.last_s - sample.first_s
    if seconds <= 0 or sample.usage.reply < 2:
        raise TransferError(f"{test.name}: the reply came at once, or had a single token")
    return (sample.usage.reply - 1) / seconds
