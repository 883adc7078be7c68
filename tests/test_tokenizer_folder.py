"""Hugging Face folders: which file is read, what tokenizer_config.json changes, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamachat.errors import DamagedFileError, UsageError
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.folder import tokenizer_from_folder

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
VOCAB = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<s>": 4, "</s>": 5, "<|im_end|>": 6, "[outilé]": 7}


def added(text: str, *, special: bool) -> dict[str, Any]:
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": VOCAB[text], "content": text, "special": special, **marks}


def begins_with(text: str) -> dict[str, Any]:
    """A post-processor that puts a token before the text."""
    template = [
        {"SpecialToken": {"id": text, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    known = {text: {"id": text, "ids": [VOCAB[text]], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": known,
    }


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": VOCAB, "merges": ["a b"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added("<s>", special=True),
            added("</s>", special=True),
            added("<|im_end|>", special=True),
            added("[outilé]", special=False),
        ],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
        **changes,
    }


def opened(
    folder: Path,
    settings: Any = None,
    *,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    **changes: Any,
) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)), encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer_from_folder(folder, bos_id=bos_id, eos_ids=eos_ids)


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path)
    assert tokenizer.encode("ab a") == [3, 2, 0]
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (None, False, {6})


def test_the_post_processor_tells_bos(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, post_processor=begins_with("<s>"))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (4, True)
    assert tokenizer.encode("a") == [0]


def test_the_settings_overrule_the_post_processor(tmp_path: Path) -> None:
    settings = {"add_bos_token": False, "bos_token": "<s>"}
    tokenizer = opened(tmp_path, settings, post_processor=begins_with("<s>"))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (4, False)


@pytest.mark.parametrize("written", ["<s>", {"content": "<s>", "__type": "AddedToken"}])
def test_the_settings_name_bos_as_a_string_or_a_token(tmp_path: Path, written: Any) -> None:
    tokenizer = opened(tmp_path, {"bos_token": written, "add_bos_token": True}, bos_id=5)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (4, True)


def test_the_config_names_bos_where_the_settings_do_not(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {"bos_token": None, "add_bos_token": True}, bos_id=4)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (4, True)


def test_every_source_of_stop_ids_counts(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {"eos_token": "</s>"}, eos_ids=[4, 999])
    assert tokenizer.stop_ids == {4, 5, 6}


def test_the_settings_eos_comes_before_the_config_s(tmp_path: Path) -> None:
    assert opened(tmp_path, {"eos_token": "</s>"}, eos_ids=[4]).eos_id == 5
    assert opened(tmp_path, {}, eos_ids=[4]).eos_id == 4


def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path)
    assert tokenizer.encode("a[outilé]") == [0, 7]
    assert tokenizer.decode([0, 7]) == "a[outilé]"


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "[outilé]"},
        {"added_tokens_decoder": {"7": {"content": "[outilé]", "special": True}}},
    ],
)
def test_what_the_settings_make_special_is_not_found_in_text(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    tokenizer = opened(tmp_path, settings)
    assert tokenizer.specials["[outilé]"] == 7
    assert 7 not in tokenizer.encode("a[outilé]")
    assert tokenizer.token_bytes(7) == b""


def test_a_files_own_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    tokenizer = opened(tmp_path, truncation=truncation, padding=padding)
    assert tokenizer.encode("b b b") == [1, 2, 1, 2, 1]


def test_a_regular_expression_that_gives_up_is_an_error(tmp_path: Path) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a|a|aa)+c"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = opened(tmp_path, pre_tokenizer=split)
    with pytest.raises(UsageError, match="a text of 60 characters"):
        tokenizer.encode("a" * 60)


def test_building_and_using_a_tokenizer_does_not_import_torch(tmp_path: Path) -> None:
    opened(tmp_path)
    code = (
        "import sys; from pathlib import Path; import llamachat.tokenizer.gguf;"
        "from llamachat.tokenizer.folder import tokenizer_from_folder;"
        "tokenizer = tokenizer_from_folder(Path(sys.argv[1]), bos_id=None, eos_ids=[]);"
        "tokenizer.decode(tokenizer.encode('a')); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"model": {}}', b"\xff\xfe\x00", b"[" * 10_000]
)
def test_a_damaged_tokenizer_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json: "):
        tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": -1}, "merges": []},
    ],
)
def test_a_model_that_contradicts_itself_is_refused(tmp_path: Path, model: dict[str, Any]) -> None:
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json: "):
        opened(tmp_path, model=model, added_tokens=[])


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, decoder: Any) -> None:
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json: decoder: found .*ByteLevel"):
        opened(tmp_path, decoder=decoder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], "list"),
        ({"bos_token": 7}, "bos_token"),
        ({"eos_token": {"content": []}}, "eos_token"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        (
            {"added_tokens_decoder": {"x": {"content": "a", "special": True}}},
            "added_tokens_decoder",
        ),
        (
            {"added_tokens_decoder": {"-1": {"content": "a", "special": True}}},
            "added_tokens_decoder",
        ),
        ({"added_tokens_decoder": {"1": "a"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"1": {"special": True}}}, "added_tokens_decoder"),
    ],
)
def test_damaged_settings_are_refused_by_key(tmp_path: Path, settings: Any, named: str) -> None:
    with pytest.raises(DamagedFileError, match=rf"tokenizer_config\.json: .*{named}"):
        opened(tmp_path, settings)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[" * 100_000])
def test_settings_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"tokenizer_config\.json: not JSON"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"no model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_sentencepiece_model_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"tokenizer\.model: "):
        tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])


def test_a_sentencepiece_model_with_a_piece_that_is_no_utf8_is_refused(
    data: Path, tmp_path: Path
) -> None:
    content = (data / "tokenizers/llama2/tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"\x05Hello", b"\x05He\xffxo"))
    with pytest.raises(DamagedFileError, match=r"tokenizer\.model: "):
        tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(DamagedFileError, match="268435457 bytes, expected at most 268435456"):
        tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])


def test_a_sentencepiece_model_takes_the_settings(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "tokenizers/llama2/tokenizer.model", tmp_path)
    settings = {
        "add_bos_token": False,
        "eos_token": "[END]",
        "added_tokens_decoder": {"32000": {"content": "[END]", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = tokenizer_from_folder(tmp_path, bos_id=None, eos_ids=[])
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)
    assert tokenizer.stop_ids == {2, 32000}
    assert tokenizer.specials["[END]"] == 32000
    assert (tokenizer.vocab_size, tokenizer.token_bytes(32000)) == (32001, b"")
    assert tokenizer.decode(tokenizer.encode("[END]")) == "[END]"
