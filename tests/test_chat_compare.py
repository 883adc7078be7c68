"""Several answers to one question: each is the one that chat gives, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

import llamachat
from llamachat.chat.compare import Comparison
from llamachat.chat.events import Done, Prefill, Text
from llamachat.chat.options import Options, Said
from llamachat.chat.specs import parse_spec
from llamachat.engine.engine import Engine
from llamachat.errors import UsageError

QUESTION = "Why? é€"
SPECS = (
    "greedy", "beam:4", "top-k:40,seed=3", "top-p:0.9,temperature=1.2,seed=7", "random,seed=1",
    "beam:4,beam-groups=2", "greedy,repetition-penalty=1.5", "default", "min-p=0.05,seed=2",
)  # fmt: skip
STOP_IDS = frozenset({257, *range(0, 256, 32)})


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def model(folder: Path) -> llamachat.Model:
    return llamachat.load(folder, threads=1)


def session_of(model: llamachat.Model) -> llamachat.ChatSession:
    """A conversation of one turn, over an empty cache."""
    engine = Engine(
        model.engine.decoder, ctx_size=900, stop_ids=STOP_IDS, n_ids=model.tokenizer.vocab_size
    )
    session = llamachat.ChatSession(
        replace(model, engine=engine), max_new_tokens=24, stop=["#"],
        options=Options(Said(seed=11), (("model", {"temperature": 1.1}),)),
    )  # fmt: skip
    list(session.send("Hello"))
    return session


def comparison_of(session: llamachat.ChatSession, *specs: str) -> Comparison:
    return Comparison(
        session, [parse_spec(spec) for spec in specs], QUESTION, use=lambda _: session.model
    )


def told(done: Done) -> tuple[object, ...]:
    return done.text, done.token_ids, done.finish_reason, done.seed, done.strategy


def test_every_answer_is_the_one_that_chat_gives(model: llamachat.Model) -> None:
    comparison = comparison_of(session_of(model), *SPECS)
    texts = [""] * len(SPECS)
    for i, event in comparison.run():
        texts[i] += event.text if isinstance(event, Text) else ""
    for i, text in enumerate(SPECS):
        chat = session_of(model)
        chat.options = parse_spec(text).options(chat.options)
        *_, alone = chat.send(QUESTION)
        assert isinstance(alone, Done)
        assert told(comparison.done[i]) == told(alone)
        assert texts[i] == alone.text
    assert len({done.token_ids for done in comparison.done.values()}) > 5


def test_the_prompt_is_run_once_and_not_again_for_another_comparison(
    model: llamachat.Model,
) -> None:
    session = session_of(model)
    for n_run in (None, 1):
        comparison = comparison_of(session, "greedy", "beam:2", "random")
        prefills = [event for _, event in comparison.run() if isinstance(event, Prefill)]
        ran = sum(done.prompt_tokens - done.reused_tokens for done in comparison.done.values())
        assert ran == sum({event.total for event in prefills})
        assert n_run is None or ran == n_run


def test_another_form_of_the_model_answers_as_it_does_in_chat(
    model: llamachat.Model, folder: Path
) -> None:
    other = llamachat.load(folder, quantize="int4", threads=1)
    session = session_of(model)
    used = []

    def use(form: str | None) -> llamachat.Model:
        used.append(form)
        return session_of(other).model if form == "int4" else session.model  # type: ignore[return-value]

    specs = [parse_spec(text) for text in ("greedy", "greedy,quantize=int4", "beam:2")]
    comparison = Comparison(session, specs, QUESTION, use=use)
    list(comparison.run())
    assert used == [None, "int4"]
    chat = session_of(model)
    chat.model, chat.options = session_of(other).model, Options(Said(strategy="greedy"))
    *_, alone = chat.send(QUESTION)
    assert isinstance(alone, Done)
    assert comparison.done[1].token_ids == alone.token_ids != comparison.done[0].token_ids


def test_replies_part_at_the_first_token_that_differs(model: llamachat.Model) -> None:
    comparison = comparison_of(session_of(model), *SPECS, "greedy,presence-penalty=0")
    list(comparison.run())
    first = comparison.done[0]
    others = [(i, it) for i, it in comparison.done.items() if it.token_ids != first.token_ids]
    assert len(others) > 4
    for i, done in others:
        pairs = list(zip_longest(first.token_ids, done.token_ids))
        expected = [a == b for a, b in pairs].index(False)
        parting = comparison.parting(i)
        assert parting is not None
        assert parting.index == expected
        tokens = [
            None if it is None else model.tokenizer.token_bytes(it).decode("utf-8", "replace")
            for it in pairs[expected]
        ]
        assert list(parting.tokens) == tokens
        if tokens[1] is not None and tokens[1].isascii():
            assert done.text[slice(*parting.span)] in (tokens[1], "")
    assert comparison.parting(0) is None
    assert comparison.parting(len(SPECS)) is None


def test_a_reply_that_ends_sooner_parts_at_its_end(model: llamachat.Model) -> None:
    session = session_of(model)
    whole = comparison_of(session, "greedy")
    list(whole.run())
    ids = whole.done[0].token_ids
    at = next(n for n in range(2, len(ids)) if ids[n] not in ids[:n])
    session.model.engine.stop_ids |= {ids[at]}  # type: ignore[attr-defined]
    session.stop = ()
    bias = f"greedy,logit-bias={ids[at]}=50"
    comparison = comparison_of(session, "greedy", bias)
    list(comparison.run())
    parting = comparison.parting(1)
    assert parting is not None
    assert (parting.index, parting.tokens[1]) == (0, None)
    assert comparison.done[1].token_ids == ()


def test_the_mean_is_of_the_models_own_log_probabilities(model: llamachat.Model) -> None:
    session = session_of(model)
    comparison = comparison_of(session, *SPECS)
    list(comparison.run())
    prompt = session.asking(QUESTION).fitted.ids
    for done in comparison.done.values():
        if not done.token_ids:
            continue
        ids = list(done.token_ids)
        raw = session.model.engine.logits([*prompt, *ids])[:, : model.tokenizer.vocab_size]  # type: ignore[attr-defined]
        chosen = raw.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]
        assert done.mean_logprob == pytest.approx(chosen.mean().item(), abs=1e-4)


def test_the_conversation_goes_on_from_the_reply_that_is_chosen(model: llamachat.Model) -> None:
    session = session_of(model)
    list(session.send(QUESTION))
    before = session.messages
    comparison = Comparison(
        session, [parse_spec("greedy"), parse_spec("beam:3")], use=lambda _: session.model
    )
    list(comparison.run())
    assert session.messages == before
    done = comparison.choose(1)
    assert session.messages[:-1] == before[:-1]
    assert session.messages[-1].ids == done.token_ids
    first, *_ = session.send("And?")
    assert isinstance(first, Prefill)
    assert first.reused >= done.prompt_tokens + len(done.token_ids) - 1


@pytest.mark.parametrize("after", [3, 20, 60])
def test_an_interrupt_ends_all_with_what_they_have(model: llamachat.Model, after: int) -> None:
    comparison = comparison_of(session_of(model), "greedy", "beam:3", "random,seed=4")
    replies = comparison.run()
    found = [next(replies) for _ in range(after)]
    found += [replies.throw(KeyboardInterrupt()), *replies]
    assert set(comparison.done) == {0, 1, 2}
    for i, done in comparison.done.items():
        shown = "".join(e.text for n, e in found if n == i and isinstance(e, Text))
        assert shown == done.text
    assert "interrupted" in {done.finish_reason for done in comparison.done.values()}
    greedy, beams = comparison.done[0], comparison.done[1]
    assert beams.finish_reason == "stop" or len(beams.token_ids) >= len(greedy.token_ids) - 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["empty"]),
        ("greedy,top-p=0.5", ["--strategy greedy", "--top-p 0.5"]),
        ("top-k:40,top-k=30", ["top-k:40", "--top-k 30"]),
        ("beem:4", ["beem:4"]),
        ("top-k:x", ["top-k:x"]),
        ("temperature=hot", ["temperature", "hot", "number"]),
        ("seed=1,seed=2", ["seed", "twice"]),
        ("greedy,strategy=random", ["strategy", "twice"]),
        ("quantize=int3", ["int3", "int4"]),
        ("beam-groups=2", ["--beam-groups", "beams"]),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_names_the_words(text: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_spec(text)
    assert all(word in error.value.message for word in named)


def test_a_strategy_keeps_penalties_and_seed_of_what_was_said_before() -> None:
    base = Options(Said(top_p=0.5, temperature=1.5, repetition_penalty=1.2, seed=3))
    said = parse_spec("beam:2").options(base).said
    assert said == Said(strategy="beam:2", repetition_penalty=1.2, seed=3)
    assert parse_spec("seed=4").options(base).said == replace(base.said, seed=4)
