"""SentencePiece vocabularies: from tokenizer.model, from tokenizer.json and from GGUF's keys."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.gguf import tokenizer_from_gguf

VECTORS = {
    "Hello world": [15043, 3186],
    " Hello": [29871, 15043],
    "   Hello": [1678, 15043],
    "\n": [29871, 13],
    "\t\n": [29871, 12, 13],
    "3333": [29871, 29941, 29941, 29941, 29941],
    "Führer": [383, 4000, 261],
    "我爱苹果": [29871, 30672, 234, 139, 180, 235, 142, 188, 30801],
    "😁": [29871, 243, 162, 155, 132],
    "' era": [525, 3152],
    " this is 🦙.cpp": [29871, 445, 338, 29871, 243, 162, 169, 156, 29889, 8223],
    "</s>": [1533, 29879, 29958],
}
ODD_TEXTS = [
    "▁",
    "a▁b",
    " ",
    "  ",
    "<0x0A>",
    "<unk>",
    "\x00\x01",
    "\r\n\t x  ",
    "e\u0301 ﬁ Ａ",
    "🦙" * 9,
]


def reference(data: Path, name: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(data / "tokenizers" / name / "tokenizer.model"))


def metadata_of(model: SentencePieceProcessor, **keys: Any) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a SentencePiece model."""
    ids = range(model.get_piece_size())
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in ids
    ]
    values = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def llama2(data: Path) -> SentencePieceProcessor:
    return reference(data, "llama2")


@pytest.fixture(scope="module")
def llama2_json(data: Path) -> Tokenizer:
    return tokenizer_from_folder(data / "tokenizers/llama2", bos_id=1, eos_ids=[2])


@pytest.fixture(scope="module")
def llama2_model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(data / "tokenizers/llama2/tokenizer.model", folder)
    return tokenizer_from_folder(folder, bos_id=None, eos_ids=[])


@pytest.fixture(scope="module")
def llama2_gguf(llama2: SentencePieceProcessor) -> Tokenizer:
    return tokenizer_from_gguf(metadata_of(llama2), "llama2.gguf")


@pytest.fixture(params=["llama2_json", "llama2_model", "llama2_gguf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_llama2_gives_the_published_ids(tokenizer: Tokenizer) -> None:
    assert {text: tokenizer.encode(text) for text in VECTORS} == VECTORS


def test_llama2_ids_equal_sentencepieces(
    data: Path, llama2: SentencePieceProcessor, tokenizer: Tokenizer
) -> None:
    wiki = (data / "text/wiki.test.raw").read_text(encoding="utf-8")[:150_000]
    for text in [wiki, *ODD_TEXTS]:
        assert tokenizer.encode(text) == llama2.encode(text), text[:20]
    assert tokenizer.decode(llama2.encode(wiki)) == wiki


def test_pieces_are_spelled_as_in_the_model(
    llama2: SentencePieceProcessor, tokenizer: Tokenizer
) -> None:
    ids = [0, 1, 2, 3, 13, 258, 259, 15043, 31999]
    assert [tokenizer.piece(i) for i in ids] == [llama2.id_to_piece(i) for i in ids]
    assert tokenizer.vocab_size == 32000


def test_byte_pieces_are_bytes_and_special_ones_nothing(tokenizer: Tokenizer) -> None:
    ids = [0, 1, 2, 3, 13, 258, 259, 15043]
    expected = [b"", b"", b"", b"\x00", b"\n", b"\xff", b"  ", b" Hello"]
    assert [tokenizer.token_bytes(i) for i in ids] == expected


def test_one_dummy_space_is_added_and_taken_away(tokenizer: Tokenizer) -> None:
    assert tokenizer.space_prefix
    assert tokenizer.encode("") == []
    assert tokenizer.decode([15043]) == "Hello"
    assert tokenizer.decode([29871, 15043]) == " Hello"
    assert tokenizer.decode([1, 15043, 15043, 2]) == "Hello Hello"


def test_special_tokens_are_never_parsed_from_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in ("<s>", "a</s>b", "<unk>", "</s>"):
        assert not set(tokenizer.encode(text)) & {0, 1, 2}
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama2_begins_with_bos_and_stops_at_eos(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    assert tokenizer.stop_ids == {2}


@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "7", "我"])
def test_a_long_run_of_one_character_comes_back(
    llama2_json: Tokenizer, llama2_gguf: Tokenizer, unit: str
) -> None:
    text = unit * 30_000
    assert llama2_json.decode(llama2_json.encode(text)) == text
    assert llama2_gguf.decode(llama2_gguf.encode(text)) == text


@pytest.mark.slow
def test_every_form_of_llama2_gives_the_same_ids_on_a_whole_corpus(
    data: Path,
    llama2: SentencePieceProcessor,
    llama2_json: Tokenizer,
    llama2_model: Tokenizer,
    llama2_gguf: Tokenizer,
) -> None:
    wiki = (data / "text/wiki.test.raw").read_text(encoding="utf-8")
    expected = llama2.encode(wiki)
    for tokenizer in (llama2_json, llama2_model, llama2_gguf):
        assert tokenizer.encode(wiki) == expected


@given(text=st.text())
@settings(deadline=None)
def test_llama2_ids_equal_sentencepieces_on_any_text(
    text: str,
    llama2: SentencePieceProcessor,
    llama2_json: Tokenizer,
    llama2_model: Tokenizer,
    llama2_gguf: Tokenizer,
) -> None:
    for tokenizer in (llama2_json, llama2_model, llama2_gguf):
        ids = tokenizer.encode(text)
        assert ids == llama2.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chinese-llama", "chatglm2"])
def test_other_models_give_sentencepieces_ids_on_a_whole_corpus(
    data: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(data / "tokenizers" / name / "tokenizer.model", tmp_path)
    tokenizer = tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])
    wiki = (data / "text/wiki.test.raw").read_text(encoding="utf-8")
    assert tokenizer.encode(wiki) == reference(data, name).encode(wiki)


