"""Where a backend queues passes, the next one begins before the host knows its token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Any

import pytest
from torch import Tensor

from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import EngineEvent, Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import DamagedFileError
from llamachat.kernels import Batch, Cache
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import Decoder

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41]
WAYS: dict[str, tuple[Decoding, dict[str, Any]]] = {
    "greedy": (Greedy(), {}),
    "penalized": (Greedy(repetition_penalty=1.5, no_repeat_ngram_size=2), {}),
    "sampled": (Sample(temperature=1.5, top_k=20, top_p=0.9, seed=5), {}),
    "continued": (Sample(temperature=1.5, seed=6), {"continued": 3}),
    "with probabilities": (Greedy(), {"logprobs": 3}),
    "drafted": (Greedy(), {"draft": 4}),
    "until it loops": (Greedy(), {"stop_loops": 2}),
    "beams": (Beam(width=3), {}),
}


class Queueing(Reference):
    """It takes ids that are on the way; `log` has what was run."""

    queues = True

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        self.log.append("pass")
        return super().run(forward, batch, cache)


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def decoders(random_decoder: Callable[..., Decoder], log: list[str]) -> tuple[Decoder, Decoder]:
    return random_decoder(Queueing(log)), random_decoder()


@pytest.fixture
def engines(decoders: tuple[Decoder, Decoder], log: list[str]) -> list[Engine]:
    """One that queues, and one that does not."""
    log.clear()
    return [Engine(decoder, ctx_size=48) for decoder in decoders]


def ids_of(engine: Engine, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[int]:
    events = engine.generate(prompt, Greedy(), **settings)
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 12])
def test_a_reply_is_the_same(engines: list[Engine], way: str, n: int | None) -> None:
    decoding, settings = WAYS[way]
    ahead, plain = (
        list(e.generate(PROMPT, decoding, max_new_tokens=n, **settings)) for e in engines
    )
    assert ahead == plain
    assert engines[0].held == engines[1].held


def test_a_pass_is_queued_before_its_token_is_read(engines: list[Engine], log: list[str]) -> None:
    ids_of(engines[0], max_new_tokens=3, ends=lambda ids: log.append(f"read {len(ids)}"))
    assert log == ["pass", "pass", "read 1", "pass", "read 2", "read 3"]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_what_was_run_beyond_a_stop_id_is_not_held(engines: list[Engine], n: int) -> None:
    stop = ids_of(engines[1], max_new_tokens=n)[-1]
    for engine in engines:
        engine.clear()
    ahead, plain = (ids_of(e, max_new_tokens=9, stop_ids=frozenset({stop})) for e in engines)
    assert ahead == plain
    assert engines[0].held == engines[1].held
    longer = [*PROMPT, *plain, 1, 2]
    assert ids_of(engines[0], longer) == ids_of(engines[1], longer)


@pytest.mark.parametrize("n", [1, 3])
def test_what_was_run_beyond_a_reply_that_is_closed_is_not_held(
    engines: list[Engine], n: int
) -> None:
    for engine in engines:
        events = engine.generate(PROMPT, Greedy())
        list(islice(events, n))
        events.close()
    assert engines[0].held == engines[1].held
    assert ids_of(engines[0], PROMPT[:5]) == ids_of(engines[1], PROMPT[:5])


@pytest.mark.parametrize("n", [1, 3])
def test_an_interrupt_gives_what_was_read(engines: list[Engine], n: int) -> None:
    found: list[list[EngineEvent]] = []
    for engine in engines:
        steps = count(1)

        def interrupt(_: Sequence[int], steps: Any = steps) -> bool:
            if next(steps) == n:
                raise KeyboardInterrupt
            return False

        found.append([])
        with pytest.raises(KeyboardInterrupt):
            found[-1].extend(engine.generate(PROMPT, Greedy(), ends=interrupt))
    assert found[0] == found[1]
    assert engines[0].held == engines[1].held


def test_the_context_may_be_filled_to_its_last_slot(engines: list[Engine]) -> None:
    assert len(ids_of(engines[0])) == 48 - len(PROMPT) + 1
    assert len(engines[0].held) == 48


def test_logits_that_are_not_numbers_are_told_when_their_token_is_read(
    random_decoder: Callable[..., Decoder],
) -> None:
    engine = Engine(random_decoder(Queueing([]), "model.norm.weight"), ctx_size=48)
    with pytest.raises(DamagedFileError, match="not numbers"):
        ids_of(engine)


def test_where_a_pass_is_over_when_it_comes_back_none_is_run_in_vain(
    random_decoder: Callable[..., Decoder],
) -> None:
    kernels = Queueing([])
    kernels.queues = False
    engine = Engine(random_decoder(kernels), ctx_size=48)
    ids_of(engine, ends=lambda ids: len(ids) == 3)
    assert kernels.log == ["pass"] * 3
