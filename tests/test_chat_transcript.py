"""Lines of JSON: what was said comes back, damage stays where it is, strangers are understood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat_session import Marked, Model, Scripted, run, session_of

from llamachat.chat.record import Ids, after
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message
from llamachat.chat.transcript import VERSION, Transcript, Writer, parse, title_of

STRANGE = 'a\x00b\x1b[2J\u2028\u202e\ud7ff漢字👩‍👩‍👧\r\n\t"\\ '


def lines_of(messages: tuple[Message, ...], run: dict[str, Any] | None = None) -> list[bytes]:
    writer = Writer()
    return [writer.header("2026-01-02T03:04:05+00:00", run or {}), *map(writer.message, messages)]


def read(lines: Iterator[bytes] | list[bytes]) -> Transcript:
    return parse(b"".join(lines).split(b"\n"))


def talk(*questions: str) -> ChatSession:
    session = session_of(*(f"re: {question}".encode() for question in questions))
    for question in questions:
        run(session.send(question))
    return session


def test_a_conversation_comes_back_with_all_that_is_known_of_it() -> None:
    said = talk("one", STRANGE, "three").messages
    back = read(lines_of(said)).messages
    assert back == said
    for before, now in zip(said, back, strict=True):
        if before.role == "assistant":
            assert before.record is not None
            assert now.record is not None
            (part,), (again,) = before.record.parts, now.record.parts
            assert again.prompt.whole() == part.prompt.whole()
            assert replace(again, prompt=part.prompt, timings=part.timings) == replace(
                part, strategy=json.loads(json.dumps(part.strategy))
            )


def test_the_prompts_of_a_long_conversation_take_no_more_than_what_was_new() -> None:
    lines = lines_of(talk(*("0123456789" * 3,) * 40).messages)
    assert len(lines[-1]) < len(lines[4]) + 100


def test_the_prompt_ids_are_those_that_were_run() -> None:
    session = talk("one", "two")
    session.undo()
    session.model.engine.scripts.append([b"other"])  # type: ignore[attr-defined]
    run(session.send("two again"))
    back = read(lines_of(session.messages)).messages
    prompts = session.model.engine.prompts  # type: ignore[attr-defined]
    found = [m.record.parts[0].prompt.whole() for m in back if m.record and m.record.parts]
    assert found == [prompts[0], prompts[2]]


DAMAGE = [
    b"{", b"\xff\xfe", b"[1]", b'{"role":"user"}', b"[" * 100_000, b"7", b"\x00",
    b'{"role":"user","content":"\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_loses_itself_alone(damage: bytes) -> None:
    said = talk("one", "two", "three").messages
    lines = lines_of(said)
    lines[3] = damage + b"\n"
    found = read(lines)
    assert found.messages == (*said[:2], *said[3:])
    assert found.problems == ("line 4 is damaged, and left out",)


def test_a_reply_after_a_damaged_one_keeps_its_text_and_its_ids_but_not_a_wrong_prompt() -> None:
    said = talk("one", "two", "three").messages
    lines = lines_of(said)
    lines[2] = lines[2][:50] + b"\n"
    found = read(lines)
    assert [m.content for m in found.messages] == [m.content for m in (said[0], *said[2:])]
    records = [m.record for m in found.messages if m.role == "assistant"]
    prompts = [p.prompt.whole() for r in records if r for p in r.parts]
    told = [p.prompt.whole() for m in said if m.record for p in m.record.parts]
    assert all(prompt in told for prompt in prompts)


@pytest.mark.parametrize("length", range(0, 400, 13))
def test_a_file_that_was_cut_anywhere_opens(length: int) -> None:
    said = talk("one", "two").messages
    whole = b"".join(lines_of(said))
    found = parse(whole[: len(whole) - length].split(b"\n")).messages
    assert said[: len(found)] == found
    assert len(found) >= 2


HOSTILE = [
    ("ids", [-1]), ("ids", [2**40]), ("ids", "12"), ("ids", [1.5]), ("ids", [True]),
    ("parts", [{}]), ("parts", 7), ("parts", [[]]), ("finish_reason", "won"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_reply_whose_making_is_damaged_keeps_its_text(key: str, value: object) -> None:
    lines = lines_of(talk("one").messages)
    lines[2] = json.dumps({**json.loads(lines[2]), key: value}).encode() + b"\n"
    found = read(lines)
    assert found.messages[1].content == "re: one"
    assert found.messages[1].ids is None
    assert len(found.problems) == 1


@pytest.mark.parametrize(("key", "value"), [("date", "yesterday"), ("seed", -1), ("stop", [1])])
def test_a_part_that_says_what_cannot_be_is_not_believed(key: str, value: object) -> None:
    lines = lines_of(talk("one").messages)
    line = json.loads(lines[2])
    line["parts"][0][key] = value
    lines[2] = json.dumps(line).encode() + b"\n"
    found = read(lines)
    assert found.messages[1] == Message("assistant", "re: one")
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("same", 10**9), ("same", -1), ("new", [1]), ("sha256", "0" * 16), ("same", 1.0)],
)
def test_a_prompt_that_is_not_what_was_run_is_not_believed(key: str, value: object) -> None:
    lines = lines_of(talk("one", "two").messages)
    line = json.loads(lines[4])
    line["parts"][0]["prompt"][key] = value
    lines[4] = json.dumps(line).encode() + b"\n"
    found = read(lines)
    assert found.messages[3].ids is None
    assert len(found.problems) == 1


def test_a_reply_that_was_edited_is_not_said_to_have_been_generated() -> None:
    said = talk("one").messages
    edited = replace(said[1], content="my own words", ids=None)
    line = json.loads(lines_of((said[0], edited))[2])
    assert line == {"role": "assistant", "content": "my own words"}


def test_a_file_of_version_0_opens() -> None:
    """Written by hand: no version, messages alone, ids where they are known."""
    text = (
        '{"created":"2025-12-31T23:59:59+01:00","model":"smollm2-135m"}\n'
        '{"role":"system","content":"Be brief."}\n'
        '{"role":"user","content":"Hi"}\n'
        '{"role":"assistant","content":"Hello","ids":[72,101,108,108,111]}\n'
    )
    found = parse(text.encode().split(b"\n"))
    assert found.version == 0
    assert found.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello", (72, 101, 108, 108, 111)),
    )
    assert found.problems == ()
    assert parse(text.encode().split(b"\n")[1:]).messages == found.messages


def test_a_file_of_a_newer_version_opens_with_a_notice() -> None:
    lines = lines_of(talk("one").messages)
    lines[0] = json.dumps({"llamachat": VERSION + 1, "run": {}}).encode() + b"\n"
    found = read(lines)
    assert len(found.messages) == 2
    assert found.version > VERSION
    assert "newer" in found.problems[0]


def test_keys_that_are_unknown_are_kept() -> None:
    lines = lines_of(talk("one").messages)
    changed = [json.loads(line) | {"mood": i} for i, line in enumerate(lines)]
    found = read([json.dumps(line).encode() + b"\n" for line in changed])
    writer = Writer()
    again = [writer.header(found.created, found.run or {}, found.extra)]
    again += map(writer.message, found.messages)
    assert [json.loads(line)["mood"] for line in again] == [0, 1, 2]


def test_a_line_says_where_the_run_changes() -> None:
    model = Model(Scripted([[b"one"], [b"two"], [b"three"]]))
    session = ChatSession(model, template=Marked())
    for name in ("a", "b", "b"):
        session.run = {"model": name}
        run(session.send(name))
    lines = lines_of(session.messages, {"model": "a"})
    assert b"".join(lines).count(b'{"run":') == 1
    found = read(lines)
    records = [m.record for m in found.messages if m.role == "assistant"]
    assert [r.run["model"] for r in records if r] == ["a", "b", "b"]
    assert found.run == {"model": "b"}


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8))
def test_sequences_that_share_their_beginnings_are_whole_again(sequences: list[list[int]]) -> None:
    base: Ids | None = None
    for ids in sequences:
        base = after(base, ids)
        assert base.whole() == ids
        assert len(base) == len(ids)


def test_a_title_is_the_first_words_on_one_line() -> None:
    assert title_of("  What\nis\tthis? ") == "What is this?"
    assert len(title_of("word " * 1000)) <= 60
