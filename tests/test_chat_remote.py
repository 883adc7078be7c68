"""A conversation with a server: what it is sent, what comes of it, and of its failures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from api_faults import DONE, Api, Response, api_server, delta, event, failed, said, usage

from llamachat.chat.compare import Comparison
from llamachat.chat.context import UNBOUNDED
from llamachat.chat.dialects import DIALECTS, MOST_LOOK_BACK, TGI, UNKNOWN
from llamachat.chat.endpoint import Endpoint, Timeouts, parse_endpoint
from llamachat.chat.events import Done, Text, Trimmed
from llamachat.chat.options import Options, Said
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import connect
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import parse_spec
from llamachat.errors import (
    AccessError,
    LlamachatError,
    ModelNotFoundError,
    PromptTooLongError,
    TransferError,
    UsageError,
)


@pytest.fixture
def api() -> Iterator[Api]:
    with api_server() as server:
        yield server


def talk(api: Api, *, key: str | None = None, next_s: float = 20, **options: Any) -> ChatSession:
    """A session with the server's model."""
    endpoint = Endpoint(api.url, key, Timeouts(5, options.pop("first_s", 20), next_s))
    notices = options.pop("notices", [])
    server = connect(endpoint, options.pop("model", None), notices.append)
    chosen = Options(Said(**options.pop("said", {})))
    return ChatSession(server, template=AsMessages(), options=chosen, **options)


def ask(session: ChatSession, question: str = "Hi") -> Done:
    """The end of a reply, whose pieces must add up to it."""
    *events, done = session.send(question)
    assert isinstance(done, Done)
    assert "".join(event.text for event in events if isinstance(event, Text)) == done.text
    return done


def test_the_conversation_is_sent_turn_by_turn(api: Api) -> None:
    session = talk(api, system="Be brief.")
    ask(session, "One? ")
    ask(session, "Zwei: ä漢👋\n")
    assert api.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One? "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Zwei: ä漢👋\n"},
    ]


def test_a_reply_tells_what_the_server_counted(api: Api) -> None:
    api.responses = [said("Hel", "lo", counted=(12, 5))]
    done = ask(talk(api))
    assert (done.text, done.prompt_tokens, done.completion_tokens) == ("Hello", 12, 5)


def test_undo_takes_the_turn_back(api: Api) -> None:
    session = talk(api)
    ask(session, "One?")
    ask(session, "Two?")
    session.undo()
    ask(session, "Three?")
    assert [it["content"] for it in api.asked[2]["messages"]] == ["One?", "Hello", "Three?"]


def test_another_draw_has_another_seed(api: Api) -> None:
    session = talk(api, said={"seed": 7})
    ask(session)
    list(session.regenerate())
    assert [it["seed"] for it in api.asked] == [7, 8]


def test_a_reply_is_gone_on_with_where_the_server_can(api: Api) -> None:
    api.responses = [said("Once", reason="length"), said(" upon")]
    session = talk(api)
    ask(session)
    list(session.continue_())
    assert session.messages[-1].content == "Once upon"
    assert api.asked[1]["messages"][-1] == {"role": "assistant", "content": "Once"}
    assert api.asked[1]["continue_final_message"] is True


def test_going_on_is_refused_where_the_server_cannot(api: Api) -> None:
    api.cards = [{"id": "m", "owned_by": "someone"}]
    session = talk(api)
    ask(session)
    with pytest.raises(UsageError, match="/continue"):
        list(session.continue_())


def test_limits_and_stops_are_sent(api: Api) -> None:
    ask(talk(api, max_new_tokens=5, stop=["END"], logprobs=2))
    sent = api.asked[0]
    told = {name: sent[name] for name in ("max_tokens", "stop", "logprobs", "top_logprobs")}
    assert told == {"max_tokens": 5, "stop": ["END"], "logprobs": True, "top_logprobs": 2}


def test_a_bound_beyond_the_context_is_left_out(api: Api) -> None:
    """Some servers refuse it, as they refuse a prompt; without one the reply ends there too."""
    api.responses = [failed(400, "maximum context length is 9 tokens"), said("one")]
    assert ask(talk(api, max_new_tokens=5)).text == "one"
    assert [it.get("max_tokens") for it in api.asked] == [5, None]


def test_a_stop_string_that_the_server_passes_on_ends_the_reply(api: Api) -> None:
    api.responses = [said("one E", "ND two", " three")]
    done = ask(talk(api, stop=["END"]))
    assert (done.text, done.finish_reason, done.completion_tokens) == ("one ", "stop", 2)


