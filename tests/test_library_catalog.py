"""The catalog: short names for models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamachat.errors import UsageError
from llamachat.library import catalog, hub_cache
from llamachat.settings import DEFAULT_MODEL


def test_the_default_model_is_in_the_catalog_and_in_a_wheel() -> None:
    entry = catalog.find(DEFAULT_MODEL)
    assert entry is not None
    assert entry.wheel is not None


def test_every_repository_of_the_catalog_can_be_pulled_by_its_own_name() -> None:
    for entry in catalog.CATALOG:
        assert hub_cache.parse(entry.repo) == hub_cache.HubName(entry.repo)


def test_no_alias_is_a_repository_name() -> None:
    aliases = [alias for entry in catalog.CATALOG for alias in (entry.alias, *entry.also)]
    assert len(set(aliases)) == len(aliases)
    assert not any(map(hub_cache.parse, aliases))


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("vicuna-7b", "lmsys/vicuna-7b-v1.5"),
        ("vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
        ("chatglm-6b", "THUDM/chatglm-6b"),
        ("chatglm2-6b", "THUDM/chatglm2-6b"),
        ("llama3.2-11b-vision", "meta-llama/Llama-3.2-11B-Vision-Instruct"),
        ("llama-30b", "huggyllama/llama-30b"),
    ],
)
def test_every_short_name_of_a_model_finds_it(name: str, repo: str) -> None:
    entry = catalog.find(name)
    assert entry is not None
    assert entry.repo == repo
    assert catalog.of_repo(repo) == entry


@pytest.mark.parametrize(
    ("alias", "vocab", "dim", "layers", "kv_dim", "hidden", "tied"),
    [
        ("llama-7b", 32000, 4096, 32, 4096, 11008, False),
        ("llama-13b", 32000, 5120, 40, 5120, 13824, False),
        ("llama-33b", 32000, 6656, 60, 6656, 17920, False),
        ("llama-65b", 32000, 8192, 80, 8192, 22016, False),
        ("llama-2-70b", 32000, 8192, 80, 1024, 28672, False),
        ("llama3-8b", 128256, 4096, 32, 1024, 14336, False),
        ("llama3.1-70b", 128256, 8192, 80, 1024, 28672, False),
        ("llama3.1-405b", 128256, 16384, 126, 1024, 53248, False),
        ("llama3.2-1b", 128256, 2048, 16, 512, 8192, True),
        ("llama3.2-3b", 128256, 3072, 28, 1024, 8192, True),
        ("alpaca-7b", 32001, 4096, 32, 4096, 11008, False),
        ("chinese-llama-13b", 49953, 5120, 40, 5120, 13824, False),
        ("chinese-alpaca-33b", 49954, 6656, 60, 6656, 17920, False),
        ("chinese-alpaca-2-7b", 55296, 4096, 32, 4096, 11008, False),
        ("tinyllama", 32000, 2048, 22, 256, 5632, False),
    ],
)
def test_parameters_are_those_of_the_shape(
    alias: str, vocab: int, dim: int, layers: int, kv_dim: int, hidden: int, tied: bool
) -> None:
    layer = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * hidden + 2 * dim
    entry = catalog.find(alias)
    assert entry is not None
    assert entry.params == (1 if tied else 2) * vocab * dim + layers * layer + dim


def test_every_family_that_runs_is_in_the_catalog() -> None:
    assert {entry.family for entry in catalog.CATALOG} == {
        "LLaMA-1", "Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2", "Alpaca", "Vicuna v0",
        "Vicuna v1", "Vicuna v1.5", "Koala", "Baize", "Luotuo", "Chinese-LLaMA", "Chinese-Alpaca",
        "Chinese-LLaMA-2", "Chinese-Alpaca-2", "ChatGLM", "ChatGLM2", "TinyLlama", "SmolLM2",
    }  # fmt: skip


def test_every_entry_tells_what_a_user_has_to_know() -> None:
    for entry in catalog.CATALOG:
        assert entry.licence
        assert entry.context >= 2048
        assert 1e8 < entry.params < 1e12
        assert entry.gated == entry.repo.startswith("meta-llama/")
        if wheel := entry.wheel:
            assert len(bytes.fromhex(wheel.sha256)) == len(bytes.fromhex(wheel.member_sha256)) == 32


def test_what_is_added_to_a_model_names_one_of_the_catalog() -> None:
    bases = {entry.base for entry in catalog.CATALOG if entry.base}
    assert bases
    assert all(catalog.find(base) for base in bases)


@pytest.mark.parametrize("name", ["alpaca-7b", "luotuo-lora-7b", "project-baize/baize-lora-7B"])
def test_a_part_of_a_model_is_no_model(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is no whole model: .* added to llama-7b"):
        catalog.check_is_whole(name)


def test_a_folder_of_the_users_is_taken_for_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "koala-7b").mkdir()
    catalog.check_is_whole("koala-7b")


def test_an_unknown_alias_is_not_found() -> None:
    assert catalog.find("smollm2") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("SmolLM2-360M", "smollm2-360m"),
        ("tinylama", "tinyllama"),
        ("HuggingFaceTB/smollm2-1.7", "smollm2-1.7b"),
    ],
)
def test_the_nearest_alias_is_offered_first(typed: str, meant: str) -> None:
    assert catalog.nearest(typed)[0] == meant


def test_nothing_is_offered_for_a_name_unlike_any_alias() -> None:
    assert catalog.nearest("zzzz") == []
