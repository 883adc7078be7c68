"""A reply on its way: ids to text, stop strings held back, times taken."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from llamachat.chat.events import Event, FinishReason, OpenText, Prefill, Tails, Text, Timings
from llamachat.chat.spoken import Begun, Spoken, ids_of
from llamachat.chat.templates import Message
from llamachat.engine import events as engine_events
from llamachat.engine.events import Probabilities, Speculation, Token, Usage
from llamachat.engine.stops import StopFilter, first_stop
from llamachat.errors import LlamachatError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.stream import Detokenizer


@dataclass(frozen=True, slots=True)
class Ends:
    """Whether the last of some ids completes a stop string."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]

    def __call__(self, ids: Sequence[int]) -> bool:
        """Test them."""
        recent = ids[-max(len(stop.encode()) for stop in self.stops) - 8 :]
        text = Detokenizer(self.tokenizer, continues=len(recent) < len(ids))
        return first_stop("".join(map(text.feed, recent)), self.stops) is not None


@dataclass(slots=True)
class Reply:
    """What a reply is so far.

    Of one that goes on, `begun` holds what there was; `tokens` and `shown` are what is new.
    """

    tokenizer: Tokenizer
    stops: tuple[str, ...]
    began: float
    begun: Begun | None = None
    tokens: list[Token] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    reused: int = 0
    finish_reason: FinishReason = "stop"
    speculation: Speculation | None = None
    usage: Usage | None = None
    problem: LlamachatError | None = None
    _text: Detokenizer = field(init=False)
    _filter: StopFilter = field(init=False)
    _whole: list[str] = field(init=False)
    _seen: int = field(init=False)  # characters of what is held back that were shown before
    _rest: list[str] = field(default_factory=list)
    _prefilled: float = 0.0
    _first: float = 0.0
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)
        before = "".join(self._text.feed(token.id) for token in self._before)
        self._filter = StopFilter(self.stops, before)
        self._seen = len(self._filter.held)
        self._whole = [before[: len(before) - self._seen]]

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids that are new."""
        return ids_of(self.tokens)

    @property
    def known(self) -> tuple[int, ...]:
        """The ids that nothing has to choose: what there was, and what is said next."""
        return ids_of((*self._before, *self.begun.next)) if self.begun else ()

    @property
    def logprobs(self) -> tuple[Probabilities, ...]:
        """The probabilities that are known of them."""
        return tuple(token.probabilities for token in self.tokens if token.probabilities)

    @property
    def own_logprobs(self) -> tuple[float, ...]:
        """The log-probabilities of what was chosen, as far as they are known."""
        return tuple(token.logprob for token in self.tokens if token.logprob is not None)

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self.shown)

    def follow(self, events: Iterator[engine_events.EngineEvent]) -> Iterator[Event]:
        """Pass the engine's events on, as text."""
        for event in events:
            if isinstance(event, Prefill):
                self.reused = event.reused
                self._prefilled = time.perf_counter()
                yield event
            elif isinstance(event, Token):
                if self._prefilled:  # what comes before was not computed now
                    self._last = time.perf_counter()
                    self._first = self._first or self._last
                text = self._show(self._take(event))
                if text or event.probabilities:
                    yield Text(text, event.probabilities)
            elif isinstance(event, engine_events.Tails):
                yield Tails(tuple(OpenText(self._open(t.ids), t.score) for t in event.tails))
            else:
                self.finish_reason = cast("FinishReason", event.finish_reason)
                self.speculation = event.speculation
                self.usage, self.problem = event.usage, event.problem

    @property
    def ended(self) -> FinishReason | None:
        """How it ends with what is known; None: it goes on."""
        if self.begun is None:
            return None
        is_stopped = self.begun.next and self.stops and self.ends(self.known)
        return "stop" if is_stopped else self.begun.ended

    def going_on(
        self, events: Iterable[engine_events.EngineEvent]
    ) -> Generator[engine_events.EngineEvent, None, None]:
        """The tokens that are said next without being chosen, then these events."""
        yield from self.begun.next if self.begun else ()
        yield from events

    def interrupt(self, events: Generator[engine_events.EngineEvent, None, None]) -> None:
        """Take what the engine still has to say to an interrupt; `flush` tells it."""
        with suppress(KeyboardInterrupt):
            event = events.throw(KeyboardInterrupt())
            while True:
                if isinstance(event, Token):
                    self._rest.append(self._take(event))
                event = next(events)

    def flush(self) -> str:
        """What was held back to the end."""
        rest = "".join(self._rest) + self._filter.feed(self._text.flush())
        return self._show(rest + self._filter.flush())

    @property
    def ends(self) -> Ends:
        """What tells whether the reply ends with its last ids."""
        return Ends(self.tokenizer, self.stops)

    def message(self) -> Message:
        """The assistant's turn; where a stop string cut its text, the ids say too much."""
        ids = None if self._filter.stopped else (*ids_of(self._before), *self.ids)
        return Message("assistant", "".join(self._whole), ids)

    def spoken(self, reason: FinishReason) -> Spoken:
        """The whole reply, now that it is over."""
        return Spoken(self.message(), (*self._before, *self.tokens), reason)

    def timings(self) -> Timings:
        """How long it took so far."""
        first, last = self._first or self._prefilled, self._last or self._prefilled
        return Timings(
            prefill_s=max(0.0, self._prefilled - self.began),
            decode_s=max(0.0, last - self._prefilled),
            ttft_s=max(0.0, first - self.began),
        )

    @property
    def _before(self) -> tuple[Token, ...]:
        return self.begun.tokens if self.begun else ()

    def _take(self, token: Token) -> str:
        """The text that can be shown now."""
        self.tokens.append(token)
        return self._filter.feed(self._text.feed(token.id))

    def _show(self, text: str) -> str:
        """What of it is new."""
        self._whole.append(text)
        new = text[self._seen :]
        self._seen -= len(text) - len(new)
        self.shown.append(new)
        return new

    def _open(self, ids: Sequence[int]) -> str:
        """The text that would follow if the reply went on with `ids`."""
        text, stops = self._text.copy(), self._filter.copy()
        shown = "".join([stops.feed(text.feed(token)) for token in ids])
        return (shown + stops.flush())[self._seen :]
