"""Beam search: transformers' ids, brute force, and text that is final once it is shown."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llamachat
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Commit, Decoding, Start
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, Prefill, Tails, Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41]
N_NEW = 9
STOPS = ((), (84,), (7, 84, 135, 200, 241))
FORMS = list(
    itertools.product((2, 4, 8), (-1.0, 0.0, 1.0, 2.0), (False, True, "never"), range(len(STOPS)))
)


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> llamachat.Model:
    return llamachat.load(folder, quantize="none", dtype="float32", backend="reference", threads=1)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def events(model: llamachat.Model, decoding: Decoding, **changes: Any) -> list[Any]:
    usual: dict[str, Any] = {"max_new_tokens": N_NEW, "stop_ids": frozenset()}
    engine = Engine(model.engine.decoder, ctx_size=256)
    return list(engine.generate(PROMPT, decoding, **(usual | changes)))


def reply(model: llamachat.Model, decoding: Decoding, **changes: Any) -> list[int]:
    return [e.id for e in events(model, decoding, **changes) if isinstance(e, Token)]


def expected(oracle: Any, stops: Sequence[int], **flags: Any) -> tuple[list[int], float]:
    """Ids that transformers finds, without what ends them, and their score."""
    prompt = torch.tensor([PROMPT])
    found = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=N_NEW,
        eos_token_id=list(stops) or None, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True, **flags,
    )  # fmt: skip
    ids = found.sequences[0, len(PROMPT) :].tolist()
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end], float(found.sequences_scores[0])


@pytest.mark.parametrize("width", [2, 4, 8])
def test_ids_are_those_of_transformers(model: llamachat.Model, oracle: Any, width: int) -> None:
    for _, penalty, early, stops in random.Random(width).sample(FORMS[:36], 7):
        wanted, _ = expected(
            oracle, STOPS[stops], num_beams=width, length_penalty=penalty, early_stopping=early
        )
        options = Beam(width, penalty, early)  # type: ignore[arg-type]
        found = reply(model, options, stop_ids=frozenset(STOPS[stops]))
        assert found == wanted, (penalty, early, stops)


def test_groups_are_searches_that_avoid_what_those_before_them_chose(
    model: llamachat.Model, oracle: Any
) -> None:
    """transformers 5 has no groups, but each is a search of its own, under a known penalty."""
    from transformers import LogitsProcessorList

    chosen: list[list[int]] = [[] for _ in range(N_NEW)]
    answers = []
    for _ in range(3):
        mine: list[list[int]] = []

        def penalize(ids: Tensor, scores: Tensor, mine: list[list[int]] = mine) -> Tensor:
            step = ids.shape[1] - len(PROMPT)
            if step:
                mine.append(ids[:, -1].tolist())
            counts = torch.bincount(torch.tensor(chosen[step], dtype=torch.long), minlength=272)
            return scores - 2.5 * counts

        answers.append(
            expected(oracle, (), num_beams=2, logits_processor=LogitsProcessorList([penalize]))
        )
        for step, tokens in enumerate(mine):
            chosen[step] += tokens
    best = max(answers, key=lambda answer: answer[1])
    assert len({tuple(ids) for ids, _ in answers}) == 3
    # The last step's penalty stays unseen by transformers: its tokens are never read again.
    found = reply(model, Beam(6, groups=3, diversity_penalty=2.5))
    assert found[:-1] == best[0][:-1]


def test_one_beam_is_greedy(model: llamachat.Model) -> None:
    stop_ids = frozenset(STOPS[2])
    assert reply(model, Beam(1), stop_ids=stop_ids) == reply(model, Greedy(), stop_ids=stop_ids)


Logprobs = Callable[[tuple[int, ...]], Sequence[float]]


def commits(options: Decoding, logprobs: Logprobs, **changes: Any) -> list[Commit]:
    """What a strategy commits, step by step, where the text so far decides the next token."""
    usual: dict[str, Any] = {
        "prompt": (0,), "stop_ids": frozenset({2}), "max_new_tokens": 4, "key": (7, 0, 0),
    }  # fmt: skip
    start = Start(**(usual | changes))
    strategy = options.start(start)
    rows: list[tuple[int, ...]] = [()]
    n_run, found = 1, []
    for step in range(start.max_new_tokens):
        logits = torch.tensor([logprobs(row) for row in rows[:n_run]])
        found.append(strategy.accept(strategy.choose(logits, torch.tensor(step))))
        if found[-1].done:
            break
        ids = [() if branch.token is None else (branch.token,) for branch in found[-1].rows]
        parents = [rows[branch.parent] for branch in found[-1].rows]
        rows = [parent + token for parent, token in zip(parents, ids, strict=True)]
        n_run = sum(map(len, ids))
    assert strategy.finish().ids == text(found)
    return found


def text(found: Sequence[Commit]) -> tuple[int, ...]:
    return tuple(token for commit in found for token in commit.ids)


A, B, E = range(3)
TOY = {None: (0.5, 0.4, 0.1), A: (0.4, 0.35, 0.25), B: (0.06, 0.04, 0.9)}


def toy(ids: tuple[int, ...]) -> list[float]:
    return [math.log(p) for p in TOY[ids[-1] if ids else None]]


def test_the_toy_of_three_tokens_finds_the_published_reply() -> None:
    first, second, third = commits(Beam(2), toy)
    assert [(tail.ids, round(tail.score, 4)) for tail in first.tails] == [
        ((A,), -0.6931), ((B,), -0.9163),
    ]  # fmt: skip
    assert [round(tail.score * 2, 4) for tail in second.tails] == [-1.6094, -1.7430]
    assert (third.ids, third.done, third.finish_reason) == ((B,), True, "stop")


@pytest.mark.parametrize("seed", range(6))
def test_beams_wide_enough_find_the_best_of_all_replies(seed: int) -> None:
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).mul(2)
    rows = table.log_softmax(-1).tolist()

    def logprobs(ids: tuple[int, ...]) -> list[float]:
        return rows[ids[-1] if ids else 3]

    def score(ids: tuple[int, ...]) -> float:
        return sum(logprobs(ids[:i])[token] for i, token in enumerate(ids))

    every = [
        ids
        for n in range(1, 5)
        for ids in itertools.product(range(3), repeat=n)
        if E not in ids[:-1] and (n == 4 or ids[-1] == E)
    ]
    best = max(every, key=score)
    found = commits(Beam(16, length_penalty=0.0, early_stopping="never"), logprobs)
    assert text(found) == tuple(token for token in best if token != E)


BEAMS = st.builds(
    Beam,
    width=st.integers(2, 5),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    sampling=st.sampled_from([None, Sample(temperature=1.0, top_k=3, top_p=1.0)]),
) | st.sampled_from(
    [Beam(4, groups=2, diversity_penalty=0.5), Beam(6, groups=3, diversity_penalty=2.0)]
)


@settings(max_examples=60, deadline=None)
@given(options=BEAMS, seed=st.integers(0, 10**6), sharp=st.sampled_from([0.5, 2.0, 6.0]))
def test_what_is_committed_begins_every_reply_that_is_still_open(
    options: Beam, seed: int, sharp: float
) -> None:
    def logprobs(ids: tuple[int, ...]) -> list[float]:
        draw = random.Random(f"{seed} {ids}")
        return [draw.gauss(0, sharp) for _ in range(7)]

    def ends(ids: Sequence[int]) -> bool:
        return tuple(ids[-2:]) == (3, 4)

    found = commits(options, logprobs, max_new_tokens=12, ends=ends)
    assert found[-1].done
    shown: tuple[int, ...] = ()
    whole = text(found)
    for commit in found[:-1]:
        shown += commit.ids
        assert whole[: len(shown)] == shown
        distinct = {tail.ids for tail in commit.tails}
        assert len(distinct) == len(commit.tails) or options.groups > 1
        scores = [tail.score for tail in commit.tails]
        assert scores == sorted(scores, reverse=True)
    assert 2 not in whole
    assert found[-1].finish_reason == ("length" if len(whole) == 12 else "stop") or ends(whole)


def test_a_reply_that_contains_a_stop_string_ends_there(model: llamachat.Model) -> None:
    options = Beam(4, length_penalty=-5.0)
    *_, last = events(model, options, ends=lambda ids: len(ids) == 3, max_new_tokens=30)
    assert last == Done("stop")
    assert len(reply(model, options, ends=lambda ids: len(ids) == 3, max_new_tokens=30)) == 3


def test_drawn_beams_depend_on_the_seed_alone(model: llamachat.Model) -> None:
    def drawn(seed: int, width: int = 4) -> list[int]:
        sampling = Sample(temperature=1.5, top_p=1.0, seed=seed)
        return reply(model, Beam(width, sampling=sampling))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1
    sampling = Sample(temperature=1.5, top_p=1.0, seed=1)
    assert drawn(1, width=1) == reply(model, sampling)


def test_a_draw_without_replacement_is_one_draw_after_the_other() -> None:
    from llamachat.engine.beam import _draw_distinct

    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    values, indices = _draw_distinct(logits, torch.tensor([0.6, 0.7, 0.9, 0.5]).double())
    assert indices[:3].tolist() == [1, 0, 2]  # of .5 .3 .2; then of .5 .2; then of .2
    assert values.isfinite().tolist() == [True, True, True, False]


def test_the_reply_that_won_is_not_run_again_in_the_next_turn(model: llamachat.Model) -> None:
    for stops in STOPS:
        engine = Engine(model.engine.decoder, ctx_size=256)
        found = engine.generate(PROMPT, Beam(4), max_new_tokens=N_NEW, stop_ids=frozenset(stops))
        ids = [event.id for event in found if isinstance(event, Token)]
        following = [*PROMPT, *ids, 1, 2]
        first, *_ = engine.generate(following, Greedy(), max_new_tokens=1)
        assert isinstance(first, Prefill)
        assert first.total <= 3  # of the reply its last token alone
        cold = Engine(model.engine.decoder, ctx_size=256)
        warm, fresh = engine.logits(following), cold.logits(following)
        assert torch.allclose(warm, fresh, atol=1e-4)


def test_a_full_cache_ends_a_reply(model: llamachat.Model) -> None:
    engine = Engine(model.engine.decoder, ctx_size=30)
    *tokens, last = engine.generate(PROMPT, Beam(4), stop_ids=frozenset())
    n = sum(isinstance(event, Token) for event in tokens)
    assert last == Done("length")
    assert (30 - len(PROMPT)) // 5 <= n <= 30 - len(PROMPT) + 1
    full = PROMPT * 3 + PROMPT[:6]
    assert sum(isinstance(e, Token) for e in engine.generate(full, Beam(4))) == 1


def collect(found: Iterator[Any], into: list[Any]) -> None:
    for event in found:
        into.append(event)


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_is_answered_with_the_best_reply_so_far(
    model: llamachat.Model, at: int
) -> None:
    """Thrown in at one of its open tails: what was shown before is where the rest begins."""
    engine = Engine(model.engine.decoder, ctx_size=256)
    found = engine.generate(PROMPT, Beam(4), max_new_tokens=N_NEW, stop_ids=frozenset())
    shown: list[int] = []
    tails: list[tuple[int, ...]] = []
    n_tails = 0
    for event in found:
        if isinstance(event, Token):
            shown.append(event.id)
        if isinstance(event, Tails):
            tails = [tail.ids for tail in event.tails]
            n_tails += 1
            if n_tails > at:
                break
    rest: list[Any] = [found.throw(KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        collect(found, rest)
    assert tuple(event.id for event in rest) in tails
    assert reply(model, Greedy()) == [
        e.id
        for e in engine.generate(PROMPT, Greedy(), max_new_tokens=N_NEW, stop_ids=frozenset())
        if isinstance(e, Token)
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0}, {"width": 17}, {"length_penalty": math.nan}, {"length_penalty": 11},
        {"early_stopping": "no"}, {"groups": 3}, {"groups": 0}, {"diversity_penalty": -1.0},
        {"groups": 2}, {"diversity_penalty": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Beam(**wrong)
