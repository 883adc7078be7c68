"""Ids to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.stream import Detokenizer


class Bytes:
    """Ids 0 to 255 are bytes; 256 is special."""

    def __init__(self, *, space_prefix: bool) -> None:
        self.space_prefix = space_prefix

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def streamed(stream: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(stream.feed(token) for token in ids), stream.flush()]


def test_a_character_shows_when_it_is_whole() -> None:
    shown = streamed(Detokenizer(Bytes(space_prefix=False)), "é🦙".encode())
    assert shown == ["", "é", "", "", "", "🦙", ""]


def test_a_character_that_is_cut_off_shows_as_a_replacement_at_the_end() -> None:
    assert streamed(Detokenizer(Bytes(space_prefix=False)), b"a\xe6\x88") == ["a", "", "", "\ufffd"]


def test_a_special_token_within_a_character_does_not_break_it() -> None:
    stream = Detokenizer(Bytes(space_prefix=False))
    assert streamed(stream, [0xC3, 256, 0xA9]) == ["", "", "é", ""]


def test_only_the_first_space_is_the_dummy_one() -> None:
    assert streamed(Detokenizer(Bytes(space_prefix=True)), b"  a ") == ["", " ", "a", " ", ""]


def test_a_special_token_leaves_the_dummy_space_to_come() -> None:
    assert streamed(Detokenizer(Bytes(space_prefix=True)), [256, 32, 97]) == ["", "", "a", ""]


def test_a_text_that_begins_without_the_dummy_space_keeps_its_spaces() -> None:
    assert streamed(Detokenizer(Bytes(space_prefix=True)), b"a ") == ["a", " ", ""]


def test_a_text_that_continues_keeps_its_first_space() -> None:
    stream = Detokenizer(Bytes(space_prefix=True), continues=True)
    assert streamed(stream, b" a") == [" ", "a", ""]


@given(st.binary(), st.booleans())
def test_the_pieces_add_up_to_the_whole_text(content: bytes, space_prefix: bool) -> None:
    shown = "".join(streamed(Detokenizer(Bytes(space_prefix=space_prefix)), content))
    whole = content.decode("utf-8", errors="replace")
    assert shown == (whole.removeprefix(" ") if space_prefix else whole)


@pytest.fixture(scope="module", params=["smollm2", "llama2"])
def tokenizer(data: Path, request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers" / request.param, bos_id=None, eos_ids=[])


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 49_200), max_size=40))
def test_streamed_ids_add_up_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_streamed_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    kept = "".join(c for c in text if tokenizer.decode(tokenizer.encode(c)) == c)
    shown = streamed(Detokenizer(tokenizer), tokenizer.encode(kept))
    assert "".join(shown) == kept
    assert not any("\ufffd" in piece for piece in shown) or "\ufffd" in kept
