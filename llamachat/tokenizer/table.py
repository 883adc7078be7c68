"""A tokenizer as a table of pieces, beside the library function that splits text into them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from llamachat.tokenizer.stream import detokenize

# What ends a turn or a text in the Llama 3 and ChatML families: files often declare only one.
STOP_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class TableTokenizer:
    """The `Tokenizer` of every kind of vocabulary; what differs are `split` and `spell`.

    Attributes:
        pieces: every id's piece, as the vocabulary spells it.
        literals: ids whose piece is the text itself, whatever `spell` would make of it.
        split: the ids of a text that is well-formed and not empty.
        spell: the bytes of an ordinary piece.
    """

    pieces: Mapping[int, str] = field(repr=False)
    specials: Mapping[str, int] = field(repr=False)
    literals: frozenset[int] = field(default=frozenset(), repr=False)
    split: Callable[[str], list[int]] = field(repr=False)
    spell: Callable[[str], bytes] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    space_prefix: bool

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.pieces, default=-1) + 1

    def below(self, n_ids: int) -> TableTokenizer:
        """The same without ids from `n_ids` on, special ones, which no text is split into."""
        pieces = {token: piece for token, piece in self.pieces.items() if token < n_ids}
        specials = {piece: token for piece, token in self.specials.items() if token < n_ids}
        return replace(self, pieces=pieces, specials=specials)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text. Lone surrogates, which have no UTF-8, are read as U+FFFD."""
        return self.split(_LONE_SURROGATE.sub("\ufffd", text)) if text else []

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that an id stands for; b"" for a special token or an unknown id."""
        piece = self.pieces.get(token)
        if piece is None or self.specials.get(piece) == token:
            return b""
        return utf8(piece) if token in self.literals else self.spell(piece)

    def piece(self, token: int) -> str:
        """An id as the vocabulary spells it; "" for an unknown id."""
        return self.pieces.get(token, "")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence: specials skipped, the dummy space taken away."""
        return detokenize(self, ids)


def first_known(declared: Iterable[int | None], pieces: Mapping[int, str]) -> int | None:
    """The first declared id that exists."""
    return next((token for token in declared if token in pieces), None)


def stop_set(
    specials: Mapping[str, int], declared: Iterable[int | None], pieces: Mapping[int, str]
) -> frozenset[int]:
    """The declared ids that exist, and the control tokens that end a turn by their text."""
    existing = {token for token in declared if token is not None and token in pieces}
    return frozenset(existing | {specials[text] for text in STOP_TEXTS if text in specials})


def utf8(text: str) -> bytes:
    """The bytes of a piece; "?" for what has none."""
    return text.encode("utf-8", errors="replace")


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: "▁" is a space, "<0x0A>" a byte."""
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return utf8(piece.replace("▁", " "))


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's alphabet; a piece outside it stands for its own text."""
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError:
        return utf8(piece)


def byte_level_piece(content: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    return "".join(_LETTER_OF[byte] for byte in content)


def _byte_alphabet() -> dict[str, int]:
    # openai/gpt-2, src/encoder.py, bytes_to_unicode: printable bytes show as themselves, the
    # others as the letters from U+0100 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()
_LETTER_OF = {byte: letter for letter, byte in _BYTE_OF.items()}