@pytest.mark.parametrize("name", ["chinese-llama", "chatglm2"])
def test_other_models_give_sentencepieces_ids(data: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(data / "tokenizers" / name / "tokenizer.model", tmp_path)
    expected = reference(data, name)
    tokenizer = tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])
    for text in [*VECTORS, "人工智能助手 ChatGLM2-6B，很高兴见到你", "def f():\n    return 1\n"]:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == expected.get_piece_size()


def test_chinese_pieces_go_before_llamas(data: Path, tmp_path: Path) -> None:
    model = reference(data, "chinese-llama")
    tokenizer = tokenizer_from_gguf(metadata_of(model), "chinese.gguf")
    text = "人工智能是一门科学"
    assert tokenizer.encode(text) == model.encode(text)
    assert max(tokenizer.encode(text)) >= 32000


def test_chatglm2_gives_the_published_ids(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "tokenizers/chatglm2/tokenizer.model", tmp_path)
    tokenizer = tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])
    vectors = json.loads((data / "vectors/chatglm2/tokenizer_and_prompts.json").read_bytes())
    for vector in vectors["chatglm2_encode"]:
        assert tokenizer.encode(vector["text"]) == vector["ids"][2:]  # [gMASK] sop


def merged(text: str, rank: dict[str, float]) -> list[str]:
    """The plain algorithm: merge the best-scored adjacent pair, the leftmost of equals."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(rank.get(a + b), i) for i, (a, b) in enumerate(pairwise(pieces))]
        known = [(-score, i) for score, i in pairs if score is not None]
        if not known:
            return pieces
        at = min(known)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_a_real_gguf_file_splits_text_by_its_scores(data: Path) -> None:
    fields = GGUFReader(data / "models/stories260K/stories260K.gguf").fields
    metadata = {key: field.contents() for key, field in fields.items()}
    tokenizer = tokenizer_from_gguf(metadata, "stories260K.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    rank = dict(zip(tokens[259:], metadata["tokenizer.ggml.scores"][259:], strict=True))
    story = (data / "models/stories260K/expected_stdout_200steps.txt").read_text(encoding="utf-8")
    for line in story.splitlines():
        assert [tokenizer.piece(i) for i in tokenizer.encode(line)] == merged(line, rank)
    assert tokenizer.decode(tokenizer.encode(story)) == story
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, True, {2})


def tiny(**keys: Any) -> Tokenizer:
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"],
        "scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
        "token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        **keys,
    }
    return tokenizer_from_gguf(
        {f"tokenizer.ggml.{key}": value for key, value in values.items()}, "tiny.gguf"
    )


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(token) for token in tokenizer.encode(text)]


def test_a_file_may_forbid_the_dummy_space() -> None:
    tokenizer = tiny(add_space_prefix=False)
    assert not tokenizer.space_prefix
    assert pieces(tokenizer, "ab ab") == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_a_file_may_forbid_bos() -> None:
    assert tiny(bos_token_id=1).add_bos
    assert not tiny(bos_token_id=1, add_bos_token=False).add_bos
    assert not tiny().add_bos


def test_without_byte_pieces_an_unknown_character_is_the_unknown_token() -> None:
    assert pieces(tiny(), "aé") == ["▁", "a", "<unk>"]


def test_an_unknown_token_written_as_control_serves_as_one() -> None:
    expected = ["▁", "a", "<unk>"]
    assert pieces(tiny(token_type=[3, 3, 3, 1, 1, 1, 1, 1]), "aé") == expected


def test_user_defined_tokens_with_spaces_are_found_in_text() -> None:
    keys = {"tokens": ["<unk>", "▁", "a", "b", "a b"], "scores": [0.0] * 5}
    tokenizer = tiny(**keys, token_type=[2, 1, 1, 1, 4])
    assert tokenizer.encode("a b") == [1, 4]
    assert tokenizer.decode([1, 4]) == "a b"
