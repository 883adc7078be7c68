"""A question with the prompt that it makes, and the account of what was answered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from llamachat.chat.context import Fitted, turns_of
from llamachat.chat.events import Done, FinishReason, Trimmed
from llamachat.chat.record import Ids, Part, Record, Terms, after
from llamachat.chat.reply import Reply
from llamachat.chat.spoken import Spoken
from llamachat.chat.templates import Message

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


@dataclass(frozen=True, slots=True)
class Asked:
    """A question at the end of its conversation, and the prompt that it makes.

    Attributes:
        messages: the conversation.
        fitted: the prompt.
        trimmed: what is left out of it now that was not before.
        name: of the change that its answer is.
        attempt: which draw that is.
    """

    messages: tuple[Message, ...]
    fitted: Fitted
    trimmed: Trimmed
    name: str = ""
    attempt: int = 0

    @property
    def turn(self) -> int:
        """Of the conversation, from 0."""
        return len(turns_of(self.messages)) - 1


def done(reply: Reply, reason: FinishReason, asked: Asked, decoding: Decoding) -> Done:
    """How a reply ended, and all that is known of it."""
    logprobs, usage = reply.own_logprobs, reply.usage
    return Done(
        text=reply.text,
        finish_reason=reason,
        token_ids=reply.ids,
        prompt_tokens=usage.prompt if usage else len(asked.fitted.ids),
        reused_tokens=usage.reused if usage else reply.reused,
        seed=decoding.seed,
        strategy=describe(decoding),
        trimmed=asked.trimmed,
        timings=reply.timings(),
        logprobs=reply.logprobs,
        attempt=asked.attempt,
        speculation=reply.speculation,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        counted=usage.reply if usage else None,
        problem=reply.problem,
    )


def recorded(
    reply: Reply,
    reason: FinishReason,
    asked: Asked,
    decoding: Decoding,
    terms: Terms,
    quantize: str | None = None,
) -> Spoken:
    """The reply, whose message knows how it was made."""
    spoken = reply.spoken(reason)
    before = reply.begun.record if reply.begun else Record()
    parts, start = before.parts, len(reply.known)
    if not reply.ended:
        ids = asked.fitted.ids
        part = Part(
            prompt=after(_told(asked), ids[: len(ids) - start]),
            start=start,
            end=len(spoken.tokens),
            strategy=describe(decoding),
            seed=decoding.seed,
            turn=asked.turn,
            attempt=asked.attempt,
            max_new_tokens=terms.max_new_tokens,
            stop=terms.stop,
            stop_loops=terms.stop_loops,
            finish_reason=reason,
            forgotten=asked.fitted.forgotten,
            note=asked.fitted.note,
            timings=reply.timings(),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            date=terms.date,
            quantize=quantize,
        )
        parts = (*parts, part)
    record = Record(spoken.ids, spoken.message.content, parts, reason, terms.run, before.extra)
    return replace(spoken, message=replace(spoken.message, record=record))


def _told(asked: Asked) -> Ids | None:
    """What was last run before, which the prompt most likely begins with."""
    records = (message.record for message in reversed(asked.messages) if message.record)
    return next((record.told for record in records if record.parts), None)


def describe(decoding: Decoding) -> dict[str, Any]:
    """A decoding as JSON shows it: its name and its values, each once."""
    values = {name: value for name, value in asdict(decoding).items() if name != "seed"}
    if sampling := values.get("sampling"):  # of beams, which have the penalties themselves
        own = {name: value for name, value in sampling.items() if name not in (*values, "seed")}
        values["sampling"] = own
    return {"name": type(decoding).__name__.lower(), **values}
