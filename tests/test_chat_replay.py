"""A recorded conversation that is held again: every token the same, or where it parts and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llamachat
from llamachat.chat.compare import Comparison
from llamachat.chat.events import Done, Event
from llamachat.chat.keeping import Keeper
from llamachat.chat.options import Options, Said
from llamachat.chat.provenance import facts
from llamachat.chat.replay import Checked, Difference, check
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import parse_spec
from llamachat.chat.transcript import Transcript, Writer, parse
from llamachat.errors import CheckFailedError, LlamachatError
from llamachat.terminal import replaying

N = 24
HOW = {
    "greedy": Said(strategy="greedy"),
    "sampled": Said(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=5),
    "in another order": Said(temperature=1.5, top_k=20, samplers=("top_k", "temperature")),
    "beams": Said(strategy="beam:3"),
    "drawn beams": Said(strategy="beam:3", temperature=1.0, seed=3),
    "biased": Said(temperature=1.0, logit_bias=((65, 3.0),), bad_words=("B", "C"), seed=1),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(), dtype="float32", threads=1)


def session(model: llamachat.Model, how: str = "sampled", **settings: Any) -> ChatSession:
    options = Options(HOW[how])
    return ChatSession(model, options=options, **({"max_new_tokens": N} | settings))


def last(events: Iterator[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def written(chat: ChatSession) -> Transcript:
    """What a file of the conversation says."""
    writer = Writer()
    lines = [writer.header("", {}), *map(writer.message, chat.messages)]
    return parse(b"".join(lines).split(b"\n"))


def checked(transcript: Transcript, model: llamachat.Model) -> list[Checked]:
    return list(check(transcript, lambda _run, _form: model))


def assert_equal(chat: ChatSession, model: llamachat.Model, tokens: int) -> None:
    found = checked(written(chat), model)
    assert [it.difference for it in found] == [None] * len(found)
    assert sum(it.tokens for it in found) == tokens


@pytest.mark.parametrize("how", HOW)
def test_every_reply_is_the_same_token_by_token(model: llamachat.Model, how: str) -> None:
    chat = session(model, how)
    tokens = sum(len(last(chat.send(question)).token_ids) for question in ("Why?", "And then?"))
    assert_equal(chat, model, tokens)


def test_the_reply_of_another_attempt_is_made_by_its_draws(model: llamachat.Model) -> None:
    chat = session(model)
    last(chat.send("Why?"))
    last(chat.regenerate())
    assert_equal(chat, model, len(last(chat.regenerate()).token_ids))


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
def test_a_reply_that_went_on_is_made_again_in_its_parts(model: llamachat.Model, how: str) -> None:
    chat = session(model, how)
    tokens = len(last(chat.send("Why?")).token_ids)
    chat.options = Options(HOW["sampled"])
    tokens += len(last(chat.continue_()).token_ids)
    assert_equal(chat, model, tokens)
    assert len(written(chat).messages[1].record.parts) == 2  # type: ignore[union-attr]


def test_a_choice_of_the_user_is_not_held_against_the_model(model: llamachat.Model) -> None:
    chat = session(model, logprobs=3)
    last(chat.send("Why?"))
    assert chat.spoken is not None
    token = chat.spoken.tokens[7]
    assert token.probabilities is not None
    other = next(one.id for one in token.probabilities.top if one.id != token.id)
    last(chat.branch(7, other))
    assert_equal(chat, model, len(chat.spoken.ids) - 1)


def test_what_was_chosen_of_several_replies_is_made_again(model: llamachat.Model) -> None:
    chat = session(model)
    last(chat.send("Why?"))
    specs = [parse_spec(text) for text in ("greedy", "top-k:20,seed=8")]
    comparison = Comparison(chat, specs, use=lambda _form: model)
    list(comparison.run())
    assert_equal(chat, model, len(comparison.choose(1).token_ids))


def test_a_stop_string_ends_it_again(model: llamachat.Model) -> None:
    free = session(model, "greedy")
    text = last(free.send("Why?")).text
    chat = session(model, "greedy", stop=[text[6:8]])
    done = last(chat.send("Why?"))
    assert done.finish_reason == "stop"
    assert_equal(chat, model, len(done.token_ids))


def test_a_reply_that_repeated_itself_ends_there_again(model: llamachat.Model) -> None:
    chat = session(model, stop_loops=2, max_new_tokens=400)
    chat.options = Options(Said(strategy="greedy", logit_bias=((65, 100.0),)))
    done = last(chat.send("Why?"))
    assert done.finish_reason == "loop"
    assert_equal(chat, model, len(done.token_ids))


def test_an_interrupted_reply_is_the_same_as_far_as_it_came(model: llamachat.Model) -> None:
    chat = session(model)
    events = chat.send("Why?")
    for _ in range(9):
        next(events)
    events.close()
    assert chat.messages[1].record is not None
    assert_equal(chat, model, len(chat.messages[1].record.ids))


def test_an_edited_reply_is_not_compared(model: llamachat.Model) -> None:
    chat = session(model)
    last(chat.send("Why?"))
    edited = replace(chat.messages[1], content="my own", ids=None)
    chat.restore([chat.messages[0], edited])
    assert_equal(chat, model, len(last(chat.send("And then?")).token_ids))


def test_the_first_token_that_differs_is_told_with_both_probabilities(
    model: llamachat.Model,
) -> None:
    chat = session(model, "greedy")
    last(chat.send("Why?"))
    difference = changed(chat, model, lambda ids: ids.__setitem__(5, 70))
    record = chat.messages[1].record
    assert record is not None
    told = [*record.parts[0].prompt.whole(), *record.ids[:5]]
    expected = model.logits(told)[-1, : model.tokenizer.vocab_size].double().softmax(-1)
    assert (difference.turn, difference.index) == (0, 5)
    assert (difference.recorded.id, difference.now.id) == (70, record.ids[5])
    assert difference.recorded.probability == pytest.approx(expected[70].item(), rel=1e-4)
    assert difference.now.probability == pytest.approx(expected.max().item(), rel=1e-4)
    assert difference.recorded.text == repr(model.tokenizer.decode([70]))


def test_a_reply_that_does_not_end_where_it_did_is_told(model: llamachat.Model) -> None:
    chat = session(model, "greedy", max_new_tokens=N)
    last(chat.send("Why?"))
    difference = changed(chat, model, lambda ids: ids.pop(), finish_reason="stop")
    assert difference.index == N - 1
    assert (difference.recorded.id, difference.recorded.text) == (None, "the end")
    assert difference.now.id == chat.messages[1].record.ids[-1]  # type: ignore[union-attr]


def test_a_file_is_checked_with_the_model_and_the_settings_that_it_names(
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLAMACHAT_DATA_DIR", str(tmp_path))
    loaded = llamachat.load(
        tiny_llama(hidden_size=32, intermediate_size=64), dtype="float32", threads=1, ctx_size=96
    )
    chat = session(loaded, max_new_tokens=None)
    chat.run = facts(loaded, chat.template)
    assert last(chat.send("Why?")).finish_reason == "length"  # the context is full
    notices: list[str] = []
    Keeper(chat, notices.append).save_as("a")
    capsys.readouterr()
    replaying.check("a", json=False)
    tokens = len(chat.messages[1].record.ids)  # type: ignore[union-attr]
    assert capsys.readouterr() == (f"all {tokens} tokens are the same\n", "")
    path = tmp_path / "sessions" / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seed":5', b'"seed":6'))
    with pytest.raises(
        CheckFailedError, match=r"turn 1, token \d+: was \d+ .* %\), now \d+ .* %\)"
    ):
        replaying.check("a", json=True)
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"]
    assert found["difference"]["recorded"]["id"] != found["difference"]["now"]["id"]
    assert CheckFailedError.exit_code == 8
    assert notices == []


def changed(
    chat: ChatSession,
    model: llamachat.Model,
    change: Callable[[list[int]], object],
    **part: Any,
) -> Difference:
    """What is found where somebody changed the first reply's ids in the file."""
    writer = Writer()
    lines = [writer.header("", {}), *map(writer.message, chat.messages)]
    line = json.loads(lines[2])
    change(line["ids"])
    line["parts"][0] |= {"end": len(line["ids"]), **part}
    lines[2] = json.dumps(line).encode() + b"\n"
    found = checked(parse(b"".join(lines).split(b"\n")), model)[0].difference
    assert found is not None
    return found


@pytest.mark.parametrize(
    "strategy", [{}, {"name": "os.system"}, {"name": "greedy", "x": 1}, {"name": "sample",
    "temperature": "hot"}, {"name": "beam", "width": 10**9}, {"name": "sample", "samplers": 7}]
)  # fmt: skip
def test_a_strategy_that_is_none_is_refused(
    model: llamachat.Model, strategy: dict[str, Any]
) -> None:
    chat = session(model)
    last(chat.send("Why?"))
    message = chat.messages[1]
    assert message.record is not None
    part = replace(message.record.parts[0], strategy=strategy)
    record = replace(message.record, parts=(part,))
    with pytest.raises(LlamachatError):
        checked(Transcript((chat.messages[0], replace(message, record=record))), model)
