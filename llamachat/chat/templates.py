"""Messages to segments to ids: how a conversation becomes a prompt.

A segment is a special id, a run of plain text, or the stored ids of an assistant turn. Only text
that the template itself writes can become special ids; what people write stays text.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Final, Literal, Protocol, TypeAlias

from llamachat.chat.record import Record
from llamachat.chat.sandbox import Sandbox
from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer

Role: TypeAlias = Literal["system", "user", "assistant"]
Segment: TypeAlias = int | str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `ids`: what an assistant turn was generated as; an edit of `content` drops them.

    `record`: how it was made; two messages that say the same are equal, however they were made.
    """

    role: Role
    content: str
    ids: tuple[int, ...] | None = None
    record: Record | None = field(default=None, compare=False, repr=False)


class Template(Protocol):
    """How a model wants its conversations written."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply, where no special token does."""
        ...

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt of a conversation: no two strings side by side, nothing empty.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: end with what introduces the assistant's next turn.

        Raises:
            UsageError: the template does not take this conversation.
            DamagedFileError: the template is broken or hostile.
        """
        ...


def encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt; one BOS in front where the model wants it and the template has none."""
    ids: list[int] = []
    previous: Segment = ""
    for segment in _prompt(segments, tokenizer):
        if not isinstance(segment, str):
            ids += _ids(segment)
        elif tokenizer.space_prefix and isinstance(previous, tuple):
            ids += _encode_unprefixed(segment, tokenizer)
        else:
            ids += tokenizer.encode(segment)
        previous = segment
    return ids


def render(segments: Sequence[Segment], tokenizer: Tokenizer) -> str:
    """The prompt that `encode` gives, as text: specials spelled out, stored ids decoded."""
    names = {token: text.encode() for text, token in tokenizer.specials.items()}

    def spelled(token: int) -> bytes:
        return names.get(token) or tokenizer.token_bytes(token)

    return "".join(
        segment
        if isinstance(segment, str)
        else b"".join(map(spelled, _ids(segment))).decode("utf-8", "replace")
        for segment in _prompt(segments, tokenizer)
    )


class PlainTemplate:
    """For models without a template: they go on writing where the contents, one a line, end."""

    name: Final = "none"
    stops: Final[tuple[str, ...]] = ()

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The contents; a reply that was generated here stands right where it was."""
        segments: list[Segment] = []
        for message in messages:
            if message.ids is not None:
                segments.append(message.ids)
            else:
                segments.append(f"\n{message.content}" if segments else message.content)
        return joined(segments)


class JinjaTemplate:
    """The model's own chat template, as Hugging Face and GGUF files carry it.

    The template sees stand-ins in place of contents, and these are put back into what it writes:
    so contents are neither Jinja nor special tokens, whatever they say.

    Args:
        source: the Jinja source.
        tokenizer: names the special tokens that the template may write.
        sandbox: where to render; by default one of its own.

    Attributes:
        now: the moment that `strftime_now` tells: that of a conversation's beginning, so that its
            prompts begin alike on both sides of midnight.
    """

    name: Final = "jinja"
    stops: Final[tuple[str, ...]] = ()

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        sandbox: Sandbox | None = None,
    ) -> None:
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        spelled = {token: text for text, token in tokenizer.specials.items()}
        self.source = source
        self.now = datetime.now()
        self._tokens = {k: spelled[token] for k, token in named.items() if token in spelled}
        self._specials = tokenizer.specials
        longest_first = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._sandbox = sandbox or Sandbox()

    @property
    def tells_date(self) -> bool:
        """Whether what it writes depends on `now`."""
        return "strftime_now" in self.source

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Render the template; see `Template.segments`."""
        stand_ins = _StandIns(messages)
        variables = {
            "messages": stand_ins.messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._tokens,
        }
        rendered = self._sandbox.render(self.source, variables, now=self.now)
        segments: list[Segment] = []
        for literal, content in stand_ins.replaced(rendered):
            segments += (self._specials.get(piece, piece) for piece in self._special.split(literal))
            segments.append(content)
        return joined(segments)


