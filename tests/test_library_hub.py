"""The Hub: names, the cache that other tools share, and downloads from a small Hub of our own."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.meta import MetaCheckpoint
from llamachat.errors import (
    AccessError,
    LlamachatError,
    ModelNotFoundError,
    TransferError,
    UsageError,
)
from llamachat.library import hub, store
from llamachat.library.hub import HubName

COMMIT, OTHER = "a" * 40, "b" * 40
LLAMA = json.dumps(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }
)  # fmt: skip
FOLDER = {"config.json": LLAMA, "tokenizer.json": "{}", "model.safetensors": "weights"}
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
)
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


def add_snapshot(
    cache: Path, repo: str, files: dict[str, str], *, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """What `huggingface_hub` leaves in its cache: blobs, links to them, and a ref."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        blob = folder / "blobs" / hashlib.sha256(text.encode()).hexdigest()
        blob.write_text(text)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(blob)
        except OSError:  # Windows without the right to make links: the library copies
            link.write_text(text)
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("meta-llama/Llama-3.2-1B", HubName("meta-llama/Llama-3.2-1B")),
        ("org/name:file.gguf", HubName("org/name", "file.gguf")),
        ("org/name:sub/FILE.GGUF", HubName("org/name", "sub/FILE.GGUF")),
    ],
)
def test_a_name_is_read_as_people_write_it(text: str, name: HubName) -> None:
    assert hub.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    ["", "name", "/", "org/", "/name", "a/b/c", "../x", "../../x", "a/..", "a..b/c", "a--b/c",
     "org/name.git", "-rf", "-rf/x", "org/-x", "org/name:", "org/name:file.bin", "org/na me",
     "org/name:../x.gguf", "org/name:/x.gguf", "org/name:a\\x.gguf", "org/name:*.gguf",
     "models/x.gguf", "C:/x.gguf", "org/n\0", "org/näme", f"org/{'x' * 97}", "org/name\n"],
)  # fmt: skip
def test_what_cannot_be_a_repository_is_no_name(text: str) -> None:
    assert hub.parse(text) is None


def test_a_whole_snapshot_is_located_at_the_commit_of_the_main_branch(cache: Path) -> None:
    add_snapshot(cache, "org/name", FOLDER, commit=OTHER, ref=None)
    snapshot = add_snapshot(cache, "org/name", FOLDER)
    assert hub.locate(HubName("org/name")) == snapshot
    assert hub.commit(HubName("org/name"), snapshot) == COMMIT


def test_a_revision_is_located_by_branch_or_by_commit(cache: Path) -> None:
    add_snapshot(cache, "org/name", FOLDER)
    other = add_snapshot(cache, "org/name", FOLDER, commit=OTHER, ref="v1")
    name = HubName("org/name")
    assert hub.locate(name, revision="v1") == hub.locate(name, revision=OTHER) == other
    assert hub.locate(name, revision="v2") is None


@pytest.mark.parametrize("revision", ["", "../main", "a/../../b", "/etc/passwd", "-x", "a b"])
def test_a_hostile_revision_is_refused(cache: Path, revision: str) -> None:
    with pytest.raises(UsageError):
        hub.locate(HubName("org/name"), revision=revision)


@pytest.mark.parametrize("missing", list(FOLDER))
def test_a_snapshot_without_a_needed_file_is_not_located(cache: Path, missing: str) -> None:
    add_snapshot(cache, "org/name", {k: v for k, v in FOLDER.items() if k != missing})
    assert hub.locate(HubName("org/name")) is None


def test_an_empty_weights_file_is_not_located(cache: Path) -> None:
    add_snapshot(cache, "org/name", {**FOLDER, "model.safetensors": ""})
    assert hub.locate(HubName("org/name")) is None


def test_a_link_to_a_blob_that_is_gone_is_not_located(cache: Path) -> None:
    snapshot = add_snapshot(cache, "org/name", FOLDER)
    (snapshot / "model.safetensors").resolve().unlink()
    assert hub.locate(HubName("org/name")) is None


