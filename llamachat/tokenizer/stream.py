"""Ids to text as they come: no half character, no second guess, the pieces add up to the whole."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence
from typing import Protocol


class Spelling(Protocol):
    """As much of a `Tokenizer` as turning ids into text needs."""

    @property
    def space_prefix(self) -> bool:
        """Whether a text's first space is the tokenizer's own."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that an id stands for."""
        ...


class Detokenizer:
    """The text of one sequence, id by id.

    All that `feed` and then `flush` return adds up to the tokenizer's `decode` of the same ids.
    With `continues`, the text began earlier: a leading space is a real one and stays.
    """

    def __init__(self, tokenizer: Spelling, *, continues: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.space_prefix and not continues

    def feed(self, token: int) -> str:
        """The text that has become certain with this id; "" while a character is incomplete."""
        return self._shown(self._utf8.decode(self._token_bytes(token)))

    def flush(self) -> str:
        """The end of the text: a character that was cut off shows as U+FFFD."""
        return self._shown(self._utf8.decode(b"", final=True))

    def copy(self) -> Detokenizer:
        """Another one at the same place, to see how the text might go on."""
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._utf8.setstate(self._utf8.getstate())
        return other

    def _shown(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


def detokenize(tokenizer: Spelling, ids: Sequence[int]) -> str:
    """The text of a whole sequence, by the same path as a stream."""
    stream = Detokenizer(tokenizer)
    pieces = [stream.feed(token) for token in ids]
    return "".join(pieces) + stream.flush()
