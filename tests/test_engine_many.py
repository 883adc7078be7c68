"""Several replies side by side: each is what it would be alone, and the prompt runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import llamachat
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, EngineEvent, Prefill, Tails, Token
from llamachat.engine.strategies import Greedy, Sample

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41] * 5
STOP_IDS = frozenset({257, *range(0, 256, 24)})  # many, so that replies differ in length
EACH: dict[str, Decoding] = {
    "greedy": Greedy(),
    "penalized": Greedy(repetition_penalty=1.5),
    "sampled": Sample(temperature=1.2, top_p=0.95, seed=5),
    "top-k": Sample(temperature=1.0, top_k=20, top_p=1.0, seed=6),
    "beam": Beam(width=4, length_penalty=0.5),
    "groups": Beam(width=4, groups=2, diversity_penalty=0.5),
    "drawn beams": Beam(width=3, sampling=Sample(temperature=1.5, top_p=1.0, seed=8)),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(), threads=1)


def new_engine(model: llamachat.Model, ctx_size: int = 512) -> Engine:
    return Engine(model.engine.decoder, ctx_size=ctx_size, stop_ids=STOP_IDS, chunk=16)


def by_reply(found: Sequence[tuple[int, EngineEvent]], n: int) -> list[list[EngineEvent]]:
    return [[event for i, event in found if i == one] for one in range(n)]


def ids_of(events: Sequence[EngineEvent]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def test_every_reply_is_the_one_that_it_is_alone(model: llamachat.Model) -> None:
    found = list(
        new_engine(model).generate_many(PROMPT, list(EACH.values()), max_new_tokens=25, turn=2)
    )
    lengths = set()
    for together, decoding in zip(by_reply(found, len(EACH)), EACH.values(), strict=True):
        alone = list(new_engine(model).generate(PROMPT, decoding, max_new_tokens=25, turn=2))
        assert ids_of(together) == ids_of(alone)
        assert together[-1] == alone[-1]
        tails = [[e for e in events if isinstance(e, Tails)] for events in (together, alone)]
        assert tails[0] == tails[1]
        lengths.add(len(ids_of(alone)))
    assert len(lengths) > 2


def test_all_go_on_in_one_pass_a_step_over_a_prompt_that_runs_once(
    model: llamachat.Model, passes: list[int]
) -> None:
    engine = new_engine(model)
    decodings = [Greedy(), EACH["penalized"], Beam(width=2)]
    found = list(engine.generate_many(PROMPT, decodings, max_new_tokens=6, stop_ids=frozenset()))
    assert passes == [16, 16, 8, *[4] * 5]
    first = [[e for e in events if isinstance(e, Prefill)] for events in by_reply(found, 3)]
    assert first[0][-1] == Prefill(len(PROMPT), len(PROMPT), 0)
    assert first[1] == first[2] == [Prefill(0, 0, len(PROMPT))]


def test_a_reply_that_ended_leaves_the_passes(model: llamachat.Model, passes: list[int]) -> None:
    engine = new_engine(model)
    decodings = [Sample(temperature=2.0, top_p=1.0, seed=seed) for seed in range(4)]
    found = list(engine.generate_many(PROMPT, decodings, max_new_tokens=30))
    lengths = [len(ids_of(events)) + (events[-1] == Done("stop")) for events in by_reply(found, 4)]
    assert len(set(lengths)) > 1
    steps = passes[3:]
    assert steps == [sum(n > step + 1 for n in lengths) for step in range(max(lengths) - 1)]


def test_whichever_reply_is_gone_on_from_is_in_the_cache(model: llamachat.Model) -> None:
    decodings = list(EACH.values())
    for chosen in range(len(decodings)):
        engine = new_engine(model)
        found = list(engine.generate_many(PROMPT, decodings, max_new_tokens=9))
        said = [*PROMPT, *ids_of(by_reply(found, len(decodings))[chosen])]
        first = next(engine.generate([*said, 1, 2, 3], Greedy()))
        assert isinstance(first, Prefill)
        assert first.reused >= len(said) - 1


def test_tokens_carry_the_models_own_log_probability(model: llamachat.Model) -> None:
    engine = new_engine(model)
    found = list(engine.generate_many(PROMPT, list(EACH.values()), max_new_tokens=12))
    for events in by_reply(found, len(EACH)):
        ids = ids_of(events)
        raw = engine.logits([*PROMPT, *ids])[:, : engine.decoder.config.vocab_size].log_softmax(-1)
        expected = [raw[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(ids)]
        told = [event.logprob for event in events if isinstance(event, Token)]
        assert told == pytest.approx(expected, abs=1e-4)


def test_where_the_context_is_full_all_end_with_what_they_have(model: llamachat.Model) -> None:
    engine = new_engine(model, ctx_size=len(PROMPT) + 20)
    decodings = [Greedy(), EACH["penalized"], Beam(width=4)]
    found = list(engine.generate_many(PROMPT, decodings, stop_ids=frozenset()))
    for events, decoding in zip(by_reply(found, 3), decodings, strict=True):
        assert events[-1] == Done("length")
        alone = new_engine(model).generate(
            PROMPT, decoding, max_new_tokens=len(ids_of(events)), stop_ids=frozenset()
        )
        assert ids_of(events)
        assert isinstance(decoding, Beam) or ids_of(events) == ids_of(list(alone))
    assert ids_of(list(engine.generate(PROMPT, Greedy(), max_new_tokens=3)))


def test_no_tokens_are_replies_too(model: llamachat.Model) -> None:
    found = new_engine(model).generate_many(PROMPT, [Greedy(), Beam(2)], max_new_tokens=0)
    assert [event for _, event in found if isinstance(event, Done)] == [Done("length")] * 2


def test_an_interrupt_is_told_what_beams_held_back(model: llamachat.Model) -> None:
    replies = new_engine(model).generate_many(PROMPT, [Greedy(), Beam(4)], max_new_tokens=30)
    found = [next(replies) for _ in range(40)]
    found.append(replies.throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        found.extend(iter(replies))  # which takes each, before it meets the end
    greedy, beam = map(ids_of, by_reply(found, 2))
    assert len(beam) >= len(greedy) - 1 > 1
