"""A model on a server: what a conversation needs of a model, with the text from elsewhere.

A conversation is the messages that the server is sent; what comes back are pieces of text. See
`pieces` for what stands in the place of ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llamachat.chat.connection import Connection
from llamachat.chat.context import UNBOUNDED
from llamachat.chat.dialects import TGI, UNKNOWN, Dialect, dialect_of
from llamachat.chat.endpoint import Endpoint
from llamachat.chat.pieces import Pieces
from llamachat.chat.reply import Ends
from llamachat.engine.events import (
    Done,
    EngineEvent,
    Prefill,
    Probabilities,
    Probability,
    Token,
    Usage,
)
from llamachat.errors import ModelNotFoundError, PromptTooLongError, TransferError, UsageError

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk

    from llamachat.engine.decoding import Decoding

_ENDINGS = {"length": "length", "stop": "stop", "eos_token": "stop", "stop_sequence": "stop"}
_CUT = ("content_filter", "abort", "error", "tool_calls", "function_call")
_MOST_TEXT = 1 << 24  # bytes of a reply
_MOST_COUNT = 1 << 53


@dataclass(frozen=True, slots=True)
class Server:
    """A model of a server.

    Attributes:
        name: what the server calls it.
        endpoint: where it is.
        dialect: what the server takes.
        engine: asks it.
        tokenizer: numbers pieces of text.
        sampling: the server suggests nothing.
        chat_template: the server writes conversations by itself.
    """

    name: str
    endpoint: Endpoint
    dialect: Dialect
    engine: Remote
    tokenizer: Pieces
    sampling: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    chat_template: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What replies record of it, ready for JSON; see `provenance.facts`."""
        known = self.engine.ctx_size
        return {
            "model": self.name,
            "source": "endpoint",
            "endpoint": self.endpoint.url,
            "server": self.dialect.name,
            "ctx_size": None if known == UNBOUNDED else known,
        }