def test_sharded_weights_are_located_only_with_every_shard_of_the_index(cache: Path) -> None:
    files = {
        "config.json": LLAMA,
        "tokenizer.model": "t",
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00002.safetensors": "1",
    }
    snapshot = add_snapshot(cache, "org/name", files)
    assert hub.locate(HubName("org/name")) is None
    add_snapshot(cache, "org/name", {"model-00002-of-00002.safetensors": "2"})
    assert hub.locate(HubName("org/name")) == snapshot


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_not_located(cache: Path, index: str) -> None:
    snapshot = add_snapshot(cache, "org/name", FOLDER)
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert hub.locate(HubName("org/name")) is None


def test_a_split_gguf_is_located_only_with_all_its_parts(cache: Path) -> None:
    first = add_snapshot(cache, "org/g", {"m-00001-of-00002.gguf": "1"}) / "m-00001-of-00002.gguf"
    name = HubName("org/g", "m-00001-of-00002.gguf")
    assert hub.locate(name) is None
    add_snapshot(cache, "org/g", {"m-00002-of-00002.gguf": "22"})
    assert hub.locate(name) == first
    assert hub.size_bytes(first) == 3


def test_installed_names_llama_folders_and_gguf_files_and_nothing_else(cache: Path) -> None:
    llama = add_snapshot(cache, "org/llama", FOLDER)
    add_snapshot(cache, "org/bert", {**FOLDER, "config.json": '{"model_type": "bert"}'})
    add_snapshot(cache, "org/part", {"config.json": LLAMA})
    split = {f"s-{i:05}-of-00002.gguf": "x" for i in (1, 2)}
    ggufs = add_snapshot(cache, "org/gguf", {"q/a.gguf": "aa", "empty.gguf": "", **split})
    (cache / "datasets--org--data").mkdir()
    (cache / "models--odd").mkdir()
    assert list(hub.installed()) == [
        (HubName("org/gguf", "q/a.gguf"), ggufs / "q/a.gguf"),
        (HubName("org/gguf", "s-00001-of-00002.gguf"), ggufs / "s-00001-of-00002.gguf"),
        (HubName("org/llama"), llama),
    ]


def test_a_file_that_two_names_share_is_counted_once(cache: Path) -> None:
    snapshot = add_snapshot(cache, "org/name", {"a.json": "same", "b.json": "same"})
    if not (snapshot / "a.json").is_symlink():
        pytest.skip("no links here")
    assert hub.size_bytes(snapshot) == 4


def test_a_removed_repository_is_gone_with_all_its_revisions(cache: Path) -> None:
    snapshot = add_snapshot(cache, "org/name", FOLDER)
    add_snapshot(cache, "org/name", {"config.json": "another revision"}, commit=OTHER, ref=None)
    kept = add_snapshot(cache, "org/kept", FOLDER)
    everything = sum(p.stat().st_size for p in (cache / "models--org--name" / "blobs").iterdir())
    if (snapshot / "config.json").is_symlink():
        ref_bytes = len(COMMIT)
        assert hub.remove(HubName("org/name"), snapshot) == everything + ref_bytes
    else:
        assert hub.remove(HubName("org/name"), snapshot) >= everything
    assert not (cache / "models--org--name").exists()
    assert hub.locate(HubName("org/kept")) == kept


def test_one_of_two_gguf_files_is_removed_alone(cache: Path) -> None:
    snapshot = add_snapshot(cache, "org/g", {"a.gguf": "aaa", "b.gguf": "bb"})
    copies = 1 if (snapshot / "a.gguf").is_symlink() else 2
    assert hub.remove(HubName("org/g", "a.gguf"), snapshot / "a.gguf") in (3, 3 * copies)
    assert hub.locate(HubName("org/g", "a.gguf")) is None
    assert hub.locate(HubName("org/g", "b.gguf")) == snapshot / "b.gguf"
    hub.remove(HubName("org/g", "b.gguf"), snapshot / "b.gguf")
    assert not (cache / "models--org--g").exists()


