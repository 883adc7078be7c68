"""Llama 3's tokenizer.model: the ids of its tokenizer.json; special tokens come besides."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from vectors import LLAMA3_VECTORS

from llamachat.errors import DamagedFileError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder

BYTES = [base64.b64encode(bytes([byte])) for byte in range(256)]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copy(data / "tokenizers/llama3/tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Tokenizer:
    return tokenizer_from_folder(folder, bos_id=None, eos_ids=[])


@pytest.fixture(scope="module")
def library(data: Path) -> Library:
    library = Library.from_file(str(data / "tokenizers/llama3/tokenizer.json"))
    library.encode_special_tokens = True
    return library


def test_the_published_ids_are_given(ranks: Tokenizer) -> None:
    assert {text: ranks.encode(text) for text in LLAMA3_VECTORS} == LLAMA3_VECTORS


def test_ids_equal_those_of_tokenizer_json_on_a_whole_corpus(
    data: Path, ranks: Tokenizer, library: Library
) -> None:
    text = (data / "text/wiki.test.raw").read_bytes().decode()
    ids = ranks.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ranks.decode(ids) == text


@given(text=st.text())
@settings(deadline=None)
def test_ids_equal_those_of_tokenizer_json_on_any_text(
    text: str, ranks: Tokenizer, library: Library
) -> None:
    ids = ranks.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ranks.decode(ids) == text


def test_every_token_is_spelled_as_in_tokenizer_json(ranks: Tokenizer, library: Library) -> None:
    pieces = [ranks.piece(token) for token in range(128_000)]
    assert pieces == [library.id_to_token(token) for token in range(128_000)]


def test_text_never_becomes_a_special_token(ranks: Tokenizer) -> None:
    for text in ranks.specials:
        ids = ranks.encode(f"a{text}b {text}")
        assert max(ids) < 128_000
        assert ranks.decode(ids) == f"a{text}b {text}"


@pytest.mark.parametrize("run", [" ", "a"])
def test_a_run_of_any_length_comes_back(run: str, ranks: Tokenizer) -> None:
    text = run * 1_000_000 + "b"
    assert ranks.decode(ranks.encode(text)) == text


def test_256_special_tokens_follow_the_ranks(ranks: Tokenizer) -> None:
    assert sorted(ranks.specials.values()) == list(range(128_000, 128_256))
    assert ranks.vocab_size == 128_256
    assert (ranks.bos_id, ranks.eos_id, ranks.add_bos) == (128_000, 128_001, True)


def test_llama_3_names_its_special_tokens(ranks: Tokenizer) -> None:
    named = {token: text for text, token in ranks.specials.items()}
    assert [named[128_000 + i] for i in range(12)] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        "<|reserved_special_token_5|>",
        "<|reserved_special_token_6|>",
    ]
    assert named[128_255] == "<|reserved_special_token_250|>"
    assert ranks.stop_ids == {128_001, 128_009}


@pytest.mark.parametrize("evidence", ["params.json", "tokenizer_config.json", "config.json"])
def test_llama_31_names_them_anew(evidence: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.model", tmp_path)
    eom = {"128008": {"content": "<|eom_id|>", "special": True}}
    written = {
        "params.json": {"use_scaled_rope": True},
        "tokenizer_config.json": {"added_tokens_decoder": eom},
        "config.json": {},
    }
    (tmp_path / evidence).write_text(json.dumps(written[evidence]))
    eos_ids = [128_001, 128_008, 128_009] if evidence == "config.json" else []
    tokenizer = tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=eos_ids)
    assert tokenizer.specials["<|finetune_right_pad_id|>"] == 128_004
    assert tokenizer.specials["<|step_id|>"] == 128_005
    assert tokenizer.specials["<|python_tag|>"] == 128_010
    assert tokenizer.specials["<|image|>"] == 128_011
    assert tokenizer.stop_ids == {128_001, 128_008, 128_009}


def opened(folder: Path, lines: list[bytes]) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return tokenizer_from_folder(folder, bos_id=None, eos_ids=[])


def ranked(tokens: list[bytes]) -> list[bytes]:
    return [b"%s %d" % (token, rank) for rank, token in enumerate(tokens)]


def test_a_word_is_made_by_the_lowest_ranks(tmp_path: Path) -> None:
    tokens = [*BYTES, *map(base64.b64encode, [b"ab", b"bc", b"abcd"])]
    tokenizer = opened(tmp_path, ranked(tokens))
    assert tokenizer.encode("abc") == [256, ord("c")]
    assert tokenizer.encode("abcd") == [258]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (ranked(BYTES[:255]), "no token for byte 0xFF"),
        ([*ranked(BYTES), b"QUI= 258"], "line 257: .*rank 256"),
        ([*ranked(BYTES), b"QUI= 256", b"QUI= 257"], "line 258: "),
        ([*ranked(BYTES), b"QUI 256"], "line 257: "),
        ([*ranked(BYTES), b"= 256"], "line 257: "),
        ([*ranked(BYTES), b"QUI= 256 7"], "line 257: "),
        ([*ranked(BYTES), b"QUI= -1"], "line 257: "),
        ([*ranked(BYTES), b"", b"QUI= 256"], "line 257: "),
    ],
)
def test_damaged_ranks_are_refused_by_line(lines: list[bytes], named: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=rf"tokenizer\.model: {named}"):
        opened(tmp_path, lines)
