"""One conversation with one model: messages in, events out.

It holds the text and the ids that made it. An assistant turn is rendered as the ids it was
generated as, so each prompt begins with what the cache already holds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llamachat.chat.asked import Asked, done, recorded
from llamachat.chat.builtin import template_for
from llamachat.chat.context import (
    Fitted,
    Overflow,
    fit,
    prompt_limit,
    turns_of,
    without_oldest,
)
from llamachat.chat.dates import date_of, set_date
from llamachat.chat.events import Event, FinishReason, Text, Trimmed
from llamachat.chat.history import History, State, last_part, resumed
from llamachat.chat.options import Options, Said
from llamachat.chat.protocols import Speaks
from llamachat.chat.record import Terms
from llamachat.chat.reply import Reply
from llamachat.chat.spoken import Begun, Spoken, begun_as, branched
from llamachat.chat.summary import Summarizer
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
        overflow: what becomes of the oldest turns when the context is full.
        run: what replies record of the model and of how it is run; see `provenance.facts`.
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
        overflow: Overflow = "trim",
        messages: Sequence[Message] = (),
    ) -> None:
        """Begin, or go on after `messages`, whose turns `undo` takes back one by one."""
        self.model = model
        self.template = template or template_for(model.chat_template, model.tokenizer)
        self.options = options or Options(Said(), model.sampling)
        self.max_new_tokens = max_new_tokens
        self.stop = (*stop, *self.template.stops)
        self.logprobs = logprobs
        self.speculate = speculate
        self.stop_loops = stop_loops
        self.run: Mapping[str, Any] = {}
        self.overflow = overflow
        self._history = History(messages)
        if system is not None:
            self._history.now = self._now.with_system(system)
        self._draws: dict[int, int] = {}  # by turn: those that were taken, beside the first
        self._seed = secrets.randbits(32)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation, the system message first."""
        return self._now.messages

    @property
    def system(self) -> str | None:
        """The system message; setting it keeps the conversation."""
        return self._now.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._history.change("/system", self._now.with_system(text))

    @property
    def changes(self) -> tuple[str, ...]:
        """What made the conversation what it is, in a word or two each; `undo` takes back."""
        return tuple(change.name for change in self._history.changes)

    @property
    def forgotten(self) -> int:
        """The oldest turns that prompts leave out, as the context had no room for them."""
        return self._now.forgotten

    @property
    def note(self) -> str | None:
        """What prompts say instead, if these were summarized."""
        return self._now.note

    @property
    def turns(self) -> int:
        """Questions asked so far."""
        return len(turns_of(self.messages))

    @property
    def spoken(self) -> Spoken | None:
        """The last message by its tokens, if it is a reply that was spoken here."""
        last = self._now.spoken[-1] if self._now.spoken else None
        is_last = last is not None and bool(self.messages) and self.messages[-1] is last.message
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
        self._draws[self.turns] = 0
        return self._ask([*self.messages, Message("user", text)], f"turn {self.turns + 1}")

    def edit(self, text: str) -> Generator[Event, None, None]:
        """Ask this in place of the last question, whose reply goes with it. See `send`.

        Raises:
            UsageError: there is no question.
            PromptTooLongError: the question alone is longer than the context.
        """
        before = self.messages[: self._last_question()]
        self._draws[self.turns - 1] = 0
        return self._ask([*before, Message("user", text)], "/edit")

    def edit_reply(self, text: str) -> None:
        """Let the last reply be this text; nothing is generated.

        Raises:
            UsageError: there is no reply.
        """
        messages = (*self.messages[:-1], Message("assistant", text))
        if self._last_reply().content != text:
            self._history.change("/edit-reply", replace(self._now, messages=messages, spoken=()))

    def regenerate(self, seed: int | None = None) -> Generator[Event, None, None]:
        """Answer the last question anew: another draw, or that of `seed`. See `send`.

        Raises:
            UsageError: there is no question.
        """
        asked = self.messages[: 1 + self._last_question()]
        turn = self.turns - 1
        if seed is not None:
            self.options, self._draws[turn] = self.options.saying(seed=seed), 0
        else:
            self._draws[turn] = self._draws.get(turn, 0) + 1
        return self._ask(asked, "/regen", attempt=self._draws[turn])

    def continue_(self) -> Generator[Event, None, None]:
        """Go on with the last reply, as if it had never been cut. See `send`.

        Beams begin a new search, for how it goes on.

        Raises:
            UsageError: there is no reply.
            PromptTooLongError: there is no room left.
        """
        begun = begun_as(self._last_reply(), self.spoken, self.model.tokenizer)
        return self._ask(self.messages[:-1], "/continue", begun, attempt=self._now.attempt)

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
        begun = branched(self._now.spoken, index, token, stop_ids)
        return self._ask(self.messages[:-1], "branch", begun, attempt=self._now.attempt)

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on with another conversation, as its last reply left it; `undo` takes it back.

        Where nothing was asked yet, what `undo` takes back are its own turns.
        """
        state, last = resumed(messages), last_part(messages)
        if self.turns:
            self._history.change("/load", state)
        else:
            self._history = History(messages)
            self._history.now = state
        if last is not None:
            self._draws[last.turn] = last.attempt
            self._seed = self._seed if last.seed is None else last.seed
            set_date(self.template, last.date)

    @property
    def terms(self) -> Terms:
        """What decides replies, beside how they are decoded."""
        date = date_of(self.template)
        return Terms(self.run, self.max_new_tokens, self.stop, self.stop_loops, date)

    def asking(self, question: str | None = None) -> Asked:
        """A question, or the last one again, ready to be answered; the conversation stays as it is.

        Raises:
            UsageError: there is no question.
        """
        if question is not None:
            return self._asked([*self.messages, Message("user", question)], ())
        return self._asked(self.messages[: 1 + self._last_question()], ())

    def answer(self, asked: Asked, reply: Spoken) -> None:
        """The conversation is this question now, and this reply to it."""
        self._answered("/compare", asked, (reply,))

    def undo(self, n: int = 1) -> int:
        """Take back the last n changes: what was before each is back, the model and options stay.

        Returns:
            how many there were to take back.
        """
        return self._history.undo(n)

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        if self.turns:
            self._history.change("/clear", State().with_system(self.system))

    def use(self, model: Speaks, template: Template, options: Options) -> None:
        """Talk to another model, or to this one in another form.

        The conversation stays, as text: it is rendered anew, and what was forgotten is not.
        """
        own = [stop for stop in self.stop if stop not in self.template.stops]
        self.model, self.template, self.options = model, template, options
        self.stop = (*own, *template.stops)
        self._history.forget_ids()

    def _ask(
        self, asked: Sequence[Message], name: str, begun: Begun | None = None, *, attempt: int = 0
    ) -> Generator[Event, None, None]:
        """Answer a conversation that ends with a question, or go on with what was `begun`."""
        reply = Reply(self.model.tokenizer, self.stop, time.perf_counter(), begun)
        ready = replace(self._asked(asked, reply.known), name=name, attempt=attempt)
        decoding = self.decoding()
        return self._answer(self._replying(ready, reply, decoding), ready, reply, decoding)

    def _replying(
        self, ready: Asked, reply: Reply, decoding: Decoding
    ) -> Generator[engine_events.EngineEvent, None, None]:
        """The engine's events, after what is said without being chosen."""
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
                attempt=ready.attempt,
                continued=len(reply.known),
            )
        return reply.going_on(events)

    def _asked(self, messages: Sequence[Message], begun: tuple[int, ...]) -> Asked:
        """What is asked, by a prompt that fits and ends with what of its reply was `begun`."""
        fitted = self._fitted(messages, begun, self.forgotten, self.note)
        trimmed = Trimmed(fitted.forgotten - self.forgotten, fitted.dropped_tokens)
        return Asked(tuple(messages), fitted, trimmed)

    def _fitted(
        self, messages: Sequence[Message], begun: tuple[int, ...], forgotten: int, note: str | None
    ) -> Fitted:
        return fit(
            messages,
            lambda fewer: [
                *encode(self.template.segments(fewer), self.model.tokenizer),
                *begun,
            ],
            forgotten=forgotten,
            note=note,
            ctx_size=self.model.engine.ctx_size,
            max_new_tokens=self.max_new_tokens,
            may_trim=self.overflow != "error",
        )

    def _answer(
        self,
        events: Generator[engine_events.EngineEvent, None, None],
        asked: Asked,
        reply: Reply,
        decoding: Decoding,
    ) -> Generator[Event, None, None]:
        others = self._now.spoken if reply.begun and self.spoken else ()
        reason: FinishReason = "interrupted"
        try:
            if asked.trimmed.turns and self.overflow == "summarize":
                asked = yield from self._summarized(asked, reply.known)
                events = self._replying(asked, reply, decoding)
            if asked.trimmed.turns:
                yield asked.trimmed
            yield from reply.follow(events)
            reason = reply.finish_reason
        except KeyboardInterrupt:
            reply.interrupt(events)
        finally:
            rest = reply.flush()
            if reply.ids or reason != "interrupted":
                spoken = recorded(reply, reason, asked, decoding, self.terms)
                self._answered(asked.name, asked, (*others, spoken))
        if rest:
            yield Text(rest)
        yield done(reply, reason, asked, decoding)

    def _summarized(self, asked: Asked, begun: tuple[int, ...]) -> Generator[Event, None, Asked]:
        """The same question after a summary of the turns that go, if there can be one."""
        return Summarizer(self.model, self.template, self.stop).replace_turns(
            asked,
            self.note,
            lambda note: self._fitted(asked.messages, begun, asked.fitted.forgotten, note),
            prompt_limit(self.model.engine.ctx_size, self.max_new_tokens),
        )

    def _answered(self, name: str, asked: Asked, spoken: tuple[Spoken, ...]) -> None:
        """The conversation is what was asked, and the last reply of these."""
        messages = (*asked.messages, spoken[-1].message)
        fitted = asked.fitted
        state = State(messages, fitted.forgotten, fitted.note, spoken, asked.attempt)
        self._history.change(name, state)

    def decoding(self, options: Options | None = None) -> Decoding:
        """The options, or others, with the user's seed or this session's own."""
        chosen = options or self.options
        return chosen.decoding(self.model.tokenizer).seeded(self._seed)

    @property
    def _now(self) -> State:
        return self._history.now

    def _last_question(self) -> int:
        """Where it stands among the messages."""
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise UsageError("there is no question to answer again")
        return asked[-1]

    def _last_reply(self) -> Message:
        if not self.messages or self.messages[-1].role != "assistant":
            raise UsageError("there is no reply to go on from")
        return self.messages[-1]

    @property
    def _segments(self) -> list[Segment]:
        return self.template.segments(without_oldest(self.messages, self.forgotten, self.note))
