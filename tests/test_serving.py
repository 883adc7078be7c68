"""Our server as OpenAI's own client sees it, and as clients do that misbehave."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from api_server import Server, serving, until

import llamachat
from llamachat.chat.options import Options, Said
from llamachat.serving import app as serving_app

ENDLESS = {"257": -100.0}  # the id that stops
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> llamachat.Model:
    return llamachat.load(tiny_llama(), threads=1)


@pytest.fixture(scope="module")
def server(model: llamachat.Model) -> Iterator[Server]:
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connected(server) as client:
        yield client


def connected(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def raw(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    kind = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    try:
        with urlopen(Request(server.url + path, body, kind), timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def test_a_reply_is_the_one_of_a_conversation_here(
    client: openai.OpenAI, model: llamachat.Model
) -> None:
    said = {"temperature": 0.9, "top_p": 0.8, "seed": 11}
    session = llamachat.ChatSession(
        model,
        system="Be brief.",
        options=Options(Said(**said)),
        max_new_tokens=30,  # type: ignore[arg-type]
    )
    *_, expected = session.send("Hello")
    found = client.chat.completions.create(
        model=name(client),
        messages=[{"role": "system", "content": "Be brief."}, *HELLO],
        max_completion_tokens=30,
        **said,  # type: ignore[arg-type]
    )
    choice = found.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.token_ids)


@pytest.mark.parametrize(
    "extra", [{}, {"strategy": "beam:3"}, {"min_p": 0.05, "repetition_penalty": 1.2}]
)
def test_a_streamed_reply_adds_up_to_the_whole_one(
    client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {
        "model": name(client), "messages": HELLO, "max_tokens": 40, "seed": 5,
        "n": 1 if "strategy" in extra else 3, "extra_body": extra,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    texts = [""] * asked["n"]
    ends = [None] * asked["n"]
    usage = None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content
            ends[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def ask(n: int) -> str | None:
        reply = client.chat.completions.create(
            model=name(client), messages=[{"role": "user", "content": "Say " * n}],
            max_tokens=10 + 3 * n, seed=n, temperature=1.5, logit_bias=ENDLESS,  # type: ignore[arg-type]
        )  # fmt: skip
        return reply.choices[0].message.content

    alone = [ask(n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


@pytest.mark.parametrize("prompts", [["abc", "hello", "xyz"], [[1, 2, 3], [4, 5], [6]]])
def test_several_prompts_get_what_each_gets_alone(client: openai.OpenAI, prompts: Any) -> None:
    asked: dict[str, Any] = {
        "model": name(client), "max_tokens": 9, "n": 2, "seed": 3, "temperature": 1.5,
        "logit_bias": ENDLESS,
    }  # fmt: skip
    alone = [client.completions.create(prompt=it, **asked) for it in prompts]
    together = client.completions.create(prompt=prompts, **asked)
    texts = [choice.text for it in alone for choice in it.choices]
    assert [choice.text for choice in together.choices] == texts
    assert [choice.index for choice in together.choices] == [*range(6)]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(it.usage.prompt_tokens for it in alone if it.usage)

    streamed = [""] * 6
    usage = {"include_usage": True}
    *chunks, last = client.completions.create(
        prompt=prompts, stream=True, stream_options=usage, **asked
    )
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert last.usage.completion_tokens == together.usage.completion_tokens


def test_prompts_that_the_queue_has_no_room_for_take_none(model: llamachat.Model) -> None:
    with serving(model, parallel=2, queue=1) as server, connected(server) as client:
        server.gate.clear()
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=name(client), prompt=["a", "b", "c", "d"])
        server.gate.set()
        until(lambda: server.scheduler.is_idle)
        three = client.completions.create(model=name(client), prompt=["a", "b", "c"], max_tokens=2)
        assert len(three.choices) == 3


def test_a_stop_string_ends_a_reply_and_is_not_shown(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": name(client), "prompt": "abc", "max_tokens": 40, "temperature": 0,
        "logit_bias": ENDLESS,
    }  # fmt: skip
    text = client.completions.create(**asked).choices[0].text
    stop = text[12:14]
    cut = client.completions.create(**asked, stop=["never there", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_log_probabilities_are_those_of_the_model(
    client: openai.OpenAI, model: llamachat.Model
) -> None:
    ids = [1, 2, 3, 4]
    asked: dict[str, Any] = {
        "model": name(client), "prompt": ids, "max_tokens": 6, "temperature": 0, "logprobs": 3,
    }  # fmt: skip
    choice = client.completions.create(**asked).choices[0]
    chosen = list(model.generate(ids, max_new_tokens=6))
    logits = model.logits([*ids, *chosen])[3:-1, : model.tokenizer.vocab_size]
    logprobs = logits.log_softmax(-1)
    expected = [row[token].item() for row, token in zip(logprobs, chosen, strict=True)]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert all(len(top) <= 3 for top in choice.logprobs.top_logprobs or [])
    chat = client.chat.completions.create(
        model=name(client), messages=HELLO, max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert chat.choices[0].logprobs is not None
    for token in chat.choices[0].logprobs.content or []:
        assert token.logprob == token.top_logprobs[0].logprob
        assert len(token.top_logprobs) == 2


def test_a_conversation_that_goes_on_is_not_read_again(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": name(client), "max_tokens": 8, "temperature": 0}
    question = [{"role": "user", "content": "A question that nobody asked before" * 3}]
    first = client.chat.completions.create(messages=question, **asked)  # type: ignore[arg-type]
    assert first.usage is not None
    more = [*question, {"role": "assistant", "content": "x"}, *HELLO]
    second = client.chat.completions.create(messages=more, **asked)  # type: ignore[arg-type]
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": ["a", "b"]})],
)
def test_a_client_that_leaves_frees_its_rows(
    server: Server, path: str, asked: dict[str, Any], stream: bool
) -> None:
    body = json.dumps(
        {**asked, "stream": stream, "logit_bias": ENDLESS, "max_tokens": 900}
    ).encode()
    server.gate.clear()
    with raw(server) as client:
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}".encode() + body)
        until(lambda: not server.scheduler.is_idle)
    server.gate.set()
    until(lambda: server.scheduler.is_idle, 1)  # all 900 would take longer
    assert 'llamachat_requests_total{end="disconnected"}' in metrics(server)


def test_what_the_queue_has_no_room_for_is_told_to_come_again(model: llamachat.Model) -> None:
    with serving(model, parallel=2, queue=1) as server, connected(server) as client:
        server.gate.clear()

        def ask() -> str:
            try:
                client.chat.completions.create(model=name(client), messages=HELLO, max_tokens=3)
            except openai.RateLimitError as error:
                return f"come again in {error.response.headers['retry-after']}"
            return "answered"

        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(ask) for _ in range(5)]
            try:
                until(lambda: sum(one.done() for one in asked) == 2)
            finally:
                server.gate.set()
            said = sorted(one.result() for one in asked)
    assert said == ["answered"] * 3 + ["come again in 1"] * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tools": []}, "tools is not supported"),
        ({"n": 5}, "5 rows are asked for, 4 may run at once"),
        ({"n": 10**12}, "4 may run at once"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0, "top_p": 0.5}, "temperature 0 and top_p 0.5 contradict"),
        ({"num_beams": 2, "logprobs": True}, "contradict"),
        ({"strategy": "best"}, "'best' is not one of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "tokens, the context 1024"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5000": 1}}, "5000"),
        ({"\ud800": 1}, "unicode"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, changes: dict[str, Any], says: str
) -> None:
    body = {"messages": HELLO, "max_tokens": 2} | changes
    status, told = post(server, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400
    assert says in told["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"null", b'{"messages":' + b"[" * 100_000]
)
def test_a_malformed_body_is_refused(server: Server, body: bytes) -> None:
    status, told = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert told["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long_is_not_read(
    server: Server, model: llamachat.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw(server) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n{"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(serving_app, "MAX_BODY_BYTES", 1000)
    with serving(model) as small, raw(small) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b" " * 1024 + b"\r\n") * 2
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_another_model_than_the_one_here_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model here is"):
        client.completions.create(model="gpt-5", prompt="x")


def test_a_key_is_asked_of_all_but_the_watchman(model: llamachat.Model) -> None:
    with serving(model, key="secret") as server:
        with connected(server, "secret") as client:
            assert client.models.list().data
        with connected(server, "guess") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with urlopen(f"{server.url}/health") as response:
            assert response.status == 200
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{server.url}/metrics")


def test_web_pages_may_ask_only_if_they_were_named(server: Server, model: llamachat.Model) -> None:
    page = {"Origin": "https://example.org"}
    with serving(model, origins=["https://example.org"]) as opened:
        for one, allowed in ((server, None), (opened, "https://example.org")):
            with urlopen(Request(f"{one.url}/v1/models", headers=page)) as response:
                assert response.headers["access-control-allow-origin"] == allowed


def test_metrics_count_what_was_said(model: llamachat.Model) -> None:
    with serving(model) as server, connected(server) as client:
        client.completions.create(
            model=name(client),
            prompt=[5, 6, 7],
            n=2,
            max_tokens=9,
            logit_bias=ENDLESS,  # type: ignore[arg-type]
        )
        text = metrics(server)
    for line in (
        'llamachat_requests_total{end="ok"} 1.0',
        "llamachat_prompt_tokens_total 3.0",
        "llamachat_reply_tokens_total 18.0",
        "llamachat_time_to_first_token_seconds_count 1.0",
        "llamachat_rows_running 0.0",
    ):
        assert line in text.splitlines()


def metrics(server: Server) -> str:
    with urlopen(f"{server.url}/metrics") as response:
        text: str = response.read().decode()
        return text
