"""Every form of every real tokenizer against the library that its authors use, on any text."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import test_tokenizer_byte_level as byte_level
import test_tokenizer_sentencepiece as sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from llamachat.checkpoints.chatglm import APPENDED_TOKENS
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder
from llamachat.tokenizer.gguf import tokenizer_from_gguf

N_CHARACTERS = int(os.environ.get("LLAMACHAT_TEST_CHARACTERS", "40000"))  # 1300000: all
FORMS = {
    "llama2": ("tokenizer.json", "tokenizer.model", "gguf"),
    "chinese-llama": ("tokenizer.model", "gguf"),
    "chatglm2": ("tokenizer.model", "gguf"),
    "llama3": ("tokenizer.json", "tokenizer.model", "gguf"),
    "smollm2": ("tokenizer.json", "gguf"),
}
UNKNOWN_BYTES = b"\x04\x06\x13\x14\x16\x1d\xf1\xf2"  # of those that are in UTF-8
SPELLED = (
    "<s>", "</s>", "<unk>", "<pad>", "[gMASK]", "sop", "eop", "<0x0A>", "<|endoftext|>",
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|reserved_special_token_0|>", "[INST]", "<<SYS>>", "▁", " ", "\n", "\r\n", "'S", "123",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPELLED)), max_size=8)


@dataclass(frozen=True)
class Pair:
    ours: Tokenizer
    encode: Callable[[str], list[int]]  # of the reference
    comes_back_as: Callable[[str], str]


def with_spaces(text: str) -> str:
    """SentencePiece takes U+2581 for a space."""
    return text.replace("▁", " ")


def without_unknown_bytes(text: str) -> str:
    """SmolLM2's table lacks bytes that no text of its training had."""
    return bytes(byte for byte in text.encode() if byte not in UNKNOWN_BYTES).decode(
        errors="replace"
    )


def unchanged(text: str) -> str:
    return text


COMES_BACK = {"llama3": unchanged, "smollm2": without_unknown_bytes}


@pytest.fixture(scope="module")
def pair_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    @cache
    def pair(name: str, form: str) -> Pair:
        source = data / "tokenizers" / name
        if form == "gguf":
            ours = from_gguf(data, name)
        else:
            folder = tmp_path_factory.mktemp(name)
            shutil.copy(source / form, folder)
            appended = APPENDED_TOKENS if name == "chatglm2" else ()
            ours = tokenizer_from_folder(folder, bos_id=None, eos_ids=[], appended=appended)
        return Pair(ours, reference(data, name), COMES_BACK.get(name, with_spaces))

    return pair


def from_gguf(data: Path, name: str) -> Tokenizer:
    source = data / "tokenizers" / name / "tokenizer.json"
    if name == "llama3":
        keys = byte_level.metadata_of(source, pre="llama-bpe", bos_token_id=128000)
    elif name == "smollm2":
        keys = byte_level.metadata_of(source, pre="smollm")
    else:
        keys = sentencepiece.metadata_of(sentencepiece.reference(data, name))
    return tokenizer_from_gguf(keys, f"{name}.gguf")


@cache
def reference(data: Path, name: str) -> Callable[[str], list[int]]:
    folder = data / "tokenizers" / name
    if name == "smollm2":
        library = Library.from_file(str(folder / "tokenizer.json"))
        library.encode_special_tokens = True
        return lambda text: library.encode(text, add_special_tokens=False).ids
    if name == "llama3":
        lines = (folder / "tokenizer.model").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        meta = tiktoken.Encoding(
            name, pat_str=byte_level.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return meta.encode_ordinary
    encode: Callable[[str], list[int]] = sentencepiece.reference(data, name).encode
    return encode


EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms]
)


def check(pair: Pair, text: str) -> None:
    ids = pair.ours.encode(text)
    assert ids == pair.encode(text)
    assert not {*ids} & {*pair.ours.specials.values()}
    assert pair.ours.decode(ids) == pair.comes_back_as(text)


@EVERY_FORM
def test_ids_of_a_corpus_are_the_reference_s_and_come_back(
    data: Path, name: str, form: str, pair_of: Callable[[str, str], Pair]
) -> None:
    wiki = (data / "text/wiki.test.raw").read_bytes().decode()
    start = max(0, (len(wiki) - N_CHARACTERS) // 2)
    check(pair_of(name, form), wiki[start : start + N_CHARACTERS])


@EVERY_FORM
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(parts=TEXTS)
def test_ids_of_any_text_are_the_reference_s_and_come_back(
    parts: list[str], name: str, form: str, pair_of: Callable[[str, str], Pair]
) -> None:
    """Also of text that spells special tokens: it does not become them."""
    check(pair_of(name, form), "".join(parts))
