"""One conversation with one model: messages in, events out.

It holds the text and the ids that made it. An assistant turn is rendered as the ids it was
generated as, so each prompt begins with what the cache already holds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING

from llamachat.chat.asked import Asked, done
from llamachat.chat.builtin import template_for
from llamachat.chat.context import fit, turns_of, without_oldest
from llamachat.chat.events import Event, FinishReason, Text, Trimmed
from llamachat.chat.options import Options, Said
from llamachat.chat.protocols import Speaks
from llamachat.chat.reply import Reply
from llamachat.chat.spoken import Begun, Spoken, begun_as, branched
from llamachat.chat.templates import Message, Segment, Template, encode, render
from llamachat.engine import events as engine_events
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


class ChatSession:
    """A conversation.

    Attributes:
        model: who answers.
        template: how the conversation is written for it.
        options: how it decodes.
        max_new_tokens: bound on each reply; None for what is left of the context.
        stop: strings that end a reply and are not shown.
        logprobs: with every token of a reply come its probabilities, and those of so many others.
        speculate: tokens that may be run ahead of their choice; see `Engine.generate`.
        stop_loops: a reply that repeats itself so many times is ended; 0: never.
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
        logprobs: int = 0,
        speculate: int = 0,
        stop_loops: int = 0,
    ) -> None:
        self.model = model
        self.template = template or template_for(model.chat_template, model.tokenizer)
        self.options = options or Options(Said(), model.sampling)
        self.max_new_tokens = max_new_tokens
        self.stop = (*stop, *self.template.stops)
        self.logprobs = logprobs
        self.speculate = speculate
        self.stop_loops = stop_loops
        self._messages: list[Message] = []
        self._forgotten = 0
        self._attempts: dict[int, int] = {}  # by turn: the draws that were taken
        self._spoken: list[Spoken] = []  # the last reply, after what it was before branches
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
    def spoken(self) -> Spoken | None:
        """The last message by its tokens, if it is a reply that was spoken here."""
        last = self._spoken[-1] if self._spoken else None
        is_last = last is not None and bool(self._messages) and self._messages[-1] is last.message
        return last if is_last else None

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
        self._attempts[self.turns] = 0
        return self._ask([*self._messages, Message("user", text)])

    def regenerate(self, seed: int | None = None) -> Generator[Event, None, None]:
        """Answer the last question anew: another draw, or that of `seed`. See `send`.

        Raises:
            UsageError: there is no question.
        """
        last = self._last_question()
        turn = self.turns - 1
        if seed is not None:
            self.options, self._attempts[turn] = self.options.saying(seed=seed), 0
        else:
            self._attempts[turn] = self._attempts.get(turn, 0) + 1
        return self._ask(self._messages[: 1 + last])

    def continue_(self) -> Generator[Event, None, None]:
        """Go on with the last reply, as if it had never been cut. See `send`.

        Beams begin a new search, for how it goes on.

        Raises:
            UsageError: there is no reply.
            PromptTooLongError: there is no room left.
        """
        if not self._messages or self._messages[-1].role != "assistant":
            raise UsageError("there is no reply to continue")
        begun = begun_as(self._messages[-1], self.spoken, self.model.tokenizer)
        return self._ask(self._messages[:-1], begun)

    def branch(self, index: int, token: int) -> Generator[Event, None, None]:
        """Go on with the last reply from another choice of its token `index`. See `send`.

        Steps count on, and only `token` is run anew. What the reply was before is kept until the
        next question, and comes back, without being computed, where its own choice is made again.

        Args:
            index: which token of `spoken`.
            token: the id of one of its alternatives; one that stops ends the reply there.

        Raises:
            UsageError: there is no reply, or no such alternative.
            PromptTooLongError: there is no room left.
        """
        if self.spoken is None:
            raise UsageError("there is no reply whose choices could change")
        stop_ids = self.model.tokenizer.stop_ids
        return self._ask(self._messages[:-1], branched(self._spoken, index, token, stop_ids))

    def asking(self, question: str | None = None) -> Asked:
        """A question, or the last one again, ready to be answered; the conversation stays as it is.

        Raises:
            UsageError: there is no question.
        """
        if question is not None:
            return self._asked([*self._messages, Message("user", question)], ())
        return self._asked(self._messages[: 1 + self._last_question()], ())

    def answer(self, asked: Asked, reply: Spoken) -> None:
        """The conversation is this question now, and this reply to it."""
        self._messages[:] = [*asked.messages, reply.message]
        self._spoken = [reply]
        self._forgotten = asked.fitted.forgotten

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

    def _ask(
        self, asked: list[Message], begun: Begun | None = None
    ) -> Generator[Event, None, None]:
        """Answer a conversation that ends with a question, or go on with what was `begun`."""
        tokenizer = self.model.tokenizer
        reply = Reply(tokenizer, self.stop, time.perf_counter(), begun)
        decoding = self.decoding()
        ready = self._asked(asked, reply.known)
        attempt = self._attempts.get(ready.turn, 0)
        events: Iterable[engine_events.EngineEvent]
        if reply.ended:
            events = [engine_events.Done(reply.ended)]
        else:
            events = self.model.engine.generate(
                ready.fitted.ids,
                decoding,
                max_new_tokens=self.max_new_tokens,
                ends=reply.ends if self.stop else None,
                logprobs=self.logprobs,
                draft=self.speculate,
                stop_loops=self.stop_loops,
                turn=ready.turn,
                attempt=attempt,
                continued=len(reply.known),
            )
        return self._answer(reply.going_on(events), ready, reply, decoding, attempt)

    def _asked(self, messages: Sequence[Message], begun: tuple[int, ...]) -> Asked:
        """What is asked, by a prompt that fits and ends with what of its reply was `begun`."""
        fitted = fit(
            messages,
            lambda fewer: [
                *encode(self.template.segments(fewer), self.model.tokenizer),
                *begun,
            ],
            forgotten=self._forgotten,
            ctx_size=self.model.engine.ctx_size,
            max_new_tokens=self.max_new_tokens,
        )
        trimmed = Trimmed(fitted.forgotten - self._forgotten, fitted.dropped_tokens)
        return Asked(tuple(messages), fitted, trimmed)

    def _answer(
        self,
        events: Generator[engine_events.EngineEvent, None, None],
        asked: Asked,
        reply: Reply,
        decoding: Decoding,
        attempt: int,
    ) -> Generator[Event, None, None]:
        others = self._spoken if reply.begun and self.spoken else []
        reason: FinishReason = "interrupted"
        try:
            if asked.trimmed.turns:
                yield asked.trimmed
            yield from reply.follow(events)
            reason = reply.finish_reason
        except KeyboardInterrupt:
            reply.interrupt(events)
        finally:
            rest = reply.flush()
            if reply.ids or reason != "interrupted":
                spoken = reply.spoken(reason)
                self.answer(asked, spoken)
                self._spoken = [*others, spoken]
        if rest:
            yield Text(rest)
        yield done(reply, reason, asked, decoding, attempt)

    def decoding(self, options: Options | None = None) -> Decoding:
        """The options, or others, with the user's seed or this session's own."""
        chosen = options or self.options
        return chosen.decoding(self.model.tokenizer).seeded(self._seed)

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
