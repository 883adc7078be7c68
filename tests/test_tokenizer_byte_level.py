"""Byte-level BPE: SmolLM2 and Llama 3, from their folders and from GGUF's keys."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Tokenizer as Library
from vectors import LLAMA3_VECTORS

from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.gguf import tokenizer_from_gguf

# SmolLM2's come from the tokenizers library, Llama 3's from Meta's code with tiktoken.
SMOLLM2_VECTORS = {
    "Hello world": [19556, 905],
    "a 12": [81, 216, 33, 34],
    "1234": [33, 34, 35, 36],
    "I've": [57, 3543],
    "\n": [198],
    "\n\n": [1116],
    "  x": [216, 1792],
    "user\n": [4093, 198],
    "assistant\n": [520, 9531, 198],
    "我爱苹果": [19805, 235, 178, 226, 126, 179, 229, 134, 43774],
}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def metadata_of(tokenizer_json: Path, **keys: Any) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a tokenizer.json."""
    written = json.loads(tokenizer_json.read_bytes())
    control = {token["content"]: token["id"] for token in written["added_tokens"]}
    ids = {**written["model"]["vocab"], **control}
    tokens = sorted(ids, key=lambda token: ids[token])
    values = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3 if token in control else 1 for token in tokens],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in written["model"]["merges"]],
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def smollm2_gguf(data: Path) -> Tokenizer:
    source = data / "tokenizers/smollm2/tokenizer.json"
    keys = metadata_of(source, pre="smollm", bos_token_id=1, eos_token_id=2)
    return tokenizer_from_gguf(keys, "smollm2.gguf")


@pytest.fixture(scope="module")
def smollm2_folder(data: Path) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers/smollm2", bos_id=1, eos_ids=[2])


@pytest.fixture(scope="module")
def llama3_gguf(data: Path) -> Tokenizer:
    source = data / "tokenizers/llama3/tokenizer.json"
    keys = metadata_of(source, pre="llama-bpe", bos_token_id=128000, eos_token_id=128009)
    return tokenizer_from_gguf(keys, "llama3.gguf")


@pytest.fixture(scope="module")
def llama3_folder(data: Path) -> Tokenizer:
    folder = data / "tokenizers/llama3"
    return tokenizer_from_folder(folder, bos_id=None, eos_ids=[128001, 128009])


@pytest.fixture(scope="module")
def wiki(data: Path) -> str:
    return (data / "text/wiki.test.raw").read_text(encoding="utf-8")


SMOLLM2 = pytest.mark.parametrize("source", ["smollm2_folder", "smollm2_gguf"])
LLAMA3 = pytest.mark.parametrize("source", ["llama3_folder", "llama3_gguf"])
ALL = pytest.mark.parametrize(
    "source", ["smollm2_folder", "smollm2_gguf", "llama3_folder", "llama3_gguf"]
)


@pytest.fixture
def tokenizer(source: str, request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(source)
    return found


def test_smollm2_ids_equal_the_librarys_on_a_whole_corpus(
    data: Path, wiki: str, smollm2_folder: Tokenizer, smollm2_gguf: Tokenizer
) -> None:
    library = Library.from_file(str(data / "tokenizers/smollm2/tokenizer.json"))
    expected = library.encode(wiki, add_special_tokens=False).ids
    assert smollm2_folder.encode(wiki) == expected
    assert smollm2_gguf.encode(wiki) == expected
    assert smollm2_gguf.decode(expected) == wiki


@SMOLLM2
def test_smollm2_gives_the_published_ids(tokenizer: Tokenizer) -> None:
    assert {text: tokenizer.encode(text) for text in SMOLLM2_VECTORS} == SMOLLM2_VECTORS


@LLAMA3
def test_llama3_gives_the_published_ids(tokenizer: Tokenizer) -> None:
    assert {text: tokenizer.encode(text) for text in LLAMA3_VECTORS} == LLAMA3_VECTORS


def test_llama3_ids_equal_tiktokens(
    data: Path, wiki: str, llama3_folder: Tokenizer, llama3_gguf: Tokenizer
) -> None:
    lines = (data / "tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    meta = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    text = (
        wiki[:150_000]
        + "\t\r\n  I'VE 12345 ñandú 我爱苹果 👩‍👩‍👧 \u0300\u200b\x00\x07 ...\n\n\n   x"
    )
    expected = meta.encode_ordinary(text)
    assert llama3_folder.encode(text) == expected
    assert llama3_gguf.encode(text) == expected
    assert [llama3_gguf.token_bytes(i) for i in expected] == meta.decode_tokens_bytes(expected)


@ALL
def test_special_tokens_are_never_parsed_from_text(tokenizer: Tokenizer) -> None:
    for text in tokenizer.specials:
        ids = tokenizer.encode(f"a{text}b {text}") + tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.specials.values()), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@ALL
def test_special_tokens_have_no_bytes_but_a_piece(tokenizer: Tokenizer) -> None:
    text, token = next(iter(tokenizer.specials.items()))
    assert tokenizer.token_bytes(token) == b""
    assert tokenizer.piece(token) == text


@ALL
def test_ids_beyond_the_vocabulary_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.piece(tokenizer.vocab_size) == ""
    assert tokenizer.decode([tokenizer.vocab_size]) == ""


