"""Replies in the words of the OpenAI protocol, whole or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llamachat.chat.events import Text
from llamachat.chat.reply import Reply
from llamachat.chat.spoken import text_of
from llamachat.engine.events import Done, EngineEvent, Probabilities, Probability
from llamachat.serving.metrics import Metrics
from llamachat.serving.worker import Stream
from llamachat.tokenizer import Tokenizer

Kind = Literal["chat.completion", "text_completion"]
LEAST_LOGPROB = -9999.0  # what OpenAI says for minus infinity, which JSON has not


@dataclass(slots=True)
class Piece:
    """What one reply has more."""

    index: int
    text: str = ""
    tokens: list[Probabilities] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # where in the text each begins
    finish_reason: str | None = None
    is_first: bool = False


class Answer:
    """All replies to one prompt, on their way.

    Attributes:
        stream: what the engine says.
        head: what every part of the response has.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        stream: Stream,
        replies: Sequence[Reply],
        *,
        alternatives: int | None,
        metrics: Metrics,
    ) -> None:
        """Nothing has come yet.

        Args:
            kind: of request.
            model: its name.
            stream: what the engine says.
            replies: make text of it.
            alternatives: told beside each token; None: no probabilities.
            metrics: told how it goes.
        """
        self.stream = stream
        self._kind = kind
        self._replies = replies
        self._alternatives = alternatives
        self._metrics = metrics
        self._tokenizer: Tokenizer = replies[0].tokenizer
        self._spoke = [False] * len(replies)
        self._ended = [False] * len(replies)
        self._is_told = False
        self.head = {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def streams(self) -> tuple[Stream, ...]:
        """What the engine says."""
        return (self.stream,)

    @property
    def n(self) -> int:
        """How many replies there are."""
        return len(self._replies)

    async def whole(self) -> dict[str, Any]:
        """The response, once all replies are over."""
        wholes = [Piece(i) for i in range(len(self._replies))]
        async for pieces in self._pieces():
            for piece in pieces:
                whole = wholes[piece.index]
                whole.text += piece.text
                whole.tokens += piece.tokens
                whole.offsets += piece.offsets
                whole.finish_reason = piece.finish_reason
        choices = [self._choice(whole, is_whole=True) for whole in wholes]
        return {**self.head, "object": self._kind, "choices": choices, "usage": self.usage}

    async def chunks(self, *, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The parts of a streamed response; with `usage` the last tells what was used."""
        name = "chat.completion.chunk" if self._kind == "chat.completion" else self._kind
        head = {**self.head, "object": name}
        none = {"usage": None} if usage else {}
        async for pieces in self._pieces():
            for piece in pieces:
                yield {**head, "choices": [self._choice(piece, is_whole=False)], **none}
        if usage:
            yield {**head, "choices": [], "usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, and of all replies."""
        prompt = len(self.stream.request.ids)
        said = sum(len(reply.ids) for reply in self._replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": self._replies[0].reused},
        }

    def account(self, end: str) -> None:
        """Tell the metrics how it ended: once."""
        if self._is_told:
            return
        self._is_told = True
        metrics = self._metrics
        metrics.requests.labels(end).inc()
        metrics.prompt_tokens.inc(len(self.stream.request.ids))
        metrics.reused_tokens.inc(self._replies[0].reused)
        for reply in self._replies:
            metrics.reply_tokens.inc(len(reply.ids))
            timings = reply.timings()
            spent = timings.prefill_s + timings.decode_s - timings.ttft_s
            if len(reply.ids) > 1 and spent > 0:
                metrics.rate.observe((len(reply.ids) - 1) / spent)

    async def _pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, as often as there is something; at most one piece of each reply."""
        async for told in self.stream:
            pieces: dict[int, Piece] = {}
            for i, event in told:
                for text in self._followed(i, event):
                    piece = pieces.setdefault(i, Piece(i, is_first=not self._spoke[i]))
                    if not any(self._spoke):
                        self._metrics.ttft.observe(time.perf_counter() - self._replies[0].began)
                    self._spoke[i] = True
                    self._add(piece, text)
            if pieces:
                yield list(pieces.values())

    def _add(self, piece: Piece, text: Text) -> None:
        reply = self._replies[piece.index]
        if text.probabilities is not None:
            piece.tokens.append(text.probabilities)
            piece.offsets.append(len(reply.text) - len(text.text))
        piece.text += text.text
        piece.finish_reason = reply.finish_reason if self._ended[piece.index] else None

    def _followed(self, i: int, event: EngineEvent) -> Iterator[Text]:
        """An event as text; where it is the end, some text comes last, though it may be empty."""
        reply = self._replies[i]
        for shown in reply.follow(iter((event,))):
            if isinstance(shown, Text):
                yield shown
        if isinstance(event, Done):
            self._ended[i] = True
            yield Text(reply.flush())

    def _choice(self, piece: Piece, *, is_whole: bool) -> dict[str, Any]:
        end = {"index": piece.index, "finish_reason": piece.finish_reason}
        if self._kind == "text_completion":
            return {"text": piece.text, "logprobs": self._of_text(piece), **end}
        role = {"role": "assistant"} if is_whole or piece.is_first else {}
        message: dict[str, Any] = {**role, "content": piece.text}
        if is_whole:
            message["refusal"] = None
        content = [self._token(known) for known in piece.tokens]
        logprobs = None if self._alternatives is None else {"content": content, "refusal": None}
        return {"message" if is_whole else "delta": message, "logprobs": logprobs, **end}

    def _token(self, known: Probabilities) -> dict[str, Any]:
        """A token as the chat protocol tells it."""
        top = known.top[: self._alternatives]
        return {**self._one(known.chosen), "top_logprobs": [self._one(other) for other in top]}

    def _one(self, it: Probability) -> dict[str, Any]:
        raw = list(self._tokenizer.token_bytes(it.id))
        return {"token": self._spelled(it), "logprob": _number(it), "bytes": raw or None}

    def _of_text(self, piece: Piece) -> dict[str, Any] | None:
        """Tokens as the older protocol tells them."""
        if self._alternatives is None:
            return None
        return {
            "tokens": [self._spelled(known.chosen) for known in piece.tokens],
            "token_logprobs": [_number(known.chosen) for known in piece.tokens],
            "top_logprobs": [
                {self._spelled(it): _number(it) for it in known.top[: self._alternatives]}
                for known in piece.tokens
            ],
            "text_offset": piece.offsets,
        }

    def _spelled(self, it: Probability) -> str:
        return text_of(it.id, self._tokenizer)


def _number(it: Probability) -> float:
    return max(it.logprob, LEAST_LOGPROB)
