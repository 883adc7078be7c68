"""The Hugging Face cache: names of the Hub, and what other tools left there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, FOLDER, INDEX, LLAMA, META_FOLDER, OTHER, add_snapshot

from llamachat.errors import UsageError
from llamachat.library import hub_cache, removal, store
from llamachat.library.hub_cache import HubName


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("meta-llama/Llama-3.2-1B", HubName("meta-llama/Llama-3.2-1B")),
        ("org/name:file.gguf", HubName("org/name", "file.gguf")),
        ("org/name:sub/FILE.GGUF", HubName("org/name", "sub/FILE.GGUF")),
        ("org/name:Q4_K_M", HubName("org/name", "Q4_K_M")),
        ("org/name@v1.0", HubName("org/name", None, "v1.0")),
        ("org/name@refs/pr/1:x.gguf", HubName("org/name", "x.gguf", "refs/pr/1")),
    ],
)
def test_a_name_is_read_as_people_write_it(text: str, name: HubName) -> None:
    assert hub_cache.parse(text) == hub_cache.parse(f"hf://{text}") == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    ["", "name", "/", "org/", "/name", "a/b/c", "../x", "../../x", "a/..", "a..b/c", "a--b/c",
     "org/name.git", "-rf", "-rf/x", "org/-x", "org/name:", "org/name:file.bin", "org/na me",
     "org/name:../x.gguf", "org/name:/x.gguf", "org/name:a\\x.gguf", "org/name:*.gguf",
     "org/name@", "org/name@../x", "org/name@-x", "hf://", "hf://name", "org/name:Q4 K",
     "models/x.gguf", "C:/x.gguf", "org/n\0", "org/näme", f"org/{'x' * 97}", "org/name\n"],
)  # fmt: skip
def test_what_cannot_be_a_repository_is_no_name(text: str) -> None:
    assert hub_cache.parse(text) is None


def test_a_whole_snapshot_is_located_at_the_commit_of_the_main_branch(hub_folder: Path) -> None:
    add_snapshot(hub_folder, "org/name", FOLDER, commit=OTHER, ref=None)
    snapshot = add_snapshot(hub_folder, "org/name", FOLDER)
    assert hub_cache.locate(HubName("org/name")) == snapshot
    assert hub_cache.commit(HubName("org/name"), snapshot) == COMMIT


def test_a_revision_is_located_by_branch_or_by_commit(hub_folder: Path) -> None:
    add_snapshot(hub_folder, "org/name", FOLDER)
    other = add_snapshot(hub_folder, "org/name", FOLDER, commit=OTHER, ref="v1")
    by_branch, by_commit = (HubName("org/name", revision=it) for it in ("v1", OTHER))
    assert hub_cache.locate(by_branch) == hub_cache.locate(by_commit) == other
    assert hub_cache.locate(HubName("org/name", revision="v2")) is None


@pytest.mark.parametrize("revision", ["", "../main", "a/../../b", "/etc/passwd", "-x", "a b"])
def test_a_hostile_revision_is_refused(revision: str) -> None:
    with pytest.raises(UsageError):
        HubName("org/name", revision=revision)


@pytest.mark.parametrize("missing", list(FOLDER))
def test_a_snapshot_without_a_needed_file_is_not_located(hub_folder: Path, missing: str) -> None:
    add_snapshot(hub_folder, "org/name", {k: v for k, v in FOLDER.items() if k != missing})
    assert hub_cache.locate(HubName("org/name")) is None


def test_an_empty_weights_file_is_not_located(hub_folder: Path) -> None:
    add_snapshot(hub_folder, "org/name", {**FOLDER, "model.safetensors": ""})
    assert hub_cache.locate(HubName("org/name")) is None


def test_a_link_to_a_blob_that_is_gone_is_not_located(hub_folder: Path) -> None:
    snapshot = add_snapshot(hub_folder, "org/name", FOLDER)
    (snapshot / "model.safetensors").resolve().unlink()
    assert hub_cache.locate(HubName("org/name")) is None


def test_sharded_weights_are_located_only_with_every_shard_of_the_index(hub_folder: Path) -> None:
    files = {
        "config.json": LLAMA,
        "tokenizer.model": "t",
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00002.safetensors": "1",
    }
    snapshot = add_snapshot(hub_folder, "org/name", files)
    assert hub_cache.locate(HubName("org/name")) is None
    add_snapshot(hub_folder, "org/name", {"model-00002-of-00002.safetensors": "2"})
    assert hub_cache.locate(HubName("org/name")) == snapshot


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_not_located(hub_folder: Path, index: str) -> None:
    snapshot = add_snapshot(hub_folder, "org/name", FOLDER)
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert hub_cache.locate(HubName("org/name")) is None


def test_a_split_gguf_is_located_only_with_all_its_parts(hub_folder: Path) -> None:
    first = (
        add_snapshot(hub_folder, "org/g", {"m-00001-of-00002.gguf": "1"}) / "m-00001-of-00002.gguf"
    )
    name = HubName("org/g", "m-00001-of-00002.gguf")
    assert hub_cache.locate(name) is None
    add_snapshot(hub_folder, "org/g", {"m-00002-of-00002.gguf": "22"})
    assert hub_cache.locate(name) == first
    assert hub_cache.size_bytes(first) == 3


def test_installed_names_llama_folders_and_gguf_files_and_nothing_else(hub_folder: Path) -> None:
    llama = add_snapshot(hub_folder, "org/llama", FOLDER)
    add_snapshot(hub_folder, "org/bert", {**FOLDER, "config.json": '{"model_type": "bert"}'})
    add_snapshot(hub_folder, "org/part", {"config.json": LLAMA})
    split = {f"s-{i:05}-of-00002.gguf": "x" for i in (1, 2)}
    ggufs = add_snapshot(hub_folder, "org/gguf", {"q/a.gguf": "aa", "empty.gguf": "", **split})
    (hub_folder / "datasets--org--data").mkdir()
    (hub_folder / "models--odd").mkdir()
    assert list(hub_cache.installed()) == [
        (HubName("org/gguf", "q/a.gguf"), ggufs / "q/a.gguf"),
        (HubName("org/gguf", "s-00001-of-00002.gguf"), ggufs / "s-00001-of-00002.gguf"),
        (HubName("org/llama"), llama),
    ]


def test_a_file_that_two_names_share_is_counted_once(hub_folder: Path) -> None:
    snapshot = add_snapshot(hub_folder, "org/name", {"a.json": "same", "b.json": "same"})
    if not (snapshot / "a.json").is_symlink():
        pytest.skip("no links here")
    assert hub_cache.size_bytes(snapshot) == 4


def test_a_removed_repository_is_gone_with_all_its_revisions(hub_folder: Path) -> None:
    snapshot = add_snapshot(hub_folder, "org/name", FOLDER)
    add_snapshot(
        hub_folder, "org/name", {"config.json": "another revision"}, commit=OTHER, ref=None
    )
    kept = add_snapshot(hub_folder, "org/kept", FOLDER)
    everything = sum(
        p.stat().st_size for p in (hub_folder / "models--org--name" / "blobs").iterdir()
    )
    if (snapshot / "config.json").is_symlink():
        ref_bytes = len(COMMIT)
        assert removal.remove(HubName("org/name"), snapshot) == everything + ref_bytes
    else:
        assert removal.remove(HubName("org/name"), snapshot) >= everything
    assert not (hub_folder / "models--org--name").exists()
    assert hub_cache.locate(HubName("org/kept")) == kept


def test_one_of_two_gguf_files_is_removed_alone(hub_folder: Path) -> None:
    snapshot = add_snapshot(hub_folder, "org/g", {"a.gguf": "aaa", "b.gguf": "bb"})
    copies = 1 if (snapshot / "a.gguf").is_symlink() else 2
    assert removal.remove(HubName("org/g", "a.gguf"), snapshot / "a.gguf") in (3, 3 * copies)
    assert hub_cache.locate(HubName("org/g", "a.gguf")) is None
    assert hub_cache.locate(HubName("org/g", "b.gguf")) == snapshot / "b.gguf"
    removal.remove(HubName("org/g", "b.gguf"), snapshot / "b.gguf")
    assert not (hub_folder / "models--org--g").exists()


@pytest.mark.parametrize("missing", list(META_FOLDER))
def test_metas_form_without_a_needed_file_is_not_located(hub_folder: Path, missing: str) -> None:
    add_snapshot(hub_folder, "org/name", {k: v for k, v in META_FOLDER.items() if k != missing})
    assert hub_cache.locate(HubName("org/name")) is None


def test_metas_form_is_located_only_with_every_shard(hub_folder: Path) -> None:
    """The first has 32 of 64 rows."""
    snapshot = add_snapshot(hub_folder, "org/name", META_FOLDER)
    first = snapshot / "consolidated.00.pth"
    first.unlink()
    torch.save({"layers.0.attention.wq.weight": torch.ones(32, 64)}, first)
    assert hub_cache.locate(HubName("org/name")) is None
    add_snapshot(hub_folder, "org/name", {"consolidated.01.pth": "1"})
    assert hub_cache.locate(HubName("org/name")) == snapshot


def test_a_model_in_a_folder_of_its_repository_is_removed_with_it(hub_folder: Path) -> None:
    files = {f"original/{name}": text for name, text in META_FOLDER.items()}
    snapshot = add_snapshot(hub_folder, "org/name", files)
    located = store.require("org/name")
    assert located.path == snapshot / "original"
    store.remove(located)
    assert not snapshot.exists()
