"""Servers that send too much, nonsense, or us elsewhere: one error, and what came is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_faults import DONE, Api, Response, Step, api_server, delta, event, failed, said, usage

from llamachat.chat.endpoint import Endpoint, Timeouts
from llamachat.chat.events import Done
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import connect
from llamachat.chat.session import ChatSession
from llamachat.errors import ModelNotFoundError, TransferError

MANY = 20  # parts of 64 KiB: more than an event may have


@pytest.fixture
def api() -> Iterator[Api]:
    with api_server() as server:
        yield server


def ask(api: Api, *steps: Step, **settings: Any) -> Done:
    """How a reply of these bytes ends."""
    api.responses = [Response(steps)]
    server = connect(Endpoint(api.url, "s3cret", Timeouts(5, 10, 10)), None, lambda _: None)
    *_, done = ChatSession(server, template=AsMessages(), **settings).send("Hi")
    assert isinstance(done, Done)
    return done


def told(**logprob: Any) -> bytes:
    """An event with a token and its probability."""
    known = {"token": "Hi", "logprob": -0.5, "bytes": None, "top_logprobs": [], **logprob}
    return delta("Hi", logprobs={"content": [known]})


@pytest.mark.parametrize(
    "steps",
    [
        [b"data: ", *[b"x" * 65536] * MANY],
        [b": still here\n" * 5000] * MANY,
    ],
)
def test_an_event_without_end_is_not_read_on(api: Api, steps: list[bytes]) -> None:
    with pytest.raises(TransferError, match="more than 1 MiB"):
        ask(api, *steps)


def test_what_came_before_an_event_without_end_is_kept(api: Api) -> None:
    done = ask(api, delta("half"), b"data: ", *[b"x" * 65536] * MANY)
    assert (done.text, done.finish_reason) == ("half", "interrupted")
    assert "1 MiB" in str(done.problem)


def test_long_replies_of_short_events_are_no_fault(api: Api) -> None:
    done = ask(api, *[delta("x" * 30_000)] * 50, delta(None, "stop"), DONE)
    assert (len(done.text), done.problem) == (1_500_000, None)


def test_events_cut_anywhere_are_counted_one_by_one(api: Api) -> None:
    part = delta("x" * 100_000)[:-1]  # the last byte comes with the next event
    steps = [part, *[b"\n" + part] * 15, b"\n", delta(None, "stop"), DONE]
    assert ask(api, *steps).problem is None


def test_headers_without_end_are_an_error(api: Api) -> None:
    api.responses = [Response(headers={f"x-{i}": "y" * 1000 for i in range(200)})]
    server = connect(Endpoint(api.url), None, lambda _: None)
    with pytest.raises(TransferError):
        list(ChatSession(server, template=AsMessages()).send("Hi"))


def test_an_error_without_end_is_not_read_on(api: Api) -> None:
    api.responses = [Response([b"x" * (1 << 20)] * 9, 500, "application/json")]
    server = connect(Endpoint(api.url), None, lambda _: None)
    with pytest.raises(TransferError, match="more than 8 MiB"):
        list(ChatSession(server, template=AsMessages()).send("Hi"))


def test_neither_key_nor_words_follow_to_another_server(api: Api) -> None:
    with api_server() as other:
        there = f"{other.url}/chat/completions"
        api.responses = [Response((), 307, headers={"location": there})]
        server = connect(Endpoint(api.url, "s3cret"), None, lambda _: None)
        with pytest.raises(TransferError, match=there):
            list(ChatSession(server, template=AsMessages()).send("Hi"))
    assert (other.asked, other.headers) == ([], {})


@pytest.mark.parametrize(
    "bad",
    [
        told(logprob=float("nan")),
        told(logprob=float("inf")),
        told(bytes=10**12),
        told(bytes=[300]),
        event({"choices": [{"delta": {"content": ["x"]}, "index": 0}]}),
        b"data: " + b"[" * 200_000 + b"\n\n",
    ],
)
def test_nonsense_ends_a_reply_that_is_kept(api: Api, bad: bytes) -> None:
    done = ask(api, delta("half"), bad, delta(None, "stop"), DONE)
    assert (done.text, done.finish_reason) == ("half", "interrupted")
    assert "not understood" in str(done.problem)


@pytest.mark.parametrize("counts", [(-5, 3), (10**400, 3)])
def test_counts_that_cannot_be_are_not_told(api: Api, counts: tuple[int, int]) -> None:
    done = ask(api, delta("x"), delta(None, "stop"), usage(*counts), DONE)
    assert (done.text, done.completion_tokens) == ("x", 1)


def test_a_reply_is_over_when_it_says_so_first(api: Api) -> None:
    done = ask(
        api, delta("whole"), delta(None, "length"), delta(" more"), delta(None, "stop"), DONE
    )
    assert (done.text, done.finish_reason) == ("whole", "length")


def test_a_call_of_tools_is_no_reply(api: Api) -> None:
    with pytest.raises(TransferError, match="tool_calls"):
        ask(api, delta(None, "tool_calls"), DONE)


def test_a_reason_that_is_no_text_ends_the_reply(api: Api) -> None:
    assert ask(api, delta("x"), delta(None, ["stop"]), DONE).text == "x"  # type: ignore[arg-type]


def test_half_a_character_is_replaced(api: Api) -> None:
    half = rb'{"choices": [{"index": 0, "delta": {"content": "a\ud83d"}, "finish_reason": null}]}'
    assert ask(api, b"data: " + half + b"\n\n", delta("b", "stop"), DONE).text == "a?b"


def test_a_reply_without_end_is_cut(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamachat.chat.remote._MOST_TEXT", 1000)
    done = ask(api, *[delta("x" * 300)] * 5, delta(None, "stop"), DONE)
    assert (len(done.text), done.finish_reason) == (900, "interrupted")


def test_compressed_data_is_not_asked_for(api: Api) -> None:
    ask(api, *said("ok").steps)
    assert api.headers["accept-encoding"] == "identity"


def test_a_model_whose_name_cannot_be_shown_is_none(api: Api) -> None:
    api.cards = [{"id": "\x1b[2J"}, {"id": "m"}]
    assert ask(api, *said("ok").steps).text == "ok"
    with pytest.raises(ModelNotFoundError):
        connect(Endpoint(api.url), "\x1b[2J", lambda _: None)


def test_words_of_an_error_are_few(api: Api) -> None:
    api.responses = [failed(500, "long " * 10_000)]
    server = connect(Endpoint(api.url), None, lambda _: None)
    with pytest.raises(TransferError) as caught:
        list(ChatSession(server, template=AsMessages()).send("Hi"))
    assert len(caught.value.message) < 500
