"""Text to ids and back: one `Tokenizer` over sentencepiece, tokenizers and GGUF vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Ids of plain text, and the bytes of each id.

    `encode` never parses special tokens: a template puts them in by id. A SentencePiece-type
    tokenizer adds its one dummy space before the text it is given.
    """

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1 (the model's table may have more rows)."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that begins every sequence, if the model has one."""
        ...

    @property
    def eos_id(self) -> int | None:
        """What the model's template calls `eos_token`; one of `stop_ids`."""
        ...

    @property
    def add_bos(self) -> bool:
        """Whether a prompt must begin with `bos_id`."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends a turn or a text."""
        ...

    @property
    def specials(self) -> Mapping[str, int]:
        """Control tokens by their text: what a template may name, and what `decode` skips."""
        ...

    @property
    def space_prefix(self) -> bool:
        """Whether `encode` puts one dummy space before the text, which `decode` takes away."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, special tokens not parsed. encode("") == []."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that an id stands for; b"" for a special token or an unknown id."""
        ...

    def piece(self, token: int) -> str:
        """An id as the vocabulary spells it, for people to read."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence: specials skipped, the dummy space taken away."""
        ...
