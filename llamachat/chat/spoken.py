"""A reply token by token: how probable each was, what else there was, and where it may go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llamachat.chat.events import FinishReason, Probabilities, Probability, Text
from llamachat.chat.record import Record
from llamachat.chat.templates import Message
from llamachat.engine.events import Token
from llamachat.errors import UsageError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.stream import Detokenizer


@dataclass(frozen=True, slots=True)
class Spoken:
    """A reply that is over.

    Attributes:
        message: what the conversation keeps of it.
        tokens: all that were chosen; where a stop string cut the message, those of the string too.
        finish_reason: how it ended.
    """

    message: Message
    tokens: tuple[Token, ...]
    finish_reason: FinishReason

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return ids_of(self.tokens)

    @property
    def has_probabilities(self) -> bool:
        """Whether there is a token whose probability is known."""
        return any(token.probabilities for token in self.tokens)

    def pieces(self, tokenizer: Tokenizer) -> list[Text]:
        """What each token adds to the text: "" where a character is not whole yet."""
        text = Detokenizer(tokenizer)
        return [Text(text.feed(token.id), token.probabilities) for token in self.tokens]

    def choosing(self, index: int, token: int) -> Token:
        """`token` in the place of the one at `index`, which becomes one of its alternatives.

        Raises:
            UsageError: there is no such place, or `token` was no alternative there.
        """
        if not 0 <= index < len(self.tokens):
            raise UsageError(f"the reply has tokens 0 to {len(self.tokens) - 1}, not {index}")
        offered = alternatives(self.tokens[index].probabilities)
        for one in offered:
            if one.id == token:
                return Token(token, Probabilities(one, offered))
        raise UsageError(f"id {token} is no alternative to token {index} of the reply")


@dataclass(frozen=True, slots=True)
class Begun:
    """Where a reply goes on.

    Attributes:
        tokens: what was said before.
        next: what is said now without being chosen.
        ended: how it ends after that; None: it does not, and choices follow.
        record: how what was said before was made, as far as it was made here.
    """

    tokens: tuple[Token, ...]
    next: tuple[Token, ...] = ()
    ended: FinishReason | None = None
    record: Record = field(default_factory=Record)


def ids_of(tokens: Iterable[Token]) -> tuple[int, ...]:
    """Their ids."""
    return tuple(token.id for token in tokens)


def alternatives(known: Probabilities | None) -> tuple[Probability, ...]:
    """The likeliest choices and, if it is none of them, the one that was made."""
    if known is None:
        return ()
    made = () if known.chosen.id in {one.id for one in known.top} else (known.chosen,)
    return (*known.top, *made)


def begun_as(message: Message, spoken: Spoken | None, tokenizer: Tokenizer) -> Begun:
    """A reply to go on with: what it was generated as, or its text would be."""
    if spoken is not None and message.ids == spoken.ids:
        return Begun(spoken.tokens, record=message.record or Record())
    ids = tuple(tokenizer.encode(message.content)) if message.ids is None else message.ids
    known = message.record if message.record and message.record.ids == ids else None
    return Begun(tuple(map(Token, ids)), record=known or Record())


def branched(replies: Sequence[Spoken], index: int, token: int, stop_ids: frozenset[int]) -> Begun:
    """The last of `replies` with another choice at `index`, or one of the others that made it.

    Raises:
        UsageError: see `Spoken.choosing`.
    """
    last = replies[-1]
    chosen, head = last.choosing(index, token), last.tokens[:index]
    record = (last.message.record or Record()).cut(index)
    if token in stop_ids:
        return Begun(head, ended="stop", record=record)
    for reply in reversed(replies):
        if reply.ids[: index + 1] == (*last.ids[:index], token):
            rest = reply.tokens[index + 1 :]
            known = reply.message.record or record
            return Begun(head, (chosen, *rest), reply.finish_reason, known)
    return Begun(head, (chosen,), record=record)


def text_of(token: int, tokenizer: Tokenizer) -> str:
    """The text of one token for programs to read; its name in the vocabulary where it has none."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace") or tokenizer.piece(token)


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token for people to read: quoted text, the bytes of half a character, or its name."""
    raw = tokenizer.token_bytes(token)
    if not raw:
        return tokenizer.piece(token) or f"id {token}"
    try:
        return repr(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


def percent(logprob: float) -> str:
    """A probability in seven columns; of what a filter removed, a dash; "?" where nobody tells."""
    if math.isnan(logprob):
        return "      ?"
    if logprob == -math.inf:
        return "      –"
    share = 100 * math.exp(logprob)
    return f"{share:5.1f} %" if share >= 0.05 else " <0.1 %"


def listing(spoken: Spoken, tokenizer: Tokenizer) -> str:
    """A line for each token: its probability, that after the filters, and the alternatives."""
    lines = ["token    model  filtered"]
    for index, token in enumerate(spoken.tokens):
        known = token.probabilities
        shares = f"{'?':>7}  {'?':>8}"
        if known is not None:
            shares = f"{percent(known.chosen.logprob)}   {percent(known.chosen.filtered_logprob)}"
        others = [
            f"{spelled(one.id, tokenizer)} {percent(one.logprob).strip()}"
            for one in alternatives(known)
            if one.id != token.id
        ]
        rest = f"   or {', '.join(others)}" if others else ""
        lines.append(f"{index + 1:5}  {shares}  {spelled(token.id, tokenizer)}{rest}")
    return "\n".join(lines)
