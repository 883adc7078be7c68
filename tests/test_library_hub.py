"""What of a repository is fetched, and what it means when the Hub does not deliver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, FOLDER, INDEX, LLAMA, META_FOLDER, TOKEN, Hub

from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.meta import MetaCheckpoint
from llamachat.errors import (
    AccessError,
    LlamachatError,
    ModelNotFoundError,
    TransferError,
    UsageError,
)
from llamachat.library import hub_cache, repository, store
from llamachat.library.hub_cache import HubName


def fetch(name: str, **options: Any) -> Path:
    parsed = hub_cache.parse(name)
    assert parsed is not None
    return repository.fetch(parsed, **options)


def test_a_download_brings_what_inference_needs_and_leaves_the_rest(
    fake_hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    unneeded = dict.fromkeys(
        ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.safetensors",
         "consolidated.safetensors", "a.gguf", "modeling_x.py"], "no"
    )  # fmt: skip
    needed = {**FOLDER, "generation_config.json": "{ }", "chat_template.jinja": "x"}
    fake_hub.files = {**needed, **unneeded}
    path = fetch("org/name")
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == set(needed)
    assert all((path / name).read_text() == text for name, text in needed.items())
    assert hub_cache.locate(HubName("org/name")) == path
    assert capfd.readouterr() == ("", "")


def test_pickled_weights_are_fetched_where_a_repository_has_no_others(fake_hub: Hub) -> None:
    index = INDEX.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    needed = {
        "config.json": LLAMA,
        "tokenizer.model": "m",
        "pytorch_model.bin.index.json": index,
        "pytorch_model-00001-of-00002.bin": "1",
        "pytorch_model-00002-of-00002.bin": "2",
    }
    fake_hub.files = {**needed, "training_args.bin": "no"}
    path = fetch("org/name")
    assert {p.name for p in path.iterdir()} == set(needed)
    assert hub_cache.locate(HubName("org/name")) == path
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    assert hub_cache.locate(HubName("org/name")) is None


def test_one_gguf_file_is_downloaded_alone(fake_hub: Hub) -> None:
    fake_hub.files = {"b1.gguf": "a", "b[1].gguf": "b", "config.json": LLAMA}
    path = fetch("org/name:b[1].gguf")
    assert path.read_text() == "b"
    assert [p.name for p in path.parent.iterdir()] == ["b[1].gguf"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_there_is_fetched_again_only_by_force(fake_hub: Hub, force: bool) -> None:
    fake_hub.files = {"a.gguf": "a"}
    fetch("org/name:a.gguf")
    fake_hub.asked.clear()
    fetch("org/name:a.gguf", force=force)
    assert any("/resolve/" in path for path in fake_hub.asked) is force


def test_a_split_gguf_is_downloaded_with_all_its_parts(fake_hub: Hub) -> None:
    fake_hub.files = {f"m-{i:05}-of-00002.gguf": str(i) for i in (1, 2)}
    fake_hub.files["m-00001-of-00003.gguf"] = "another split"
    path = fetch("org/name:m-00001-of-00002.gguf")
    assert sorted(p.read_text() for p in path.parent.iterdir()) == ["1", "2"]


def test_a_repository_of_gguf_files_named_without_a_file_lists_them(fake_hub: Hub) -> None:
    fake_hub.files = {"a.gguf": "a", "b-00001-of-00002.gguf": "b", "b-00002-of-00002.gguf": "b"}
    with pytest.raises(UsageError, match=r"a.gguf, b-00001-of-00002.gguf$") as caught:
        fetch("org/name")
    assert "org/name:FILE.gguf" in str(caught.value.hint)


QUANTIZED = {f"m-{name}.gguf": name for name in ("Q4_K_M", "q4_k_s", "Q8_0", "bf16", "UD-Q8_0")}


@pytest.mark.parametrize(
    ("named", "file"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("Q4_K_S", "m-q4_k_s.gguf"),
        ("bf16", "m-bf16.gguf"),
        ("IQ2", "part/m_IQ2-00001-of-00002.gguf"),
    ],
)
def test_a_quantization_picks_the_file_that_tells_it(fake_hub: Hub, named: str, file: str) -> None:
    split = {f"part/m_IQ2-0000{i}-of-00002.gguf": str(i) for i in (1, 2)}
    fake_hub.files = {**QUANTIZED, **split, "mmproj-bf16.gguf": "eyes"}
    path = fetch(f"org/name:{named}")
    assert path.as_posix().endswith(f"{COMMIT}/{file}")
    fake_hub.asked.clear()
    assert store.require(f"org/name:{named}").path == path
    assert store.require(f"hf://org/name@main:{named}").path == path
    assert fake_hub.asked == []


def test_a_quantization_that_two_files_tell_lists_both(fake_hub: Hub) -> None:
    fake_hub.files = QUANTIZED
    with pytest.raises(
        UsageError, match=r"several GGUF files of q8_0: m-Q8_0.gguf, m-UD-Q8_0.gguf"
    ):
        fetch("org/name:q8_0")


def test_a_quantization_that_no_file_tells_lists_what_there_is(fake_hub: Hub) -> None:
    fake_hub.files = QUANTIZED
    with pytest.raises(ModelNotFoundError, match=r"org/name has no Q4_K$") as caught:
        fetch("org/name:Q4_K")
    assert "m-Q4_K_M.gguf" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "RepoNotFound", ModelNotFoundError),
        (404, "RevisionNotFound", ModelNotFoundError),
        (401, "", AccessError),
        (401, "GatedRepo", AccessError),
        (403, "GatedRepo", AccessError),
        (403, "", AccessError),
        (500, "", TransferError),
    ],
)
def test_a_refusal_of_the_hub_is_one_of_our_errors_without_the_token(
    fake_hub: Hub, status: int, code: str, error: type[LlamachatError]
) -> None:
    fake_hub.failure = (status, code)
    with pytest.raises(LlamachatError) as caught:
        fetch("org/name", token=TOKEN)
    assert type(caught.value) is error
    assert "org/name" in caught.value.message
    assert caught.value.hint
    assert TOKEN not in f"{caught.value.message} {caught.value.hint} {caught.value.__cause__}"


def test_a_token_that_no_header_can_carry_is_not_shown(fake_hub: Hub) -> None:
    token = "hf_secret\nsecond: line"
    with pytest.raises(AccessError) as caught:
        fetch("org/name", token=token)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_an_endpoint_that_nobody_listens_at_is_a_network_error(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransferError, match="cannot download org/name: Connect"):
        fetch("org/name")


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "", "-rf", "org/name:../x.gguf"])
def test_a_hostile_name_is_refused_before_the_network(fake_hub: Hub, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        store.resolve(name, notice=print, progress=None)
    assert fake_hub.asked == []


def test_offline_asks_nobody_and_says_what_to_pull(fake_hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        fetch("org/name", offline=True)
    assert "llamachat pull org/name" in str(caught.value.hint)
    assert fake_hub.asked == []


@pytest.mark.parametrize("folder", ["", "original/"])
def test_metas_form_is_fetched_where_a_repository_has_no_other(fake_hub: Hub, folder: str) -> None:
    needed = {f"{folder}{name}": text for name, text in META_FOLDER.items()}
    needed |= {f"{folder}consolidated.01.pth": "1"}
    beside = {"README.md": "no", "x.gguf": "no", f"{folder}checklist.chk": "no"}
    fake_hub.files = {**needed, **beside}
    path = fetch("org/name")
    assert {p.name for p in path.iterdir()} == {Path(name).name for name in needed}
    assert hub_cache.locate(HubName("org/name")) == path
    assert hub_cache.commit(HubName("org/name"), path) == COMMIT
    assert list(hub_cache.installed()) == [(HubName("org/name"), path)]


def test_metas_form_beside_a_better_one_is_left(fake_hub: Hub) -> None:
    original = {f"original/{name}": text for name, text in META_FOLDER.items()}
    fake_hub.files = {**FOLDER, **original, **META_FOLDER}
    path = fetch("org/name")
    assert {p.name for p in path.iterdir()} == {*FOLDER, "tokenizer.model"}
    assert not any("consolidated" in asked or "original" in asked for asked in fake_hub.asked)


def test_metas_form_beside_a_config_alone_is_metas(fake_hub: Hub) -> None:
    """Repositories of Meta's form have one, too, for the Hub to count downloads by."""
    fake_hub.files = {**META_FOLDER, "config.json": "{}"}
    path = fetch("org/name")
    assert isinstance(open_checkpoint(path), MetaCheckpoint)


def test_a_lora_is_said_to_be_no_model(fake_hub: Hub) -> None:
    fake_hub.files = {"adapter_config.json": "{}", "adapter_model.safetensors": "w"}
    with pytest.raises(UsageError, match="org/name is no whole model: it is a LoRA"):
        fetch("org/name")
    assert not any("adapter_model" in asked for asked in fake_hub.asked)
