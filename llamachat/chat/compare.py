"""The same question answered in several ways, side by side, and where the answers part."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from llamachat.chat.asked import done, recorded
from llamachat.chat.events import Done, Event, FinishReason, Text
from llamachat.chat.protocols import Speaks
from llamachat.chat.reply import Reply
from llamachat.chat.session import ChatSession
from llamachat.chat.specs import Spec
from llamachat.chat.spoken import text_of
from llamachat.engine.decoding import Decoding
from llamachat.engine.events import Done as EngineDone
from llamachat.engine.events import EngineEvent
from llamachat.tokenizer.stream import Detokenizer

Indexed: TypeAlias = tuple[int, Event]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a reply is no longer what the first one is.

    Attributes:
        index: of the first token that differs.
        tokens: the first reply's and this one's; None for one that has ended before.
        span: where that token stands in this reply's text: the first character, and the end.
    """

    index: int
    tokens: tuple[str | None, str | None]
    span: tuple[int, int]


class Comparison:
    """Replies to one question, by several specs.

    Attributes:
        specs: how each is chosen.
        groups: which of them are answered side by side, in the order in which they run.
        done: how each that has begun has ended.
    """

    def __init__(
        self,
        session: ChatSession,
        specs: Sequence[Spec],
        question: str | None = None,
        *,
        use: Callable[[str | None], Speaks],
    ) -> None:
        """Nothing runs yet, and the conversation stays as it is.

        Args:
            session: where it is asked.
            specs: how each reply is chosen.
            question: default the last one, again.
            use: gives the model in another form, or in its own (None); the one it gave before is
                needed no more.

        Raises:
            UsageError: there is no question, or a spec contradicts itself.
        """
        self.specs = tuple(specs)
        self.done: dict[int, Done] = {}
        self._session = session
        self._asked = session.asking(question)
        self._decodings = [session.decoding(spec.options(session.options)) for spec in specs]
        self._use = use
        self._replies: dict[int, Reply] = {}
        self._agreed = [0] * len(specs)  # tokens known to be the same as the first reply's
        self.groups = [
            [i for i, spec in enumerate(specs) if spec.quantize == form]
            for form in dict.fromkeys(spec.quantize for spec in specs)
        ]

    def run(self) -> Generator[Indexed, None, None]:
        """Answer; each event comes with the index of its reply, and each reply ends with `Done`.

        Of KeyboardInterrupt the replies on their way are told, as they end there; no other begins.
        """
        if self._asked.trimmed.turns:
            yield 0, self._asked.trimmed
        for group in self.groups:
            interrupted = yield from self._run(group)
            if interrupted:
                break

    def parting(self, index: int) -> Parting | None:
        """Where a reply parts from the first one, as far as is known."""
        first, mine = self._replies.get(0), self._replies.get(index)
        if first is None or mine is None or index == 0:
            return None
        at = self._agreed[index]
        ids = first.ids, mine.ids
        while at < min(map(len, ids)) and ids[0][at] == ids[1][at]:
            at += 1
        self._agreed[index] = at
        ended = [at == len(own) for own in ids]
        if all(ended) or not all(
            self.is_whole(i) for i, end in zip((0, index), ended, strict=True) if end
        ):
            return None
        text = Detokenizer(mine.tokenizer)
        start = sum(len(text.feed(token)) for token in ids[1][:at])
        length = 0 if ended[1] else max(1, len(text.feed(ids[1][at])))
        pieces = [
            None if end else text_of(own[at], mine.tokenizer)
            for own, end in zip(ids, ended, strict=True)
        ]
        return Parting(at, (pieces[0], pieces[1]), (start, start + length))

    def is_whole(self, index: int) -> bool:
        """Whether a reply has come to its own end."""
        return index in self.done and self.done[index].finish_reason != "interrupted"

    def group_of(self, index: int) -> list[int]:
        """The replies that are answered beside this one."""
        return next(group for group in self.groups if index in group)

    def choose(self, index: int) -> Done:
        """Let the conversation go on from a reply."""
        chosen = self.done[index]
        spoken = recorded(
            self._replies[index],
            chosen.finish_reason,
            self._asked,
            self._decodings[index],
            self._session.terms,
            self.specs[index].quantize,
        )
        self._session.answer(self._asked, spoken)
        return chosen

    def _run(self, group: Sequence[int]) -> Generator[Indexed, None, bool]:
        """Answer side by side; returns whether it was interrupted."""
        session, asked = self._session, self._asked
        engine = self._use(self.specs[group[0]].quantize).engine
        began = time.perf_counter()
        replies = [Reply(session.model.tokenizer, session.stop, began) for _ in group]
        self._replies |= dict(zip(group, replies, strict=True))
        decodings = [self._decodings[i] for i in group]
        events = engine.generate_many(
            asked.fitted.ids,
            decodings,
            max_new_tokens=session.max_new_tokens,
            ends=replies[0].ends if session.stop else None,
            stop_loops=session.stop_loops,
            turn=asked.turn,
        )
        interrupted, left = False, []
        try:
            yield from self._followed(group, decodings, events)
        except KeyboardInterrupt:
            interrupted = True
            with suppress(KeyboardInterrupt):
                left.append(events.throw(KeyboardInterrupt()))
                left.extend(iter(events))
        yield from self._followed(group, decodings, left)
        for i, decoding in zip(group, decodings, strict=True):
            if i not in self.done:
                yield from self._ended(i, "interrupted", decoding)
        return interrupted

    def _followed(
        self,
        group: Sequence[int],
        decodings: Sequence[Decoding],
        events: Iterable[tuple[int, EngineEvent]],
    ) -> Iterator[Indexed]:
        """The engine's events, as text."""
        for n, event in events:
            reply = self._replies[group[n]]
            for shown in reply.follow(iter((event,))):
                yield group[n], shown
            if isinstance(event, EngineDone):
                yield from self._ended(group[n], reply.finish_reason, decodings[n])

    def _ended(self, index: int, reason: FinishReason, decoding: Decoding) -> Iterator[Indexed]:
        reply = self._replies[index]
        if rest := reply.flush():
            yield index, Text(rest)
        self.done[index] = done(reply, reason, self._asked, decoding)
        yield index, self.done[index]
