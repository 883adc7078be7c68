"""One conversation with one model: messages in, events out.

It holds the text and the ids that made it. An assistant turn is rendered as the ids it was
generated as, so each prompt begins with what the cache already holds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llamachat.chat.context import Fitted, fit, turns_of, without_oldest
from llamachat.chat.events import Done, Event, FinishReason, Prefill, Text, Timings, Trimmed
from llamachat.chat.options import Options, Said
from llamachat.chat.templates import Message, Segment, Template, encode, render, template_of
from llamachat.engine import events as engine_events
from llamachat.engine.stops import StopFilter, first_stop
from llamachat.errors import UsageError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.stream import Detokenizer

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


class Answers(Protocol):
    """As much of an engine as a conversation needs."""

    @property
    def ctx_size(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        ...

    def generate(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        turn: int = 0,
        attempt: int = 0,
    ) -> Iterator[engine_events.EngineEvent]:
        """See `Engine.generate`."""
        ...


class Speaks(Protocol):
    """As much of a `Model` as a conversation needs."""

    @property
    def engine(self) -> Answers:
        """What runs ids."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, or None for a base model."""
        ...

    @property
    def sampling(self) -> tuple[tuple[str, Mapping[str, float]], ...]:
        """Sampling defaults by origin."""
        ...


