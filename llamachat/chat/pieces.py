"""Text as ids, for a model whose own ids stay on a server: each piece of text has a number.

So a conversation with a server is held, kept and shown as one with a model in this process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from llamachat.chat.templates import Message, Role, Segment

_ROLES: tuple[Role, ...] = get_args(Role)
_ABOUT_A_TOKEN = re.compile(r"[\x00-\x7f]{1,4}|[^\x00-\x7f]")  # an estimate, good for counting


@dataclass(slots=True)
class Pieces:
    """A tokenizer whose ids are the pieces of text that it met, in the order of their first use.

    The first ids are the roles: each begins a message. Numbers mean something to one object alone.
    """

    vocab_size: int = 2**31
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    stop_ids: frozenset[int] = frozenset()
    specials: Mapping[str, int] = field(default_factory=dict)
    space_prefix: bool = False
    _pieces: list[bytes] = field(default_factory=lambda: [b""] * len(_ROLES))
    _ids: dict[bytes, int] = field(default_factory=dict)

    def id_of(self, piece: bytes) -> int:
        """The number of a piece."""
        found = self._ids.setdefault(piece, len(self._pieces))
        if found == len(self._pieces):
            self._pieces.append(piece)
        return found

    def encode(self, text: str) -> list[int]:
        """About as many ids as a model's own tokenizer would make."""
        found = _ABOUT_A_TOKEN.findall(text)
        return [self.id_of(piece.encode("utf-8", "replace")) for piece in found]

    def token_bytes(self, token: int) -> bytes:
        """What an id stands for; nothing where that is a role, or unknown."""
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""

    def piece(self, token: int) -> str:
        """An id for people to read."""
        if token < len(_ROLES):
            return f"<{_ROLES[token]}>"
        return self.token_bytes(token).decode("utf-8", "replace")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence, roles left out."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def messages(self, ids: Sequence[int]) -> list[dict[str, str]]:
        """What `AsMessages` wrote, as the OpenAI protocol has it; an empty last one is left out."""
        starts = [i for i, token in enumerate(ids) if token < len(_ROLES)]
        ends = [*starts[1:], len(ids)]
        found = [
            {"role": _ROLES[ids[start]], "content": self.decode(ids[start + 1 : end])}
            for start, end in zip(starts, ends, strict=True)
        ]
        is_to_come = bool(found) and found[-1] == {"role": "assistant", "content": ""}
        return found[:-1] if is_to_come else found


@dataclass(frozen=True, slots=True)
class AsMessages:
    """A template that leaves the writing to the server."""

    name: str = "the server's"
    stops: tuple[str, ...] = ()

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Each message after the id of its role."""
        found: list[Segment] = []
        for message in messages:
            found.append(_ROLES.index(message.role))
            if content := message.ids or message.content:
                found.append(content)
        return [*found, _ROLES.index("assistant")] if add_generation_prompt else found