@dataclass
class Hub:
    """The parts of the Hub's protocol that a download needs."""

    files: dict[str, str] = field(default_factory=dict)
    failure: tuple[int, str] | None = None  # HTTP status and X-Error-Code of every answer
    asked: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(path)
        if self.failure:
            status, code = self.failure
            return self._send(request, status, b"{}", {"X-Error-Code": code})
        if "/resolve/" in path:
            text = self.files[unquote(path).partition(f"/resolve/{COMMIT}/")[2]]
            etag = hashlib.sha256(text.encode()).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            return self._send(request, 200, text.encode(), headers)
        body: Any = {"id": "org/name", "sha": COMMIT}
        body["siblings"] = [{"rfilename": name} for name in self.files]
        if "/tree/" in path:
            body = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(t),
                    "oid": hashlib.sha1(t.encode()).hexdigest(),
                }
                for n, t in self.files.items()
            ]
        self._send(request, 200, json.dumps(body).encode(), {})
        return None

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@pytest.fixture
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which `huggingface_hub` talks to."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        from huggingface_hub import constants

        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield state
        server.shutdown()


def test_a_download_brings_what_inference_needs_and_leaves_the_rest(
    fake_hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    unneeded = dict.fromkeys(
        ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.safetensors",
         "consolidated.safetensors", "a.gguf", "modeling_x.py"], "no"
    )  # fmt: skip
    needed = {**FOLDER, "generation_config.json": "{ }", "chat_template.jinja": "x"}
    fake_hub.files = {**needed, **unneeded}
    path = hub.download("org/name")
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == set(needed)
    assert all((path / name).read_text() == text for name, text in needed.items())
    assert hub.locate(HubName("org/name")) == path
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
    path = hub.download("org/name")
    assert {p.name for p in path.iterdir()} == set(needed)
    assert hub.locate(HubName("org/name")) == path
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    assert hub.locate(HubName("org/name")) is None


