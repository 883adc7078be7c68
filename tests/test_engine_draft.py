"""Drafts change how often the model runs, and nothing else: neither ids nor what is held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llamachat.engine.decoding import Choice, Start
from llamachat.engine.draft import PromptLookup
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, EngineEvent, Speculation, Token
from llamachat.engine.strategies import Greedy, Sample, Single
from llamachat.errors import UsageError
from llamachat.model.decoder import Decoder

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41] * 3
OTHER = [5, 9, 17, 44, 8, 8]
NEW = 40
SAMPLED = Sample(temperature=0.1, top_p=1, seed=2)


@dataclass(frozen=True)
class Fresh(Greedy):
    """Greedy, but never one of the reply's last few ids: each choice depends on the one before."""

    def start(self, start: Start) -> Single:
        return FreshReply(start, self)


class FreshReply(Single):
    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        logits = logits.clone()
        logits[:, self._ids[-7:]] = -1e9
        return super().choose(logits, step)


DECODINGS = {"greedy": Greedy(), "sampled": SAMPLED, "history": Fresh()}


@pytest.fixture(scope="module")
def decoder(exact_decoder: Decoder) -> Decoder:
    return exact_decoder


def new_engine(decoder: Decoder, ctx_size: int = 96) -> Engine:
    return Engine(decoder, ctx_size=ctx_size, chunk=5)


def run(
    engine: Engine, decoding: Any = None, *, draft: int = 0, n_events: int = 999, **settings: Any
) -> tuple[list[EngineEvent], tuple[int, ...], Speculation]:
    """What a reply to PROMPT is made of, up to n events; what is held then; and the drafts."""
    settings = {"max_new_tokens": NEW} | settings
    events = engine.generate(PROMPT, decoding or Greedy(), draft=draft, **settings)
    seen = [event for _, event in zip(range(n_events), events, strict=False)]
    held = engine.held
    speculation = Speculation(0, 0)
    if isinstance(seen[-1], Done):
        speculation = seen[-1].speculation or speculation
        seen[-1] = replace(seen[-1], speculation=None)
    return seen, held, speculation