@dataclass(frozen=True, slots=True)
class Remote:
    """What a server computes, as an engine tells it. One thread asks at a time."""

    connection: Connection
    model: str
    dialect: Dialect
    pieces: Pieces
    ctx_size: int = UNBOUNDED
    fields: Mapping[str, Any] = field(default_factory=dict)  # that every request has

    def generate(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        logprobs: int = 0,
        draft: int = 0,
        stop_loops: int = 0,
        turn: int = 0,
        attempt: int = 0,
        continued: int = 0,
    ) -> Generator[EngineEvent, None, None]:
        """See `Engine.generate`. Another attempt has the next seed.

        Raises:
            UsageError: the server cannot do it.
            LlamachatError: see `Connection.stream`, before any text came.
        """
        for flag, is_asked in (("--speculate", draft), ("--stop-loops", stop_loops)):
            if is_asked:
                raise self.dialect.refusal(flag)
        request = {
            "model": self.model,
            "messages": self.pieces.messages(ids),
            **_limits(max_new_tokens, ends, logprobs),
        }
        asked = self.dialect.fields(decoding, self.ctx_size)
        further = {**self.fields, **asked, **self._goes_on(continued)}
        if decoding.seed is not None:
            further["seed"] = self.dialect.seed(decoding.seed + attempt)
        yield Prefill(0, len(ids), 0)
        with closing(self._chunks({**request, "extra_body": further})) as chunks:
            yield from self._followed(chunks, len(ids), ends, list(ids[len(ids) - continued :]))

    def generate_many(
        self, ids: Sequence[int], decodings: Sequence[Decoding], **settings: Any
    ) -> Generator[tuple[int, EngineEvent], None, None]:
        """See `Engine.generate_many`; the server is asked once for each, one after the other."""
        for decoding in decodings:
            self.dialect.fields(decoding)
        for index, decoding in enumerate(decodings):
            with closing(self.generate(ids, decoding, **settings)) as events:
                for event in events:
                    yield index, event

    def _chunks(self, request: Mapping[str, Any]) -> Generator[ChatCompletionChunk, None, None]:
        """What the server sends. Some refuse to bound a reply by more than the context has left:
        one that has no bound ends there.
        """
        try:
            yield from self.connection.stream(request)
        except PromptTooLongError:
            if "max_tokens" not in request:
                raise
            unbound = {name: it for name, it in request.items() if name != "max_tokens"}
            yield from self.connection.stream(unbound)

    def _goes_on(self, continued: int) -> Mapping[str, Any]:
        """What makes the server go on with the reply that is there."""
        if not continued:
            return {}
        if self.dialect.goes_on is None:
            raise UsageError(
                f"/continue: {self.dialect.name} only begins replies", hint="ask it to go on"
            )
        return self.dialect.goes_on

    def _followed(
        self,
        chunks: Iterator[ChatCompletionChunk],
        n_prompt: int,
        ends: Callable[[Sequence[int]], bool] | None,
        said: list[int],
    ) -> Iterator[EngineEvent]:
        """What a stream says. One that breaks off ends the reply, unless it had not begun."""
        begun, size = len(said), 0
        reason, usage = "", None
        try:
            for chunk in chunks:
                tokens, counted, ended = self._read(chunk)
                tokens = [] if reason else tokens  # what comes after the end is none of it
                usage, reason = counted or usage, reason or ended
                size += sum(len(self.pieces.token_bytes(token.id)) for token in tokens)
                if size > _MOST_TEXT:
                    raise TransferError(f"the reply has more than {_MOST_TEXT >> 20} MiB")
                for token in tokens:
                    if len(said) == begun:
                        yield Prefill(n_prompt, n_prompt, 0)
                    said.append(token.id)
                    yield token
                    if ends is not None and ends(said):  # the server may not know all of them
                        yield Done("stop", usage=usage)
                        return
            if reason in _CUT:
                raise TransferError(f"the server cut the reply: {reason}")
        except TransferError as error:
            if len(said) == begun:
                raise
            yield Done("interrupted", usage=usage, problem=error)
            return
        if len(said) == begun:
            yield Prefill(n_prompt, n_prompt, 0)
        yield Done(_ENDINGS.get(reason, "stop"), usage=usage)

    def _read(self, chunk: ChatCompletionChunk) -> tuple[list[Token], Usage | None, str]:
        """What a chunk says; the library lets servers say anything."""
        try:
            ended = next((str(it.finish_reason) for it in chunk.choices if it.finish_reason), "")
            return list(self._tokens(chunk)), _usage(chunk), ended
        except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
            raise TransferError("the server sent an event that is not understood") from error

    def _tokens(self, chunk: ChatCompletionChunk) -> Iterator[Token]:
        """The tokens of a chunk: those whose probabilities it tells, else its text as one."""
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        raw = (choice.delta.content or "").encode("utf-8", "replace")
        told = (choice.logprobs.content if choice.logprobs else None) or []
        known = [self._probabilities(one) for one in told]
        texts = [self.pieces.token_bytes(it.chosen.id) for it in known]
        if len(known) > 1 and b"".join(texts) == raw:
            yield from (Token(it.chosen.id, it) for it in known)
        elif known:  # the text is what the chunk says: a token may be one that is never shown
            yield from (Token(self.pieces.id_of(b""), it) for it in known[:-1])
            yield Token(self.pieces.id_of(raw), known[-1])
        elif raw:
            yield Token(self.pieces.id_of(raw))

    def _probabilities(self, told: Any) -> Probabilities:
        top = tuple(self._probability(one) for one in told.top_logprobs or ())
        return Probabilities(self._probability(told), top)

    def _probability(self, told: Any) -> Probability:
        """One token's, by the model alone; what filters make of it a server does not tell."""
        raw = bytes([*told.bytes]) if told.bytes else str(told.token).encode("utf-8", "replace")
        logprob = float(told.logprob)
        if not math.isfinite(logprob):
            raise ValueError(f"{logprob} is no probability")
        return Probability(self.pieces.id_of(raw), logprob, math.nan)


def connect(
    endpoint: Endpoint,
    name: str | None,
    notice: Callable[[str], None],
    *,
    ctx_size: int | None = None,
) -> Server:
    """Find out what a server is, and which of its models to talk to.

    Args:
        endpoint: where it is.
        name: of the model; default the only one that it has.
        notice: told what the user should know.
        ctx_size: tokens of context; default what the server says.

    Raises:
        ModelNotFoundError: no name, and the server has several models or tells of none.
        LlamachatError: see `Connection.get`.
    """
    if endpoint.shows_key:
        notice(f"{endpoint.url}: the key is sent as it is, as http does: https would hide it")
    connection = Connection(endpoint, notice)
    cards = _cards(connection.get("/models"))
    card = _chosen(cards, name, endpoint)
    dialect = _dialect(card, connection)
    known = ctx_size or _context(card, dialect, connection) or UNBOUNDED
    pieces, chosen = _pieces(card), str(card["id"])
    remote = Remote(connection, chosen, dialect, pieces, known)
    return Server(chosen, endpoint, dialect, remote, pieces)


