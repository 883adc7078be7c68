"""Servers that are programs of others, and conversations with them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from programs import LLAMACHAT, run

from llamachat.chat.endpoint import Endpoint, parse_endpoint
from llamachat.chat.events import Done
from llamachat.chat.options import Options, Said
from llamachat.chat.pieces import AsMessages
from llamachat.chat.remote import connect
from llamachat.chat.session import ChatSession
from llamachat.errors import AccessError, ModelNotFoundError, PromptTooLongError

QUESTION = "Once upon a time"
KEY = "s3cret"
GREEDY = {"strategy": "greedy"}


def free_port() -> str:
    """One of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], endpoint: Endpoint, *, end: signal.Signals, seconds: float = 30
) -> Iterator[None]:
    """While it lasts, a program answers at the endpoint; `end` is what it is told to end by."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=silent, stdout=silent, stderr=silent, start_new_session=True
    ) as process:
        try:
            _until_healthy(endpoint, process, seconds)
            yield
        finally:
            process.send_signal(end)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _until_healthy(endpoint: Endpoint, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(f"{endpoint.root}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the server does not start")


def talk(endpoint: Endpoint, said: dict[str, Any] | None = None, **settings: Any) -> ChatSession:
    """A conversation with the only model of a server."""
    settings = {"max_new_tokens": 12, **settings}
    options = Options(Said(**said or {}))
    server = connect(endpoint, None, lambda _: None)
    return ChatSession(server, template=AsMessages(), options=options, **settings)


def ask(session: ChatSession, question: str = QUESTION) -> Done:
    """How the reply to a question ended, which is well."""
    *_, done = session.send(question)
    assert isinstance(done, Done)
    assert done.problem is None
    return done


def text(endpoint: Endpoint, **said: Any) -> str:
    """The reply to the usual question."""
    return ask(talk(endpoint, said)).text


def run_at(
    endpoint: Endpoint, home: Path, *words: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """`llamachat` with these words, of which the server answers; it has ended."""
    (home / "key").write_text(KEY)
    place = ("--endpoint", endpoint.url, "--api-key-file", str(home / "key"))
    return run((*LLAMACHAT, *words, *place), home, stdin=stdin)


class AsEveryServer:
    """Tests of a module whose fixture `server` has a context of 512 tokens and wants the key."""

    model: str  # as the server calls it

    def test_a_seed_repeats_its_reply(self, server: Endpoint) -> None:
        texts = [text(server, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
    def test_a_filter_that_leaves_one_token_is_greedy(
        self, server: Endpoint, filters: dict[str, float]
    ) -> None:
        assert text(server, temperature=2.0, seed=5, **filters) == text(server, **GREEDY)

    def test_a_stop_string_ends_the_reply(self, server: Endpoint) -> None:
        whole = text(server, **GREEDY)
        stop = whole[5:8]
        done = ask(talk(server, GREEDY, stop=[stop]))
        assert (done.text, done.finish_reason) == (whole[: whole.index(stop)], "stop")

    def test_probabilities_are_those_of_the_choice(self, server: Endpoint) -> None:
        done = ask(talk(server, GREEDY, logprobs=3, max_new_tokens=5))
        assert len(done.logprobs) == 5
        for known in done.logprobs:
            assert known.chosen.id == known.top[0].id
            assert [it.logprob for it in known.top] == sorted(it.logprob for it in known.top)[::-1]

    def test_a_reply_goes_on_where_it_stopped(self, server: Endpoint) -> None:
        session = talk(server, GREEDY, max_new_tokens=10)
        ask(session)
        list(session.continue_())
        assert session.messages[-1].content == ask(talk(server, GREEDY, max_new_tokens=20)).text

    def test_a_prompt_that_is_too_long_is_told_as_that(self, server: Endpoint) -> None:
        endpoint = connect(server, None, lambda _: None, ctx_size=100_000)
        session = ChatSession(endpoint, template=AsMessages(), options=Options(Said()))
        with pytest.raises(PromptTooLongError, match="512"):
            ask(session, "word " * 600)

    @pytest.mark.parametrize("key", [None, "wrong"])
    def test_without_the_key_nobody_gets_in(self, server: Endpoint, key: str | None) -> None:
        with pytest.raises(AccessError):
            ask(talk(parse_endpoint(server.url, key)))

    def test_a_model_that_is_not_there_is_told(self, server: Endpoint) -> None:
        with pytest.raises(ModelNotFoundError, match="other"):
            connect(server, "other", lambda _: None)

    def test_one_shot_answers_come_through_pipes(self, server: Endpoint, tmp_path: Path) -> None:
        ended = run_at(server, tmp_path, "chat", "--json", "-n", "5", stdin=b"Hi")
        told = json.loads(ended.stdout)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert (told["model"], told["completion_tokens"]) == (self.model, 5)