@ALL
def test_no_space_is_added_or_taken_away(tokenizer: Tokenizer) -> None:
    assert not tokenizer.space_prefix
    assert tokenizer.encode("") == []
    for text in (" ", "  a ", "a", " é\n "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("source", ["smollm2_gguf", "llama3_gguf"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "7", "我"])
def test_a_long_run_of_one_character_comes_back(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * 30_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@ALL
def test_what_has_no_utf8_is_read_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\udcffb") == tokenizer.encode("a\ufffdb")


def test_smollm2_begins_without_bos_and_stops_at_both_ends(smollm2_gguf: Tokenizer) -> None:
    assert (smollm2_gguf.bos_id, smollm2_gguf.add_bos) == (1, False)
    assert smollm2_gguf.stop_ids == {0, 2}
    assert smollm2_gguf.vocab_size == 49152
    assert smollm2_gguf.specials["<|im_start|>"] == 1


def test_a_folder_takes_bos_and_stops_from_the_config(smollm2_folder: Tokenizer) -> None:
    assert (smollm2_folder.bos_id, smollm2_folder.add_bos) == (1, False)
    assert smollm2_folder.stop_ids == {0, 2}


@LLAMA3
def test_llama3_begins_with_bos_and_stops_at_every_end(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.add_bos) == (128000, True)
    assert tokenizer.stop_ids == {128001, 128009}
    assert tokenizer.vocab_size == 128256
    assert tokenizer.specials["<|start_header_id|>"] == 128006


def tiny(**keys: Any) -> Tokenizer:
    """Letters, digits and two merges; the last two tokens are control and user-defined."""
    tokens = [*"abc0123456789.$", "Ġ", "ab", "bc", "<|im_end|>", "été"]
    types = [1] * 18 + [3, 4]
    values = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": ["a b", "b c"]}
    return tokenizer_from_gguf(
        {f"tokenizer.ggml.{key}": value for key, value in {**values, **keys}.items()}, "tiny.gguf"
    )


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(token) for token in tokenizer.encode(text)]


def test_user_defined_tokens_are_found_in_text_and_come_back() -> None:
    tokenizer = tiny()
    assert pieces(tokenizer, "aétéb") == ["a", "été", "b"]
    assert tokenizer.decode(tokenizer.encode("a étéb")) == "a étéb"


def test_control_tokens_stop_a_reply_by_their_text() -> None:
    assert tiny().stop_ids == {18}


def test_user_defined_tokens_do_not_stop_a_reply() -> None:
    assert tiny(token_type=[1] * 18 + [4, 4]).stop_ids == frozenset()


def test_every_declared_end_stops_a_reply() -> None:
    assert tiny(eos_token_id=3, eot_token_id=4, eom_token_id=5).stop_ids == {3, 4, 5, 18}


def test_the_declared_eos_is_what_templates_call_eos_token() -> None:
    assert tiny(eos_token_id=3, eot_token_id=4).eos_id == 3


@pytest.mark.parametrize("none", [4294967295, 20, -1])
def test_an_id_beyond_the_vocabulary_means_none(none: int) -> None:
    tokenizer = tiny(bos_token_id=none, eos_token_id=none, add_bos_token=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, None, False)
    assert tokenizer.stop_ids == {18}


@pytest.mark.parametrize(
    ("pre", "adds"), [("llama-bpe", True), ("smollm", False), ("gpt-2", False), ("default", False)]
)
def test_only_llama3_adds_bos_unasked(pre: str, adds: bool) -> None:
    assert tiny(pre=pre, bos_token_id=0).add_bos is adds
    assert tiny(pre=pre, bos_token_id=0, add_bos_token=not adds).add_bos is not adds


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
        ("llama-bpe", ["123", "4"]),
        ("llama3", ["123", "4"]),
        ("llama-v3", ["123", "4"]),
        ("default", ["123", "4"]),
        (None, ["123", "4"]),
    ],
)
def test_each_pre_tokenizer_cuts_digits_its_way(pre: str | None, words: list[str]) -> None:
    tokens = [*"1234", "12", "34", "123", "1234"]
    merges = ["1 2", "3 4", "12 3", "123 4", "12 34"]
    named = {} if pre is None else {"pre": pre}
    tokenizer = tiny(tokens=tokens, token_type=[1] * 8, merges=merges, **named)
    in_words = [pieces(tokenizer, word) for word in words]
    assert pieces(tokenizer, "1234") == [piece for word in in_words for piece in word]


@pytest.mark.parametrize(
    ("pre", "expected"), [("default", ["Ġ", "..", "$"]), ("gpt-2", ["Ġ..", "$"])]
)
def test_the_default_pre_tokenizer_parts_punctuation_from_its_space(
    pre: str, expected: list[str]
) -> None:
    tokens = [".", "$", "Ġ", "..", "Ġ.."]
    tokenizer = tiny(tokens=tokens, token_type=[1] * 5, merges=[". .", "Ġ .."], pre=pre)
    assert pieces(tokenizer, " ..$") == expected


def test_llama3_takes_a_whole_word_before_any_merge() -> None:
    tokens = [*"abc", "ab", "bc", "abc"]
    keys: dict[str, Any] = {
        "tokens": tokens,
        "token_type": [1] * 6,
        "merges": ["b c", "a b", "ab c"],
    }
    assert pieces(tiny(**keys, pre="llama-bpe"), "abc") == ["abc"]
    assert pieces(tiny(**keys, pre="gpt-2"), "abc") == ["a", "bc"]


@pytest.mark.parametrize("kind", [2, 3, 5])
def test_text_that_spells_an_unreachable_token_does_not_become_it(kind: int) -> None:
    tokens = [*"abc", "abc"]
    tokenizer = tiny(tokens=tokens, token_type=[1, 1, 1, kind], merges=[], pre="llama-bpe")
    assert pieces(tokenizer, "abc") == ["a", "b", "c"]