def _pieces(card: Mapping[str, Any]) -> Pieces:
    """As many ids as the model has, where that is told; some servers drop a bias of others."""
    meta = card.get("meta")
    known = meta.get("n_vocab") if isinstance(meta, Mapping) else None
    return Pieces(vocab_size=known) if type(known) is int and known > 0 else Pieces()


def _limits(
    max_new_tokens: int | None, ends: Callable[[Sequence[int]], bool] | None, logprobs: int
) -> dict[str, Any]:
    """What bounds a reply, and what is told of it."""
    stops = list(ends.stops) if isinstance(ends, Ends) else []
    return {
        **({"max_tokens": max_new_tokens} if max_new_tokens is not None else {}),
        **({"stop": stops} if stops else {}),
        **({"logprobs": True, "top_logprobs": logprobs} if logprobs else {}),
    }


def _usage(chunk: ChatCompletionChunk) -> Usage | None:
    told = chunk.usage
    if told is None:
        return None
    reused = getattr(told.prompt_tokens_details, "cached_tokens", None) or 0
    counts = (told.prompt_tokens, reused, told.completion_tokens)
    is_told = all(type(it) is int and 0 <= it < _MOST_COUNT for it in counts)
    return Usage(*counts) if is_told else None


def _cards(found: Any) -> list[Mapping[str, Any]]:
    """What /v1/models says of each; nothing where it says something else."""
    cards = found.get("data") if isinstance(found, Mapping) else None
    known = cards if isinstance(cards, list) else []
    return [it for it in known if isinstance(it, Mapping) and _is_name(it.get("id"))]


def _is_name(it: object) -> bool:
    """Whether it can be a model's: text that can be written, too."""
    return isinstance(it, str) and it.isprintable()


def _chosen(
    cards: Sequence[Mapping[str, Any]], name: str | None, endpoint: Endpoint
) -> Mapping[str, Any]:
    """The model of that name, as far as it is known; else the only one."""
    if name is not None:
        if cards and name not in {card["id"] for card in cards}:
            raise ModelNotFoundError(f"{endpoint.url} has no model {name!r}", hint=_listed(cards))
        return next((card for card in cards if card["id"] == name), {"id": name})
    if len(cards) == 1:
        return cards[0]
    if not cards:
        raise ModelNotFoundError(
            f"{endpoint.url}: no model is named, and the server tells of none",
            hint="-m NAME; and is the address right? It ends with /v1 mostly",
        )
    raise ModelNotFoundError(f"{endpoint.url} has several models: name one", hint=_listed(cards))


def _listed(cards: Sequence[Mapping[str, Any]]) -> str:
    names = [str(card["id"]) for card in cards]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"-m {', '.join(names[:20])}{more}"


def _dialect(card: Mapping[str, Any], connection: Connection) -> Dialect:
    found = dialect_of(str(card.get("owned_by", "")))
    if found is not UNKNOWN:
        return found
    info = _root(connection, "/info")
    return TGI if str(info.get("router", "")).startswith("text-generation") else UNKNOWN


def _context(card: Mapping[str, Any], dialect: Dialect, connection: Connection) -> int | None:
    """Tokens of context, where the server tells."""
    meta = card.get("meta")
    told = [card.get("max_model_len"), card.get("context_length")]
    told.append(meta.get("n_ctx") if isinstance(meta, Mapping) else None)
    if dialect.owner == "llamacpp" and not any(told):
        settings = _root(connection, "/props").get("default_generation_settings")
        told.append(settings.get("n_ctx") if isinstance(settings, Mapping) else None)
    elif dialect is TGI:
        told.append(_root(connection, "/info").get("max_total_tokens"))
    return next((it for it in told if type(it) is int and it > 0), None)


def _root(connection: Connection, path: str) -> Mapping[str, Any]:
    """What a server tells outside of the protocol, if it does."""
    try:
        found = connection.get(connection.endpoint.root + path)
    except (TransferError, UsageError):
        return {}
    return found if isinstance(found, Mapping) else {}
