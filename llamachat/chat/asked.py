"""A question with the prompt that it makes, and the account of what was answered."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llamachat.chat.context import Fitted, turns_of
from llamachat.chat.events import Done, FinishReason, Trimmed
from llamachat.chat.reply import Reply
from llamachat.chat.templates import Message

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


@dataclass(frozen=True, slots=True)
class Asked:
    """A question at the end of its conversation, and the prompt that it makes."""

    messages: tuple[Message, ...]
    fitted: Fitted
    trimmed: Trimmed

    @property
    def turn(self) -> int:
        """Of the conversation, from 0."""
        return len(turns_of(self.messages)) - 1


def done(
    reply: Reply, reason: FinishReason, asked: Asked, decoding: Decoding, attempt: int = 0
) -> Done:
    """How a reply ended, and all that is known of it."""
    logprobs = reply.own_logprobs
    return Done(
        text=reply.text,
        finish_reason=reason,
        token_ids=reply.ids,
        prompt_tokens=len(asked.fitted.ids),
        reused_tokens=reply.reused,
        seed=decoding.seed,
        strategy=describe(decoding),
        trimmed=asked.trimmed,
        timings=reply.timings(),
        logprobs=reply.logprobs,
        attempt=attempt,
        speculation=reply.speculation,
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
    )


def describe(decoding: Decoding) -> dict[str, Any]:
    """A decoding as JSON shows it: its name and its values, each once."""
    values = {name: value for name, value in asdict(decoding).items() if name != "seed"}
    if sampling := values.get("sampling"):  # of beams, which have the penalties themselves
        own = {name: value for name, value in sampling.items() if name not in (*values, "seed")}
        values["sampling"] = own
    return {"name": type(decoding).__name__.lower(), **values}