def ids_of(events: list[EngineEvent]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("draft", [1, 4, 15])
def test_a_reply_is_what_it_would_have_been(decoder: Decoder, decoding: Any, draft: int) -> None:
    plain = run(new_engine(decoder), decoding)
    drafted = run(new_engine(decoder), decoding, draft=draft)
    assert drafted[:2] == plain[:2]
    assert drafted[2].drafted > 0


def test_drafts_hold_where_a_text_repeats_itself_and_fail_elsewhere(decoder: Decoder) -> None:
    """So both ways are tested above."""
    came = [run(new_engine(decoder), decoding, draft=4)[2] for decoding in DECODINGS.values()]
    assert all(speculation.accepted > 0 for speculation in came)
    assert all(speculation.accepted < speculation.drafted for speculation in came)


class Counted:
    """A decoder, and how often it was called."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.n_passes = decoder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def __call__(self, *batch: Any) -> Tensor:
        self.n_passes += 1
        return self.decoder(*batch)


def test_a_draft_saves_passes(decoder: Decoder) -> None:
    passes = []
    for draft in (0, 8):
        engine = new_engine(decoder)
        run(engine, max_new_tokens=1)
        engine.decoder = counted = Counted(decoder)  # type: ignore[assignment]
        run(engine, draft=draft)
        passes.append(counted.n_passes)
    assert passes[1] < passes[0]


@pytest.mark.parametrize("n_new", range(1, NEW, 3))
def test_a_bound_may_fall_inside_a_draft(decoder: Decoder, n_new: int) -> None:
    plain = run(new_engine(decoder), max_new_tokens=n_new)
    assert run(new_engine(decoder), draft=15, max_new_tokens=n_new)[:2] == plain[:2]


@pytest.mark.parametrize("room", range(1, 24, 2))
def test_the_context_may_end_inside_a_draft(decoder: Decoder, room: int) -> None:
    plain = run(new_engine(decoder, len(PROMPT) + room), max_new_tokens=None)
    drafted = run(new_engine(decoder, len(PROMPT) + room), draft=15, max_new_tokens=None)
    assert drafted[:2] == plain[:2]


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_a_stop_id_ends_a_reply_inside_a_draft(decoder: Decoder, decoding: Any) -> None:
    ids = ids_of(run(new_engine(decoder), decoding)[0])
    for stop in set(ids):
        plain = run(new_engine(decoder), decoding, stop_ids=frozenset({stop}))
        drafted = run(new_engine(decoder), decoding, stop_ids=frozenset({stop}), draft=8)
        assert drafted[:2] == plain[:2]
        assert plain[0][-1] == Done("stop")


@pytest.mark.parametrize("length", range(1, NEW, 4))
def test_a_stop_string_ends_a_reply_inside_a_draft(decoder: Decoder, length: int) -> None:
    def ends(ids: Any) -> bool:
        return len(ids) == length

    plain = run(new_engine(decoder), ends=ends)
    assert run(new_engine(decoder), ends=ends, draft=8)[:2] == plain[:2]


@pytest.mark.parametrize("n_events", range(1, 7 + NEW, 3))
def test_a_reply_that_is_closed_anywhere_leaves_what_a_plain_one_leaves(
    decoder: Decoder, n_events: int
) -> None:
    plain, drafted = new_engine(decoder), new_engine(decoder)
    assert run(drafted, draft=8, n_events=n_events)[:2] == run(plain, n_events=n_events)[:2]
    goes_on = [
        ids_of(list(engine.generate(ids, Greedy(), max_new_tokens=5)))
        for engine in (plain, drafted)
        for ids in (PROMPT, OTHER)
    ]
    assert goes_on[:2] == goes_on[2:]


def test_keys_and_values_are_those_of_a_plain_reply(decoder: Decoder) -> None:
    """Also after turns that were taken back: what goes on from them is what a cold engine says."""
    engine = new_engine(decoder)
    reply = ids_of(run(engine, draft=8)[0])
    for kept in (NEW - 1, NEW // 2, 3):
        longer = [*PROMPT, *reply[:kept], 1, 2, 3]
        warm = engine.generate(longer, Greedy(), max_new_tokens=9, draft=8)
        cold = new_engine(decoder).generate(longer, Greedy(), max_new_tokens=9)
        assert ids_of(list(warm)) == ids_of(list(cold))


def test_a_reply_that_goes_on_counts_its_steps_on(decoder: Decoder) -> None:
    for decoding in DECODINGS.values():
        whole = ids_of(run(new_engine(decoder), decoding)[0])
        for cut in (1, 13, NEW - 1):
            events = new_engine(decoder).generate(
                [*PROMPT, *whole[:cut]], decoding, max_new_tokens=NEW - cut, continued=cut, draft=3
            )
            assert ids_of(list(events)) == whole[cut:]


class Wide(Greedy):
    """As if of several rows."""

    width = 2


def test_drafts_for_beams_are_refused(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="speculate"):
        new_engine(decoder).generate(PROMPT, Wide(), draft=4)


IDS = st.lists(st.integers(0, 3), min_size=2, max_size=40)


@given(IDS, st.integers(1, 9))
def test_what_is_drafted_followed_the_same_tokens_before(ids: list[int], limit: int) -> None:
    draft = PromptLookup(ids).draft(limit)
    earlier = [i for i in range(1, len(ids)) if ids[i - 1] == ids[-1]]
    assert draft or not any(ids[i - 2 : i] == ids[-2:] for i in range(2, len(ids)))
    assert len(draft) <= limit
    assert not draft or any(draft == (ids[i:] * limit)[: len(draft)] for i in earlier)


SOURCE = list(range(20))


def test_a_copy_is_followed_past_what_it_leaves_out_and_puts_in() -> None:
    lookup = PromptLookup([*SOURCE, 99, 0, 1, 2])
    lookup.add(5)  # without 3 and 4
    assert lookup.draft(2) == [6, 7]
    lookup.add(77)
    assert lookup.draft(2) == []
    lookup.add(6)
    assert lookup.draft(2) == [7, 8]


def test_a_copy_that_has_become_another_text_is_left() -> None:
    lookup = PromptLookup([*SOURCE, 99, 0, 1, 2])
    for token in range(70, 80):
        lookup.add(token)
    lookup.add(3)
    assert lookup.draft(2) == []


def test_drafts_are_as_long_as_those_before_held() -> None:
    lookup = PromptLookup([*SOURCE, 99, 0, 1])
    lengths = [len(lookup.draft(99))]
    for held in (True,) * 3 + (False,) * 40:
        n = lengths[-1]
        lookup.judge(n, n if held else 0)
        lengths.append(len(lookup.draft(99)))
    assert lengths[:4] == sorted(lengths[:4])
    assert 0 < lengths[0] < lengths[3]
    assert lengths[3:] == sorted(lengths[3:], reverse=True)
    assert lengths[-1] == 0
    lookup.add(2)  # three tokens that match are worth another try
    assert lookup.draft(99) == [3]