@pytest.mark.parametrize(
    ("owner", "said", "sent"),
    [
        ("vllm", {"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0}),
        ("sglang", {"top_k": 4, "min_p": 0.1}, {"top_k": 4, "min_p": 0.1}),
        ("llamacpp", {"repetition_penalty": 1.2}, {"repeat_penalty": 1.2, "typical_p": 1}),
        ("llamacpp", {"repetition_penalty": 1.2}, {"repeat_last_n": MOST_LOOK_BACK}),
        ("llamacpp", {"temperature": 1.0}, {"repeat_last_n": None, "mirostat": 0}),
        (
            "llamacpp",
            {"samplers": ("top_k", "typical_p", "temperature")},
            {"samplers": ["penalties", "top_k", "typ_p", "temperature"]},
        ),
        ("llamachat", {"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ("llamachat", {"strategy": "beam:3"}, {"num_beams": 3, "early_stopping": False}),
        ("openai", {"presence_penalty": 0.5, "seed": 3}, {"presence_penalty": 0.5, "seed": 3}),
        ("openai", {"logit_bias": ((17, -2.5),)}, {"logit_bias": {"17": -2.5}}),
        ("openai", {"strategy": "greedy"}, {"temperature": 0}),
    ],
)
def test_what_was_asked_for_is_said_in_the_words_of_the_server(
    api: Api, owner: str, said: dict[str, Any], sent: dict[str, Any]
) -> None:
    api.cards = [{"id": "m", "owned_by": owner}]
    ask(talk(api, said=said))
    assert {name: api.asked[0].get(name) for name in sent} == sent


@pytest.mark.parametrize(
    ("owner", "said", "flag"),
    [
        ("openai", {"top_k": 4}, "--top-k"),
        ("openai", {"min_p": 0.1}, "--min-p"),
        ("vllm", {"typical_p": 0.5}, "--typical-p"),
        ("vllm", {"samplers": ("top_k", "temperature")}, "--samplers"),
        ("llamacpp", {"bad_words": ("no",)}, "--bad-word"),
        ("vllm", {"strategy": "beam:4"}, "--num-beams"),
        ("vllm-behind-another", {"top_k": 4}, "--top-k"),
        ("llamacpp", {"seed": (1 << 32) - 1}, "--seed"),
        ("vllm", {"logit_bias": ((17, 101.0),)}, "--logit-bias"),
    ],
)
def test_what_a_server_does_not_take_is_named_and_nothing_sent(
    api: Api, owner: str, said: dict[str, Any], flag: str
) -> None:
    api.cards = [{"id": "m", "owned_by": owner}]
    with pytest.raises(UsageError, match=flag):
        ask(talk(api, said=said))
    assert api.asked == []


@pytest.mark.parametrize("said", [{"logit_bias": ((1, 2.0),)}, {"presence_penalty": 0.5}])
def test_what_a_server_takes_as_something_else_is_refused(said: dict[str, Any]) -> None:
    decoding = Options(Said(**said)).decoding()
    assert set(said) <= set(UNKNOWN.fields(decoding))
    with pytest.raises(UsageError, match=f"--{next(iter(said))}".replace("_", "-")):
        TGI.fields(decoding)


def test_a_bias_of_an_id_that_the_model_does_not_have_is_refused(api: Api) -> None:
    api.cards = [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 512, "n_vocab": 100}}]
    with pytest.raises(UsageError, match="0 to 99"):
        ask(talk(api, said={"logit_bias": ((100, 1.0),)}))


def test_every_dialect_refuses_or_says_every_setting() -> None:
    settings = {"typical_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    for dialect in (*DIALECTS, UNKNOWN):
        for name, value in settings.items():
            decoding = Options(Said(**{name: value})).decoding()
            try:
                assert value in dialect.fields(decoding).values()
            except UsageError as error:
                assert name.replace("_", "-") in error.message  # noqa: PT017  # either will do


def test_probabilities_come_with_the_tokens(api: Api) -> None:
    told = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    other = {"token": "Yo", "logprob": -1.5, "bytes": [89, 111]}
    logprobs = {"content": [{**told, "top_logprobs": [told, other]}]}
    api.responses = [Response([delta("Hi", "stop", logprobs=logprobs), DONE])]
    session = talk(api, logprobs=2)
    (known,) = ask(session).logprobs
    spell = session.model.tokenizer.token_bytes
    assert [(spell(one.id), one.logprob) for one in known.top] == [(b"Hi", -0.5), (b"Yo", -1.5)]
    assert math.isnan(known.chosen.filtered_logprob)


def test_a_token_that_is_not_shown_adds_no_text(api: Api) -> None:
    end = {"token": "<|im_end|>", "logprob": -0.1, "bytes": [60], "top_logprobs": []}
    api.responses = [Response([delta("Hi"), delta("", "stop", logprobs={"content": [end]}), DONE])]
    assert ask(talk(api, logprobs=1)).text == "Hi"


def test_characters_and_events_split_anywhere_are_whole(api: Api) -> None:
    whole = delta("漢字👋") + delta("é", "stop") + DONE
    api.responses = [Response([whole[i : i + 1] for i in range(len(whole))])]
    assert ask(talk(api)).text == "漢字👋é"


def test_a_stream_that_is_cut_keeps_what_came(api: Api) -> None:
    api.responses = [Response([delta("par"), delta("tial")], cut=True), said("ok")]
    session = talk(api)
    done = ask(session)
    assert (done.text, done.finish_reason) == ("partial", "interrupted")
    assert isinstance(done.problem, TransferError)
    ask(session, "And?")
    assert [it["content"] for it in api.asked[1]["messages"]] == ["Hi", "partial", "And?"]


def test_a_stream_that_ends_before_its_reply_is_cut(api: Api) -> None:
    api.responses = [Response([delta("par"), DONE])]
    assert ask(talk(api)).finish_reason == "interrupted"


def test_a_stream_that_is_cut_before_any_text_changes_nothing(api: Api) -> None:
    api.responses = [Response([delta("")], cut=True)]
    session = talk(api)
    with pytest.raises(TransferError, match="broke off"):
        ask(session)
    assert session.messages == ()


def test_a_server_that_falls_silent_is_given_up(api: Api) -> None:
    api.responses = [Response([delta("a"), delta("b"), 5.0, delta("c", "stop"), DONE])]
    began = time.monotonic()
    done = ask(talk(api, next_s=0.3))
    assert done.text == "ab"
    assert "silent for 0.3 s" in str(done.problem)
    assert time.monotonic() - began < 3


def test_the_first_text_may_take_longer_than_the_next(api: Api) -> None:
    api.responses = [Response([0.8, delta("slow", "stop"), DONE])]
    assert ask(talk(api, first_s=10, next_s=0.2)).text == "slow"


def test_slow_drips_are_no_silence(api: Api) -> None:
    drips = [step for letter in "drip" for step in (0.15, delta(letter))]
    api.responses = [Response([*drips, delta(None, "stop"), DONE])]
    assert ask(talk(api, next_s=0.4)).text == "drip"


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (failed(401, "no key"), AccessError, "wants a key: no key"),
        (failed(403, "not you"), AccessError, "not you"),
        (failed(404, "no such model"), ModelNotFoundError, "no such model"),
        (failed(400, "maximum context length is 9 tokens"), PromptTooLongError, "maximum context"),
        (failed(400, "top_p must be below 1"), UsageError, "top_p must be below 1"),
        (failed(500, "it burns"), TransferError, "500: it burns"),
        (Response([b"<html>"], kind="text/html"), TransferError, "sent text/html"),
        (Response([b"data: {nonsense\n\n"]), TransferError, "not understood"),
        (Response([b"data: [1, 2]\n\n"]), TransferError, "not understood"),
        (Response([event({"choices": 5})]), TransferError, "not understood"),
        (Response([event({"choices": [{"delta": {"content": 5}}]})]), TransferError, "understood"),
        (Response([event({"error": {"message": "out of memory"}})]), TransferError, "out of mem"),
        (Response([event({"error": {"message": "no id 9", "code": 400}})]), UsageError, "no id 9"),
        (Response([event({"error": {"message": "burns", "code": 500}})]), TransferError, "burns"),
        (Response([b"junk"], headers={"content-encoding": "gzip"}), TransferError, "compressed"),
    ],
)
def test_failures_are_told_in_our_words(
    api: Api, response: Response, kind: type[LlamachatError], words: str
) -> None:
    api.responses = [response]
    session = talk(api)
    with pytest.raises(kind, match=words):
        ask(session)
    assert session.messages == ()


def test_a_busy_server_is_asked_again_when_it_says(api: Api) -> None:
    api.responses = [failed(429, "busy", Retry_After="0"), failed(503), said("Hello")]
    notices: list[str] = []
    assert ask(talk(api, notices=notices)).text == "Hello"
    assert len(api.asked) == 3
    assert "busy (429): asking again in 0 s" in notices[0]


def test_a_server_that_stays_busy_is_an_error(api: Api) -> None:
    api.responses = [failed(429, "queue is full", Retry_After="0")]
    with pytest.raises(TransferError, match="queue is full"):
        ask(talk(api))
    assert len(api.asked) == 3


def test_what_may_have_been_computed_is_not_asked_again(api: Api) -> None:
    api.responses = [failed(500), said("Hello")]
    with pytest.raises(TransferError):
        ask(talk(api))
    assert len(api.asked) == 1


def test_the_key_is_sent_and_never_shown(api: Api) -> None:
    api.responses = [failed(401, "the key s3cret is wrong")]
    session = talk(api, key="s3cret")
    with pytest.raises(AccessError) as caught:
        ask(session)
    assert api.headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(session.model.endpoint)  # type: ignore[attr-defined]


def test_without_a_key_none_is_sent(api: Api) -> None:
    ask(talk(api))
    assert "authorization" not in api.headers


def test_the_only_model_is_the_default(api: Api) -> None:
    ask(talk(api))
    assert api.asked[0]["model"] == "m"


def test_several_models_are_listed(api: Api) -> None:
    api.cards = [{"id": "one"}, {"id": "two"}]
    with pytest.raises(ModelNotFoundError) as caught:
        talk(api)
    assert caught.value.hint == "-m one, two"


def test_a_model_can_be_named_where_the_server_lists_none(api: Api) -> None:
    api.cards = None
    ask(talk(api, model="mine"))
    assert api.asked[0]["model"] == "mine"


def test_nothing_is_trimmed_where_the_context_is_not_known(api: Api) -> None:
    api.cards = [{"id": "m"}]
    session = talk(api)
    assert session.model.engine.ctx_size == UNBOUNDED
    for _ in range(3):
        ask(session, "word " * 2000)
    assert len(api.asked[2]["messages"]) == 5


def test_the_oldest_turns_are_left_out_where_the_context_is_known(api: Api) -> None:
    api.cards = [{"id": "m", "owned_by": "vllm", "max_model_len": 600}]
    session = talk(api)
    for _ in range(2):
        ask(session, "word " * 150)
    *events, _ = session.send("word " * 150)
    assert any(isinstance(it, Trimmed) and it.turns for it in events)
    assert len(api.asked[2]["messages"]) < 5


def test_specs_are_answered_one_after_the_other(api: Api) -> None:
    api.responses = [said("first"), said("second")]
    session = talk(api)
    specs = [parse_spec("greedy"), parse_spec("top-p:0.5,seed=3")]
    comparison = Comparison(session, specs, "Hi", use=lambda _: session.model)
    list(comparison.run())
    assert [comparison.done[i].text for i in (0, 1)] == ["first", "second"]
    assert [it["temperature"] for it in api.asked] == [0, 0.7]


def test_a_reply_that_nobody_listens_to_is_closed(api: Api) -> None:
    api.responses = [Response([delta("tick ") if i % 2 else 0.02 for i in range(400)])]
    session = talk(api)
    reply = session.send("Hi")
    assert any(isinstance(it, Text) for it in (next(reply) for _ in range(3)))
    reply.close()
    deadline = time.monotonic() + 5
    while not api.closed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert api.closed == 1
    assert session.messages[-1].content.startswith("tick")


def test_no_thread_is_left_behind(api: Api) -> None:
    session = talk(api)
    for _ in range(3):
        ask(session)
    time.sleep(0.05)
    assert not [it for it in threading.enumerate() if it.name == "patience"]


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("http://host:1/api/v1/chat/completions", "http://host:1/api/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses_are_understood(written: str, url: str) -> None:
    assert parse_endpoint(written).url == url


@pytest.mark.parametrize(
    "written",
    ["", "ftp://host", "http://", "http://user:pw@host", "http://h/v1?key=1", "http://h:x"],
)
def test_other_addresses_are_refused(written: str) -> None:
    with pytest.raises(UsageError, match="--endpoint"):
        parse_endpoint(written)


def test_a_key_that_can_be_read_on_its_way_is_noticed() -> None:
    shows = {
        url: parse_endpoint(url, "key").shows_key
        for url in ("http://gpu:8000", "https://gpu:8000", "http://127.0.0.1:8000", "localhost:1")
    }
    assert list(shows.values()) == [True, False, False, False]


def test_cached_tokens_are_told_as_reused(api: Api) -> None:
    api.responses = [Response([delta("x", "stop"), usage(20, 1, cached=16), DONE])]
    assert ask(talk(api)).reused_tokens == 16
