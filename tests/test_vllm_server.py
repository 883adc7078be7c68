"""The client against a real vLLM, the program that LLAMACHAT_TEST_VLLM names.

LLAMACHAT_TEST_VLLM_MODEL is the folder of a small chat model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import (
    GREEDY,
    KEY,
    QUESTION,
    AsEveryServer,
    ask,
    free_port,
    run_at,
    serving,
    talk,
    text,
)

from llamachat.chat.endpoint import Endpoint, parse_endpoint
from llamachat.chat.events import Text
from llamachat.chat.remote import connect
from llamachat.errors import UsageError

CTX_SIZE = 512
START_S = 300
# The memory of a CPU build, in GiB; it sends nothing to anyone.
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    """A server of a small model that wants a key."""
    program, model = (os.environ.get(f"LLAMACHAT_TEST_VLLM{it}") for it in ("", "_MODEL"))
    if not (program and model):
        pytest.skip("LLAMACHAT_TEST_VLLM and LLAMACHAT_TEST_VLLM_MODEL are not both set")
    port = free_port()
    settings = {
        "--served-model-name": "small", "--host": "127.0.0.1", "--port": port, "--api-key": KEY,
        "--max-model-len": str(CTX_SIZE), "--dtype": "float32",
    }  # fmt: skip
    words = [word for pair in settings.items() for word in pair]
    endpoint = parse_endpoint(f"127.0.0.1:{port}", KEY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        command = [program, "serve", model, *words, "--enforce-eager"]
        with serving(command, endpoint, end=signal.SIGTERM, seconds=START_S):
            yield endpoint


class TestVLLM(AsEveryServer):
    model = "small"


def test_the_server_tells_its_kind_and_its_context(server: Endpoint) -> None:
    facts = connect(server, None, lambda _: None).facts
    assert (facts["model"], facts["server"], facts["ctx_size"]) == ("small", "vLLM", CTX_SIZE)


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 1.9}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}],
)
def test_a_penalty_changes_a_list_of_many(server: Endpoint, penalty: dict[str, float]) -> None:
    plain, penalized = (
        ask(talk(server, {**GREEDY, **it}, max_new_tokens=60), "List ten animals").text
        for it in ({}, penalty)
    )
    assert plain != penalized


def test_a_bias_decides(server: Endpoint) -> None:
    done = ask(talk(server, {**GREEDY, "logit_bias": ((300, 100.0),)}, logprobs=1))
    assert len(done.logprobs) == 12
    assert len({known.chosen.id for known in done.logprobs}) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"typical_p": 0.5}, "--typical-p"),
        ({"strategy": "beam:4"}, "--num-beams"),
        ({"samplers": ("top_k", "temperature")}, "--samplers"),
        ({"no_repeat_ngram_size": 2}, "--no-repeat-ngram-size"),
        ({"seed": 1 << 63}, "--seed"),
        ({"logit_bias": ((300, 101.0),)}, "300=101"),
    ],
)
def test_what_the_server_does_not_take_is_named(
    server: Endpoint, said: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        text(server, **said)


def test_what_the_server_refuses_late_is_a_refusal(server: Endpoint) -> None:
    """Its status is 200, and the only event of the stream says 400."""
    with pytest.raises(UsageError, match=r"the server refuses this: .*logit_bias"):
        text(server, logit_bias=((10_000_000, 5.0),))


def test_tokens_are_counted(server: Endpoint) -> None:
    done = ask(talk(server, GREEDY, max_new_tokens=5))
    assert (done.finish_reason, done.completion_tokens) == ("length", 5)
    assert 0 < done.prompt_tokens < CTX_SIZE


def test_a_reply_may_be_bounded_by_more_than_the_context(server: Endpoint) -> None:
    replies = [ask(talk(server, GREEDY, max_new_tokens=it)) for it in (10 * CTX_SIZE, None)]
    assert replies[0].text == replies[1].text != ""


def test_an_interrupted_reply_leaves_the_server_free(server: Endpoint) -> None:
    reply = (session := talk(server, GREEDY, max_new_tokens=None)).send(QUESTION)
    assert any(isinstance(event, Text) for event in reply)
    reply.close()
    assert session.messages[-1].content
    assert ask(talk(server, GREEDY)).finish_reason == "length"


def test_strategies_are_compared_through_pipes(server: Endpoint, tmp_path: Path) -> None:
    asked = ("compare", "Hi", "-n", "5", "--with", "greedy", "--with", "top-p:0.8,seed=3")
    ended = run_at(server, tmp_path, *asked)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"greedy" in ended.stdout
    assert b"top-p:0.8" in ended.stdout