class ChatSession:
    """A conversation.

    Attributes:
        model: who answers.
        template: how the conversation is written for it.
        options: how it decodes.
        max_new_tokens: bound on each reply; None for what is left of the context.
        stop: strings that end a reply and are not shown.
    """

    def __init__(
        self,
        model: Speaks,
        *,
        system: str | None = None,
        options: Options | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        template: Template | None = None,
    ) -> None:
        self.model = model
        self.template = template or template_of(model.chat_template, model.tokenizer)
        self.options = options or Options(Said(), model.sampling)
        self.max_new_tokens = max_new_tokens
        self.stop = (*stop, *self.template.stops)
        self._messages: list[Message] = []
        self._forgotten = 0
        self._attempt = 0
        self._seed = secrets.randbits(32)
        self.system = system

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation, the system message first."""
        return tuple(self._messages)

    @property
    def system(self) -> str | None:
        """The system message; setting it keeps the conversation."""
        return self._messages[0].content if self._has_system else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._messages[: self._has_system] = [Message("system", text)] if text else []

    @property
    def turns(self) -> int:
        """Questions asked so far."""
        return len(turns_of(self._messages))

    @property
    def prompt_ids(self) -> list[int]:
        """The conversation as it would be run now, without what the context had no room for."""
        return encode(self._segments, self.model.tokenizer)

    @property
    def prompt_text(self) -> str:
        """The same, spelled out."""
        return render(self._segments, self.model.tokenizer)

    def send(self, text: str) -> Generator[Event, None, None]:
        """Ask, and stream the answer.

        The conversation changes when the reply is over. One that is interrupted
        (KeyboardInterrupt, or the iterator closed) stays as far as it came; without a single
        token of answer everything stays as it was.

        Raises:
            PromptTooLongError: the question alone is longer than the context.
        """
        self._attempt = 0
        return self._ask([*self._messages, Message("user", text)])

    def regenerate(self, seed: int | None = None) -> Generator[Event, None, None]:
        """Answer the last question anew: another draw, or that of `seed`. See `send`.

        Raises:
            UsageError: there is no question.
        """
        last = self._last_question()
        if seed is not None:
            self.options, self._attempt = self.options.saying(seed=seed), 0
        else:
            self._attempt += 1
        return self._ask(self._messages[: 1 + last])

    def undo(self, n: int = 1) -> int:
        """Forget the last n turns; returns how many there were to forget."""
        turns = turns_of(self._messages)
        gone = turns[max(0, len(turns) - n) :]
        del self._messages[len(self._messages) - sum(map(len, gone)) :]
        self._forgotten = min(self._forgotten, len(turns) - len(gone))
        return len(gone)

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.undo(self.turns)

    def _ask(self, asked: list[Message]) -> Generator[Event, None, None]:
        """Answer a conversation that ends with a question."""
        reply = _Reply(self.model.tokenizer, self.stop, began=time.perf_counter())
        decoding = self._decoding()
        fitted = fit(
            asked,
            lambda messages: encode(self.template.segments(messages), self.model.tokenizer),
            forgotten=self._forgotten,
            ctx_size=self.model.engine.ctx_size,
            max_new_tokens=self.max_new_tokens,
        )
        events = self.model.engine.generate(
            fitted.ids,
            decoding,
            max_new_tokens=self.max_new_tokens,
            ends=reply.ends if self.stop else None,
            turn=len(turns_of(asked)) - 1,
            attempt=self._attempt,
        )
        return self._answer(events, asked, reply, decoding, fitted)

    def _answer(
        self,
        events: Iterator[engine_events.EngineEvent],
        asked: Sequence[Message],
        reply: _Reply,
        decoding: Decoding,
        fitted: Fitted,
    ) -> Generator[Event, None, None]:
        trimmed = Trimmed(fitted.forgotten - self._forgotten, fitted.dropped_tokens)
        reason: FinishReason = "interrupted"
        try:
            if trimmed.turns:
                yield trimmed
            yield from reply.follow(events)
            reason = reply.finish_reason
        except KeyboardInterrupt:
            pass
        finally:
            rest = reply.flush()
            if reply.ids or reason != "interrupted":
                self._messages[:] = [*asked, reply.message()]
                self._forgotten = fitted.forgotten
        if rest:
            yield Text(rest)
        yield Done(
            text=reply.text,
            finish_reason=reason,
            token_ids=tuple(reply.ids),
            prompt_tokens=len(fitted.ids),
            reused_tokens=reply.reused,
            seed=decoding.seed,
            strategy=describe(decoding),
            trimmed=trimmed,
            timings=reply.timings(),
        )

    def _decoding(self) -> Decoding:
        """The options, with the user's seed or this session's own."""
        return self.options.decoding().seeded(self._seed)

    def _last_question(self) -> int:
        """Where it stands among the messages."""
        asked = [i for i, message in enumerate(self._messages) if message.role == "user"]
        if not asked:
            raise UsageError("there is no question to answer again")
        return asked[-1]

    @property
    def _segments(self) -> list[Segment]:
        return self.template.segments(without_oldest(self._messages, self._forgotten))

    @property
    def _has_system(self) -> bool:
        return bool(self._messages) and self._messages[0].role == "system"


@dataclass(slots=True)
class _Reply:
    """A reply on its way: ids to text, stop strings held back, times taken."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]
    began: float
    ids: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    reused: int = 0
    finish_reason: FinishReason = "stop"
    _text: Detokenizer = field(init=False)
    _filter: StopFilter = field(init=False)
    _prefilled: float = 0.0
    _first: float = 0.0
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)
        self._filter = StopFilter(self.stops)

    @property
    def text(self) -> str:
        return "".join(self.shown)

    def follow(self, events: Iterator[engine_events.EngineEvent]) -> Iterator[Event]:
        """Pass the engine's events on, as text."""
        for event in events:
            if isinstance(event, Prefill):
                self.reused = event.reused
                self._prefilled = time.perf_counter()
                yield event
            elif isinstance(event, engine_events.Token):
                if text := self._take(event.id):
                    yield Text(text)
            else:
                self.finish_reason = "length" if event.finish_reason == "length" else "stop"

    def flush(self) -> str:
        """What was held back to the end."""
        rest = self._filter.feed(self._text.flush()) + self._filter.flush()
        self.shown.append(rest)
        return rest

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids` completes a stop string."""
        recent = ids[-max(len(stop.encode()) for stop in self.stops) - 8 :]
        text = Detokenizer(self.tokenizer, continues=len(recent) < len(ids))
        return first_stop("".join(map(text.feed, recent)), self.stops) is not None

    def message(self) -> Message:
        """The assistant's turn; where a stop string cut its text, the ids say too much."""
        ids = None if self._filter.stopped else tuple(self.ids)
        return Message("assistant", self.text, ids)

    def timings(self) -> Timings:
        first, last = self._first or self._prefilled, self._last or self._prefilled
        return Timings(
            prefill_s=max(0.0, self._prefilled - self.began),
            decode_s=max(0.0, last - self._prefilled),
            ttft_s=max(0.0, first - self.began),
        )

    def _take(self, token: int) -> str:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.ids.append(token)
        text = self._filter.feed(self._text.feed(token))
        self.shown.append(text)
        return text


def describe(decoding: Decoding) -> dict[str, Any]:
    """A decoding as JSON shows it: its name and its values."""
    values = {name: value for name, value in asdict(decoding).items() if name != "seed"}
    return {"name": type(decoding).__name__.lower(), **values}
