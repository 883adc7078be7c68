"""GGUF metadata that is wrong: refused by key, with what was found; never a crash or a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.errors import DamagedFileError
from llamachat.tokenizer.gguf import tokenizer_from_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BPE: dict[str, Any] = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": ["a", "b", "ab", "<|im_end|>"],
    "token_type": [1, 1, 1, 3],
    "merges": ["a b"],
    "bos_token_id": 3,
    "eos_token_id": 3,
    "add_bos_token": False,
}
SPM: dict[str, Any] = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", *BYTES, "▁", "a"],
    "scores": [0.0] * 260,
    "token_type": [2, 3, *[6] * 256, 1, 1],
    "bos_token_id": 1,
    "eos_token_id": 1,
    "add_space_prefix": True,
}


def build(values: dict[str, Any]) -> object:
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return tokenizer_from_gguf(keys, "bad.gguf")


def refused(values: dict[str, Any], key: str) -> str:
    with pytest.raises(DamagedFileError) as failure:
        build(values)
    message = failure.value.message
    assert message.startswith(f"bad.gguf: tokenizer.ggml.{key}: "), message
    return message


def test_both_examples_are_good_as_they_are() -> None:
    build(BPE)
    build(SPM)


@pytest.mark.parametrize("array", [list, np.asarray])
def test_numbers_may_come_as_lists_or_arrays(array: Callable[[list[Any]], Any]) -> None:
    build({**SPM, "scores": array(SPM["scores"]), "token_type": array(SPM["token_type"])})


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "merges"])
def test_a_byte_level_vocabulary_needs_its_keys(key: str) -> None:
    message = refused({name: value for name, value in BPE.items() if name != key}, key)
    assert "found nothing" in message


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "scores"])
def test_a_sentencepiece_vocabulary_needs_its_keys(key: str) -> None:
    message = refused({name: value for name, value in SPM.items() if name != key}, key)
    assert "found nothing" in message


@pytest.mark.parametrize("key", sorted(BPE))
@pytest.mark.parametrize("value", [1.5, {}, [[1]], b"a", [None], [2**70], np.zeros((2, 2))])
def test_a_byte_level_key_of_a_wrong_type_is_refused(key: str, value: Any) -> None:
    refused({**BPE, key: value}, key)


@pytest.mark.parametrize("key", sorted(SPM))
@pytest.mark.parametrize("value", [1.5, {}, [[1]], b"a", [None], [2**70], np.zeros((2, 2))])
def test_a_sentencepiece_key_of_a_wrong_type_is_refused(key: str, value: Any) -> None:
    refused({**SPM, key: value}, key)


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"model": "bert"}, "model", "'bert', expected 'llama' or 'gpt2'"),
        ({"pre": "qwen2"}, "pre", "'qwen2', expected one of smollm, llama-bpe"),
        ({"tokens": []}, "tokens", "an empty list"),
        ({"tokens": ["a", "b", "a", "c"]}, "tokens", "'a' 2 times"),
        ({"tokens": ["a", "b", "ab", "\udc80"]}, "tokens", "UTF-8"),
        ({"token_type": [1, 1, 1]}, "token_type", "3 numbers, expected 4"),
        ({"token_type": [1, 1, 1, 7]}, "token_type", "7, expected 1 to 6"),
        ({"token_type": [True] * 4}, "token_type", "list"),
        ({"merges": ["a c"]}, "merges", "'a c'"),
        ({"merges": ["b a"]}, "merges", "'b a'"),
        ({"merges": ["ab"]}, "merges", "'ab'"),
        ({"merges": ["a b b"]}, "merges", "'a b b'"),
        ({"merges": ["a " + "b" * 10_000]}, "merges", "'a b"),
    ],
)
def test_a_byte_level_vocabulary_that_contradicts_itself_is_refused(
    change: dict[str, Any], key: str, found: str
) -> None:
    message = refused({**BPE, **change}, key)
    assert found in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"scores": [0.0] * 259}, "scores", "259 numbers, expected 260"),
        ({"scores": [float("nan")] * 260}, "scores", "NaN"),
        ({"scores": [1e300] * 260}, "scores", "infinity"),
        ({"token_type": [2, 2, *[6] * 256, 1, 1]}, "token_type", "2 unknown tokens"),
        ({"token_type": [2, 3, 1, *[6] * 255, 1, 1]}, "token_type", "255 of <0x00> to <0xFF>"),
        ({"token_type": [2, 3, *[6] * 256, 1, 6]}, "token_type", "'a' as bytes"),
        (
            {"tokens": ["?", "<s>", *BYTES, "▁", "a"], "token_type": [3, 3, *[6] * 256, 1, 1]},
            "token_type",
            "0 unknown tokens",
        ),
        ({"tokens": ["<unk>", "<s>", *BYTES, "▁", ""]}, "tokens", "found ''"),
        ({"tokens": ["<unk>", "<s>", *BYTES, "▁", "a\0"]}, "tokens", "without NUL"),
    ],
)
def test_a_sentencepiece_vocabulary_that_contradicts_itself_is_refused(
    change: dict[str, Any], key: str, found: str
) -> None:
    message = refused({**SPM, **change}, key)
    assert found in message
    assert len(message) < 250


@given(
    st.sampled_from([BPE, SPM]),
    st.data(),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.lists(st.text()),
        st.lists(st.integers(-1, 8)),
        st.lists(st.one_of(st.integers(), st.floats())),
    ),
)
def test_any_value_of_any_key_is_taken_or_refused(
    values: dict[str, Any], data: st.DataObject, value: Any
) -> None:
    key = data.draw(st.sampled_from(sorted(values)))
    try:
        tokenizer = tokenizer_from_gguf(
            {f"tokenizer.ggml.{name}": item for name, item in {**values, key: value}.items()}, "x"
        )
    except DamagedFileError:
        return
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
