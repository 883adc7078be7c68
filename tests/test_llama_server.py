"""The client against a real llama-server, the program that LLAMACHAT_TEST_LLAMA_SERVER names."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from endpoints import (
    GREEDY,
    KEY,
    QUESTION,
    AsEveryServer,
    ask,
    free_port,
    serving,
    talk,
    text,
)

from llamachat.chat.endpoint import Endpoint, parse_endpoint
from llamachat.chat.events import Text
from llamachat.chat.options import Options, Said
from llamachat.chat.remote import connect
from llamachat.errors import UsageError


@pytest.fixture(scope="module")
def server(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server of a small model that was trained, and wants a key."""
    program = os.environ.get("LLAMACHAT_TEST_LLAMA_SERVER")
    if not program:
        pytest.skip("LLAMACHAT_TEST_LLAMA_SERVER is not set")
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY)
    port = free_port()
    settings = {
        "--model": str(data / "models/stories260K/stories260K.gguf"), "--alias": "stories",
        "--host": "127.0.0.1", "--port": port, "--api-key-file": str(key),
        "--threads": "1", "--parallel": "1", "--ctx-size": "512",
    }  # fmt: skip
    command = [program, *(word for pair in settings.items() for word in pair)]
    endpoint = parse_endpoint(f"127.0.0.1:{port}", KEY)
    with serving(command, endpoint, end=signal.SIGKILL):  # idle connections would keep it
        yield endpoint


class TestLlamaServer(AsEveryServer):
    model = "stories"


def test_the_most_typical_token_is_the_same_for_every_seed(server: Endpoint) -> None:
    drawn = {text(server, temperature=2.0, typical_p=1e-6, top_p=1.0, seed=it) for it in (1, 2)}
    assert len(drawn) == 1


def test_the_order_of_filters_is_followed(server: Endpoint) -> None:
    """After a temperature that levels all, a min-p that leaves the best one leaves many."""
    said = {"temperature": 5000.0, "min_p": 0.99, "top_p": 1.0, "seed": 3}
    last, first = ("min_p", "temperature"), ("temperature", "min_p")
    assert text(server, samplers=last, **said) == text(server, **GREEDY)
    assert text(server, samplers=first, **said) != text(server, **GREEDY)


def test_a_bias_decides(server: Endpoint) -> None:
    session = talk(server, {**GREEDY, "logit_bias": ((300, 100.0),)}, max_new_tokens=4)
    spoken = ask(session).text.strip()
    unit = spoken[: len(spoken) // 4]
    assert unit
    assert spoken.replace(" ", "") == unit.replace(" ", "") * 4


def test_a_bias_that_the_server_would_drop_is_refused(server: Endpoint) -> None:
    with pytest.raises(UsageError, match="0 to 511"):
        text(server, logit_bias=((512, 5.0),))


def test_a_repetition_penalty_looks_at_the_whole_conversation(server: Endpoint) -> None:
    said = {**GREEDY, "logit_bias": ((300, 40.0),)}
    (favourite,) = ask(talk(server, said, max_new_tokens=1)).text.split()
    long_ago = f"The {favourite} dog. " + "The big dog ran to the red car. " * 12
    penalized = talk(server, {**said, "repetition_penalty": 1000.0}, max_new_tokens=1)
    assert ask(talk(server, said, max_new_tokens=1), long_ago).text.strip() == favourite
    assert ask(penalized, long_ago).text.strip() != favourite


def test_a_seed_that_the_server_would_take_for_another_is_refused(server: Endpoint) -> None:
    with pytest.raises(UsageError, match="--seed"):
        text(server, seed=1 << 32)


def test_tokens_are_counted_and_reused(server: Endpoint) -> None:
    session = talk(server, GREEDY, max_new_tokens=5)
    first, second = ask(session), ask(session, "And then?")
    assert (first.finish_reason, first.completion_tokens) == ("length", 5)
    assert first.prompt_tokens <= second.reused_tokens < second.prompt_tokens


def test_an_interrupted_reply_leaves_the_server_free(server: Endpoint) -> None:
    session = talk(server, {**GREEDY, "logit_bias": ((2, -100.0),)}, max_new_tokens=None)
    reply = session.send(QUESTION)
    assert any(isinstance(event, Text) for event in reply)
    reply.close()
    assert session.messages[-1].content
    assert ask(talk(server, GREEDY)).finish_reason == "length"


def test_every_field_that_is_sent_arrives(server: Endpoint) -> None:
    """The server says what it makes of a request; what it leaves as it was is one it dropped."""
    said = Said(
        temperature=0.5, top_k=7, top_p=0.5, min_p=0.25, typical_p=0.75, repetition_penalty=1.5,
        frequency_penalty=0.5, presence_penalty=0.25,
    )  # fmt: skip
    model = connect(server, None, lambda _: None)
    sent = model.dialect.fields(Options(said).decoding(), 512)
    body = {**sent, "seed": 9, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    request = Request(
        f"{server.url}/chat/completions",
        json.dumps({**body, "verbose": True}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urlopen(request, timeout=10) as response:
        understood = json.load(response)["__verbose"]["generation_settings"]
    assert {name: understood.get(name) for name in sent} == sent
