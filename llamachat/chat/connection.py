"""What goes to a server of the OpenAI protocol and comes back: chunks, or errors in our words."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from llamachat.chat.endpoint import Endpoint
from llamachat.errors import (
    AccessError,
    LlamachatError,
    ModelNotFoundError,
    PromptTooLongError,
    TransferError,
    UsageError,
)

if TYPE_CHECKING:
    import httpx2
    from openai import APIConnectionError, APIStatusError, OpenAI, Stream
    from openai.types.chat import ChatCompletionChunk

PAUSES_S = (0.5, 1.0)  # before what failed before any text is tried again, where nobody says
MOST_PAUSE_S = 60.0
MOST_WORDS = 300  # characters of a server's own message that are shown
_REFUSALS = (400, 405, 413, 415, 422)
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum context|max_model_len|exceed_context|"
    r"prompt is too long|(inputs|input tokens).{0,40}(exceed|must|longer|less)",
    re.IGNORECASE,
)


class Connection:
    """A server that is asked.

    Attributes:
        endpoint: where it is.
    """

    def __init__(self, endpoint: Endpoint, notice: Callable[[str], None]) -> None:
        """Nothing is sent yet.

        Args:
            endpoint: where the server is.
            notice: told why something takes longer.

        Raises:
            UsageError: the `openai` library is not installed.
        """
        self.endpoint = endpoint
        self._notice = notice
        self._client = _client(endpoint)
        self._headers = _headers(endpoint)
        _warm_up()

    def get(self, path: str) -> Any:
        """What the server tells at a path, or a whole address; None where there is nothing.

        Raises:
            LlamachatError: it cannot be reached, or refuses.
        """
        import httpx2

        brief = httpx2.Timeout(30.0, connect=self.endpoint.timeouts.connect_s)
        options: Any = {"timeout": brief, "headers": self._headers}
        try:
            return self._retried(lambda: self._client.get(path, cast_to=object, options=options))
        except ModelNotFoundError:
            return None

    def stream(self, request: Mapping[str, Any]) -> Generator[ChatCompletionChunk, None, None]:
        """The chunks of a reply, as they come; closed with the generator.

        Raises:
            LlamachatError: the server refuses, is silent for too long, or breaks off.
        """
        raw = self._retried(
            lambda: self._client.chat.completions.with_raw_response.create(
                **request,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=self._headers,
            )
        )
        response: httpx2.Response = raw.http_response
        try:
            kind = raw.headers.get("content-type", "no type")
            if not kind.startswith("text/event-stream"):
                raise TransferError(
                    f"{self.endpoint.url}: the server sent {self._clean(kind)}, "
                    "expected text/event-stream",
                    hint="is this a server of the OpenAI protocol?",
                )
            with self._waiting(response) as heard:
                yield from self._chunks(raw.parse(), heard)
        finally:
            response.close()

    def _chunks(
        self, stream: Stream[ChatCompletionChunk], heard: Callable[[], None]
    ) -> Iterator[ChatCompletionChunk]:
        """What comes of the stream, until it says that the reply is over."""
        import httpx2
        import openai

        is_begun, is_over = False, False
        try:
            for chunk in stream:
                heard()
                is_begun = True
                is_over = is_over or any(it.finish_reason for it in chunk.choices)
                yield chunk
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = self._clean(error.__cause__ or error)
            raise TransferError(f"the reply broke off: {cause}") from None
        except openai.APIError as error:
            told = self._clean(error.message)
            if not is_begun and error.code in {str(it) for it in _REFUSALS}:  # vLLM, of some fields
                raise _refusal(told, error.body) from None
            raise TransferError(f"the server failed: {told}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TransferError("the server sent an event that is not understood") from error
        if not is_over:
            raise TransferError("the reply broke off: the stream ended before it did")

    @contextmanager
    def _waiting(self, response: httpx2.Response) -> Iterator[Callable[[], None]]:
        """While it lasts, silence for too long is an error; call what it gives when it ends."""
        stream = response.extensions.get("network_stream")
        connection = stream.get_extra_info("socket") if stream is not None else None
        timeouts = self.endpoint.timeouts
        patience = Patience(timeouts.first_s, lambda: _shut(connection))
        try:
            yield lambda: patience.renew(timeouts.next_s)
        except TransferError:
            if patience.is_over:
                silent = f"the server was silent for {patience.seconds:g} s"
                raise TransferError(silent, hint="--timeouts CONNECT,FIRST,NEXT") from None
            raise
        finally:
            patience.end()

    def _retried(self, ask: Callable[[], Any]) -> Any:
        """The answer, after some patience with a server that is not there or has no time yet."""
        import openai

        for pause in (*PAUSES_S, None):
            try:
                return ask()
            except openai.APIStatusError as error:
                if pause is None or error.status_code not in (429, 503):
                    raise self._refused(error) from None
                pause, why = _asked_pause(error, pause), f"the server is busy ({error.status_code})"
            except openai.APIConnectionError as error:
                if pause is None or not _may_be_repeated(error):
                    raise self._unreached(error) from None
                why = "the server does not answer"
            except (openai.APIError, ValueError, RecursionError) as error:
                raise TransferError(
                    f"{self.endpoint.url}: the answer is not understood: {self._clean(error)}"
                ) from None
            self._notice(f"{why}: asking again in {pause:g} s")
            time.sleep(pause)
        raise AssertionError("the last time ends it")

    def _unreached(self, error: APIConnectionError) -> LlamachatError:
        import openai

        url, timeouts = self.endpoint.url, self.endpoint.timeouts
        if isinstance(error, openai.APITimeoutError) and not _may_be_repeated(error):
            return TransferError(
                f"{url}: no answer within {timeouts.first_s:g} s",
                hint="--timeouts CONNECT,FIRST,NEXT",
            )
        cause = self._clean(error.__cause__ or error)
        return TransferError(f"{url}: {cause}", hint="is the server running there?")

    def _refused(self, error: APIStatusError) -> LlamachatError:
        """What a status means, with the server's own words."""
        status, url = error.status_code, self.endpoint.url
        told = self._clean(_message(error) or f"status {status}")
        if 300 <= status < 400:
            elsewhere = self._clean(error.response.headers.get("location", "nowhere"))
            return TransferError(
                f"{url}: the server sends us elsewhere: {elsewhere}",
                hint="--endpoint with that address, if you trust it",
            )
        if status in (401, 403):
            hint = "--api-key-file FILE, or OPENAI_API_KEY"
            if self.endpoint.key is not None:
                return AccessError(f"{url}: the server refuses the key: {told}", hint=hint)
            return AccessError(f"{url}: the server wants a key: {told}", hint=hint)
        if status == 404:
            hint = "-m NAME names a model of the server; the address ends with /v1 mostly"
            return ModelNotFoundError(f"{url}: {told}", hint=hint)
        if status in _REFUSALS:
            return _refusal(told, error.body)
        return TransferError(f"{url}: the server failed with status {status}: {told}")

    def _clean(self, words: object) -> str:
        """Words of others on one line, not too many, and never the key."""
        text = " ".join(str(words).split())
        if self.endpoint.key:
            text = text.replace(self.endpoint.key, "***")
        return text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}…"