def test_one_gguf_file_is_downloaded_alone(fake_hub: Hub) -> None:
    fake_hub.files = {"b1.gguf": "a", "b[1].gguf": "b", "config.json": LLAMA}
    path = hub.download("org/name:b[1].gguf")
    assert path.read_text() == "b"
    assert [p.name for p in path.parent.iterdir()] == ["b[1].gguf"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_there_is_fetched_again_only_by_force(fake_hub: Hub, force: bool) -> None:
    fake_hub.files = {"a.gguf": "a"}
    hub.download("org/name:a.gguf")
    fake_hub.asked.clear()
    hub.download("org/name:a.gguf", force=force)
    assert any("/resolve/" in path for path in fake_hub.asked) is force


def test_a_split_gguf_is_downloaded_with_all_its_parts(fake_hub: Hub) -> None:
    fake_hub.files = {f"m-{i:05}-of-00002.gguf": str(i) for i in (1, 2)}
    fake_hub.files["m-00001-of-00003.gguf"] = "another split"
    path = hub.download("org/name:m-00001-of-00002.gguf")
    assert sorted(p.read_text() for p in path.parent.iterdir()) == ["1", "2"]


def test_a_repository_of_gguf_files_named_without_a_file_says_how_to_name_one(
    fake_hub: Hub,
) -> None:
    fake_hub.files = {"a.gguf": "a"}
    with pytest.raises(ModelNotFoundError) as caught:
        hub.download("org/name")
    assert "org/name:FILE.gguf" in str(caught.value.hint)


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
        hub.download("org/name", token=TOKEN)
    assert type(caught.value) is error
    assert "org/name" in caught.value.message
    assert caught.value.hint
    assert TOKEN not in f"{caught.value.message} {caught.value.hint} {caught.value.__cause__}"


def test_a_token_that_no_header_can_carry_is_not_shown(fake_hub: Hub) -> None:
    token = "hf_secret\nsecond: line"
    with pytest.raises(AccessError) as caught:
        hub.download("org/name", token=token)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_an_endpoint_that_nobody_listens_at_is_a_network_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransferError, match="cannot download org/name: Connect"):
        hub.download("org/name")


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "", "-rf", "org/name:../x.gguf"])
def test_a_hostile_name_is_refused_before_the_network(fake_hub: Hub, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.download(name)
    assert fake_hub.asked == []


def test_offline_asks_nobody_and_says_what_to_pull(fake_hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.download("org/name", offline=True)
    assert "llamachat pull org/name" in str(caught.value.hint)
    assert fake_hub.asked == []


META_FOLDER = {"params.json": '{"dim": 64}', "tokenizer.model": "m", "consolidated.00.pth": "0"}


@pytest.mark.parametrize("folder", ["", "original/"])
def test_metas_form_is_fetched_where_a_repository_has_no_other(fake_hub: Hub, folder: str) -> None:
    needed = {f"{folder}{name}": text for name, text in META_FOLDER.items()}
    needed |= {f"{folder}consolidated.01.pth": "1"}
    beside = {"README.md": "no", "x.gguf": "no", f"{folder}checklist.chk": "no"}
    fake_hub.files = {**needed, **beside}
    path = hub.download("org/name")
    assert {p.name for p in path.iterdir()} == {Path(name).name for name in needed}
    assert hub.locate(HubName("org/name")) == path
    assert hub.commit(HubName("org/name"), path) == COMMIT
    assert list(hub.installed()) == [(HubName("org/name"), path)]


def test_metas_form_beside_a_better_one_is_left(fake_hub: Hub) -> None:
    original = {f"original/{name}": text for name, text in META_FOLDER.items()}
    fake_hub.files = {**FOLDER, **original, **META_FOLDER}
    path = hub.download("org/name")
    assert {p.name for p in path.iterdir()} == {*FOLDER, "tokenizer.model"}
    assert not any("consolidated" in asked or "original" in asked for asked in fake_hub.asked)


def test_metas_form_beside_a_config_alone_is_metas(fake_hub: Hub) -> None:
    """Repositories of Meta's form have one, too, for the Hub to count downloads by."""
    fake_hub.files = {**META_FOLDER, "config.json": "{}"}
    path = hub.download("org/name")
    assert isinstance(open_checkpoint(path), MetaCheckpoint)


@pytest.mark.parametrize("missing", list(META_FOLDER))
def test_metas_form_without_a_needed_file_is_not_located(cache: Path, missing: str) -> None:
    add_snapshot(cache, "org/name", {k: v for k, v in META_FOLDER.items() if k != missing})
    assert hub.locate(HubName("org/name")) is None


def test_metas_form_is_located_only_with_every_shard(cache: Path) -> None:
    """The first has 32 of 64 rows."""
    snapshot = add_snapshot(cache, "org/name", META_FOLDER)
    first = snapshot / "consolidated.00.pth"
    first.unlink()
    torch.save({"layers.0.attention.wq.weight": torch.ones(32, 64)}, first)
    assert hub.locate(HubName("org/name")) is None
    add_snapshot(cache, "org/name", {"consolidated.01.pth": "1"})
    assert hub.locate(HubName("org/name")) == snapshot


def test_a_model_in_a_folder_of_its_repository_is_removed_with_it(cache: Path) -> None:
    files = {f"original/{name}": text for name, text in META_FOLDER.items()}
    snapshot = add_snapshot(cache, "org/name", files)
    located = store.require("org/name")
    assert located.path == snapshot / "original"
    store.remove(located)
    assert not snapshot.exists()


def test_a_lora_is_said_to_be_no_model(fake_hub: Hub) -> None:
    fake_hub.files = {"adapter_config.json": "{}", "adapter_model.safetensors": "w"}
    with pytest.raises(UsageError, match="org/name is no whole model: it is a LoRA"):
        hub.download("org/name")
    assert not any("adapter_model" in asked for asked in fake_hub.asked)