_MARK = "\ufdd0"  # a noncharacter: no text has it
_PAD = "\u205f"  # white space that nobody writes, and that strip() and trim take away
_STAND_IN = f"{_MARK}aB{_MARK} <{_MARK}\n{_MARK}%s{_MARK}"
_FOUND = re.compile(f"({_PAD}?)({_STAND_IN % '[0-9a-f]{16}'})({_PAD}?)")
_MAX_REPEATS = 8


class _StandIns:
    """What a template is given in place of contents, and the contents back in their places.

    A stand-in cannot be guessed. The padding around it shows on which side the template trimmed
    it. Whatever else is done to it (other case, slices, splits, escapes) leaves marks behind.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages: list[dict[str, str]] = []
        self._meant: dict[str, Message] = {}
        for message in messages:
            content = ""  # templates ask whether there is content
            if message.content or message.ids:
                stand_in = _STAND_IN % secrets.token_hex(8)
                self._meant[stand_in] = message
                content = f"{_PAD}{stand_in}{_PAD}"
            self.messages.append({"role": message.role, "content": content})

    def replaced(self, rendered: str) -> Iterator[tuple[str, Segment]]:
        """What the template wrote, and the content that follows it; the last content is empty.

        Raises:
            DamagedFileError: the template altered a content, or repeats one without end.
        """
        pieces = _FOUND.split(rendered)  # literal, then (pad, stand-in, pad, literal)...
        literals, found = pieces[::4], pieces[2::4]
        unknown = not self._meant.keys() >= set(found)
        if unknown or any(mark in literal for literal in literals for mark in (_MARK, _PAD)):
            raise DamagedFileError(
                "chat template: alters what a message says (other than by trimming it)",
                hint="such a template cannot be followed",
            )
        if max(Counter(found).values(), default=0) > _MAX_REPEATS:
            raise DamagedFileError(f"chat template: repeats a message over {_MAX_REPEATS} times")
        for literal, left, stand_in, right in zip(
            literals, pieces[1::4], found, pieces[3::4], strict=False
        ):
            message = self._meant[stand_in]
            yield literal, _trimmed(message, left=not left, right=not right)
        yield literals[-1], ""


def _trimmed(message: Message, *, left: bool, right: bool) -> Segment:
    if message.ids is not None:
        return message.ids
    text = message.content.lstrip() if left else message.content
    return text.rstrip() if right else text


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """Without empty segments, and with neighbouring text in one."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] += segment
        elif segment not in ("", ()):
            joined.append(segment)
    return joined


def _prompt(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments as the model reads them: begun with BOS, no space twice."""
    prompt = list(segments)
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and _first_id(prompt) != bos:
        prompt.insert(0, bos)
    if tokenizer.space_prefix:
        _drop_doubled_spaces(prompt, tokenizer)
    return prompt


def _drop_doubled_spaces(prompt: list[Segment], tokenizer: Tokenizer) -> None:
    """Take away the space that a template writes before a reply whose first id has one itself.

    The reply was generated after "[/INST]"; the template writes a finished turn with "[/INST] ".
    """
    for i, (text, reply) in enumerate(pairwise(prompt)):
        if isinstance(text, str) and text.endswith(" ") and isinstance(reply, tuple):
            spaced = tokenizer.token_bytes(reply[0]).startswith(b" ")
            prompt[i] = text[:-1] if spaced else text


def _encode_unprefixed(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of text that goes on after a stored reply: without the tokenizer's dummy space."""
    anchor = tokenizer.encode("\n")
    ids = tokenizer.encode(f"\n{text}")
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else tokenizer.encode(text)


def _first_id(segments: Sequence[Segment]) -> int | None:
    if not segments or isinstance(segments[0], str):
        return None
    return _ids(segments[0])[0]


def _ids(segment: int | tuple[int, ...]) -> tuple[int, ...]:
    return segment if isinstance(segment, tuple) else (segment,)