class Patience:
    """Does something once, in a thread, when it is not renewed in time.

    Attributes:
        seconds: that it lasts.
        is_over: whether it came to that.
    """

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self.seconds = seconds
        self.is_over = False
        self._until = time.monotonic() + seconds
        self._give_up = give_up
        self._ended = threading.Event()
        self._changed = threading.Event()
        threading.Thread(target=self._wait, name="patience", daemon=True).start()

    def renew(self, seconds: float) -> None:
        """From now on it lasts so long."""
        is_sooner = seconds < self.seconds
        self.seconds, self._until = seconds, time.monotonic() + seconds
        if is_sooner:
            self._changed.set()

    def end(self) -> None:
        """It is needed no more."""
        self._ended.set()
        self._changed.set()

    def _wait(self) -> None:
        while not self._ended.is_set():
            left_s = self._until - time.monotonic()
            if left_s <= 0:
                self.is_over = True
                self._give_up()
                return
            self._changed.wait(left_s)
            self._changed.clear()


def _shut(connection: socket.socket | None) -> None:
    """End a connection, so that whoever reads from it knows."""
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _client(endpoint: Endpoint) -> OpenAI:
    try:
        import httpx2
        from openai import OpenAI

        from llamachat.chat.bounds import bounded_client
    except ImportError:
        raise UsageError(
            "--endpoint needs the openai library", hint='pip install "llamachat[endpoint]"'
        ) from None
    timeouts = endpoint.timeouts
    return OpenAI(
        base_url=endpoint.url,
        api_key=endpoint.key or "none",
        max_retries=0,  # it repeats what may have been computed, too, and says nothing
        timeout=httpx2.Timeout(timeouts.first_s, connect=timeouts.connect_s),
        http_client=bounded_client(trust_env=not endpoint.is_local),  # a proxy is elsewhere
    )


def _warm_up() -> None:
    """Have the library prepare for chunks now; it would do so between the first and its text."""
    from openai.types.chat import ChatCompletionChunk

    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": None}
    ChatCompletionChunk.construct(id="", choices=[choice], usage=None)


def _headers(endpoint: Endpoint) -> dict[str, Any]:
    """No key is sent where there is none; the library insists on one otherwise."""
    from openai import Omit

    return {} if endpoint.key else {"Authorization": Omit()}


def _may_be_repeated(error: APIConnectionError) -> bool:
    """Whether the server cannot have begun to answer."""
    import httpx2

    return isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)


def _asked_pause(error: APIStatusError, usual_s: float) -> float:
    """The seconds that the server asks for, within reason."""
    asked = error.response.headers.get("retry-after", "")
    return min(float(asked), MOST_PAUSE_S) if re.fullmatch(r"\d{1,9}(\.\d+)?", asked) else usual_s


def _refusal(told: str, body: object) -> LlamachatError:
    """That a request will not do: its prompt is too long, or something else."""
    if _TOO_LONG.search(f"{told} {body}"):
        return PromptTooLongError(
            f"the context of the server is full: {told}", hint="/undo, /clear, or ask for less"
        )
    return UsageError(f"the server refuses this: {told}")


def _message(error: APIStatusError) -> str:
    """What the body of an error says, of the forms that servers have."""
    body: Any = error.body
    if isinstance(body, Mapping):
        inner = body.get("error")
        inner = inner.get("message") if isinstance(inner, Mapping) else inner
        told = body.get("message") or inner or body.get("detail")
        if told:
            return told if isinstance(told, str) else json.dumps(told)
    kind = error.response.headers.get("content-type", "")
    return "" if "html" in kind else str(body or "")
