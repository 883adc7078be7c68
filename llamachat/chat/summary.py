"""What the oldest turns said, in a few words of the model's own, where the context is full."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from llamachat.chat.asked import Asked
from llamachat.chat.context import Fitted, turns_of, without_oldest
from llamachat.chat.events import Event, Prefill, Summarizing
from llamachat.chat.options import Options, Said
from llamachat.chat.protocols import Speaks
from llamachat.chat.reply import Reply
from llamachat.chat.templates import Message, Template, encode
from llamachat.errors import UsageError

MOST_TOKENS, SHARE = 256, 8  # of a summary: at most so many, and an eighth of the context
LEAST_TOKENS = 16
WORDS_PER_TOKEN = 0.6
INSTRUCTION = (
    "Summarize our conversation so far in at most {words} words, so that it can go on without it: "
    "facts, names, decisions, open questions. Write nothing but the summary."
)


@dataclass(frozen=True, slots=True)
class Summarizer:
    """Who sums up, and how what it is told is written."""

    model: Speaks
    template: Template
    stop: tuple[str, ...]

    def replace_turns(
        self, asked: Asked, note: str | None, refit: Callable[[str], Fitted], limit: int
    ) -> Generator[Event, None, Asked]:
        """Let a summary stand for the turns that a question leaves out.

        Args:
            asked: the question, after turns were left out.
            note: what stands for those that were left out before.
            refit: gives the prompt with a note, after the same turns were left out, or more.
            limit: tokens that the prompt may have.

        Returns:
            the question after a summary; as it was, but for the problem, where there is none.
        """
        trimmed, forgotten = asked.trimmed, asked.fitted.forgotten
        yield Summarizing(trimmed.turns)
        kept = sum(map(len, turns_of(asked.messages)[forgotten:]))
        going = without_oldest(asked.messages[:-kept], forgotten - trimmed.turns, note)
        problem = "there is no room, or no word, for a summary"
        summary = yield from self.summarize(going)
        if summary is not None:
            try:
                fitted = refit(summary)
            except UsageError as error:  # a template without system messages
                problem = error.message
            else:
                if fitted.forgotten == forgotten and len(fitted.ids) <= limit:
                    saved = trimmed.tokens + len(asked.fitted.ids) - len(fitted.ids)
                    trimmed = replace(trimmed, tokens=saved, note=summary)
                    return replace(asked, fitted=fitted, trimmed=trimmed)
                problem = f"a summary does not fit: {len(fitted.ids)} tokens, {limit} have room"
        return replace(asked, trimmed=replace(trimmed, problem=problem))

    def summarize(self, messages: Sequence[Message]) -> Generator[Event, None, str | None]:
        """Have the model sum up a conversation, greedily; yields what it reads meanwhile.

        It is asked at the end of the conversation, which the cache holds already.

        Returns:
            the summary, or None where the context has no room to write one, or it is empty.
        """
        tokenizer, engine = self.model.tokenizer, self.model.engine
        most = min(MOST_TOKENS, engine.ctx_size // SHARE)
        ask = Message("user", INSTRUCTION.format(words=int(most * WORDS_PER_TOKEN)))
        ids = encode(self.template.segments([*messages, ask]), tokenizer)
        room = min(most, engine.ctx_size - len(ids))
        if room < LEAST_TOKENS:
            return None
        reply = Reply(tokenizer, self.stop, time.perf_counter())
        events = engine.generate(
            ids,
            Options(Said(strategy="greedy"), ()).decoding(tokenizer),
            max_new_tokens=room,
            ends=reply.ends if self.stop else None,
        )
        for event in reply.follow(events):
            if isinstance(event, Prefill):
                yield event
        reply.flush()
        return reply.message().content.strip() or None
