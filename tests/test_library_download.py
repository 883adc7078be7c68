"""Downloads through a bad network: every byte right, none fetched twice, nothing lost."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
from hub_server import BAD_TOKEN, FOLDER, OTHER, TOKEN, Fault, Hub

from llamachat.errors import AccessError, LlamachatError, ModelNotFoundError, TransferError
from llamachat.library import download, hub_cache, repository
from llamachat.library.hub_cache import HubName
from llamachat.library.refusals import asked_to_wait_s

NAME = HubName("org/name")
WEIGHTS = "model.safetensors"
BIG = random.Random(1).randbytes(300_000)
MODEL: dict[str, str | bytes] = {**FOLDER, WEIGHTS: BIG}


def blob(name: str = WEIGHTS) -> Path:
    content = MODEL[name]
    assert isinstance(content, bytes)
    return NAME.folder / "blobs" / hashlib.sha256(content).hexdigest()


def partial() -> Path:
    return blob().with_name(f"{blob().name}.llamachat-partial")


def assert_right(path: Path, files: dict[str, str | bytes] = MODEL) -> None:
    for name, content in files.items():
        expected = content if isinstance(content, bytes) else content.encode()
        assert (path / name).read_bytes() == expected
    assert not list((path.parent.parent / "blobs").glob("*partial*"))


def test_other_tools_find_what_was_fetched(fake_hub: Hub, hub_folder: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    fake_hub.files = {**MODEL, "original/nested.json": "{}"}
    path = repository.fetch(NAME)
    (repo,) = scan_cache_dir(hub_folder).repos
    assert {file.file_name for it in repo.revisions for file in it.files} == set(MODEL)
    fake_hub.served.clear()
    found = snapshot_download("org/name", cache_dir=hub_folder, allow_patterns=list(MODEL))
    assert found == str(path)
    assert fake_hub.served == []


def test_what_other_tools_fetched_is_not_fetched_again(fake_hub: Hub, hub_folder: Path) -> None:
    from huggingface_hub import snapshot_download

    fake_hub.files = MODEL
    fake_hub.sha, fake_hub.refs = OTHER, ("main", OTHER)  # it remembers lists of files by commit
    snapshot_download("org/name", cache_dir=hub_folder, allow_patterns=["*.json"])
    fake_hub.served.clear()
    assert_right(repository.fetch(NAME))
    assert [path for path, _, _ in fake_hub.served] == [WEIGHTS]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(cut_after=100_000), Fault(cut_after=50_000)],
        [Fault(cut_after=20_000)] * (download.TRIES + 2),
        [Fault(short_by=100_000)],
        [Fault(cut_after=100_000), Fault(cut_after=0), Fault(cut_after=0)],
        [Fault(status=500), Fault(status=503), Fault(cut_after=10)],
        [Fault(status=403), Fault(status=404)],
    ],
    ids=[
        "cut",
        "cut often",
        "short",
        "cut and silent",
        "server errors",
        "expired address",
    ],
)
def test_a_file_goes_on_where_it_broke_off(fake_hub: Hub, faults: list[Fault]) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[WEIGHTS] = [*faults]
    assert_right(repository.fetch(NAME))
    assert fake_hub.sent_bytes(WEIGHTS) == len(BIG)
    assert fake_hub.faults[WEIGHTS] == []


def test_a_server_without_ranges_sends_all_of_it_again(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[WEIGHTS] = [Fault(cut_after=100_000), Fault(ignore_range=True)]
    assert_right(repository.fetch(NAME))


def test_a_silent_server_is_asked_again_where_it_fell_silent(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    fake_hub.files = MODEL
    fake_hub.faults[WEIGHTS] = [Fault(stall_after=100_000)]
    assert_right(repository.fetch(NAME))
    assert fake_hub.sent_bytes(WEIGHTS) == len(BIG)


def test_a_slow_drip_is_waited_for(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    fake_hub.files = MODEL
    fake_hub.pause_s = 0.25  # five pieces of it take longer than the timeout
    assert_right(repository.fetch(NAME))
    assert fake_hub.sent_bytes(WEIGHTS) == len(BIG)


def test_wrong_bytes_of_the_right_length_are_fetched_again(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[WEIGHTS] = [Fault(corrupt=True)]
    assert_right(repository.fetch(NAME))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_bytes_that_stay_wrong_never_get_the_name_of_the_file(fake_hub: Hub, name: str) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[name] = [Fault(corrupt=True)] * 2
    with pytest.raises(TransferError, match=f"{name}: its hash is .* expected .* twice"):
        repository.fetch(NAME)
    assert hub_cache.locate(NAME) is None
    assert_right(repository.fetch(NAME))


def test_a_file_that_was_damaged_while_it_was_partial_is_fetched_again(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    partial().parent.mkdir(parents=True)
    partial().write_bytes(bytes(100_000))
    assert_right(repository.fetch(NAME))


def test_a_server_that_asks_to_wait_is_waited_for(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[WEIGHTS] = [Fault(status=429, headers={"Retry-After": "1"})]
    said: list[str] = []
    began = time.monotonic()
    assert_right(repository.fetch(NAME, notice=said.append))
    assert time.monotonic() - began >= 1.0
    assert "waiting 1 s" in said[-1]


@pytest.mark.parametrize("place", ["api", WEIGHTS])
def test_a_server_that_asks_to_wait_for_an_hour_is_not(fake_hub: Hub, place: str) -> None:
    fake_hub.files = MODEL
    fake_hub.faults[place] = [Fault(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(TransferError, match="HTTP 429"):
        repository.fetch(NAME)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"ratelimit": "r=0;t;=;;"}, None),
        ({}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], wait_s: float | None) -> None:
    assert asked_to_wait_s(headers) == wait_s


def test_a_list_of_files_is_asked_for_again(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    fake_hub.faults["api"] = [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"})]
    assert_right(repository.fetch(NAME))


@pytest.mark.parametrize("place", ["api", WEIGHTS, "config.json"])
def test_a_login_page_of_the_network_is_no_file(fake_hub: Hub, place: str) -> None:
    fake_hub.files = MODEL
    page = Fault(body=b"<html>Welcome", headers={"Content-Type": "text/html"})
    fake_hub.faults[place] = [page]
    with pytest.raises(TransferError) as caught:
        repository.fetch(NAME)
    assert "login page" in str(caught.value.hint)
    assert_right(repository.fetch(NAME))


@pytest.mark.parametrize("told_bytes", [len(BIG) - 1, len(BIG) + 1])
def test_a_file_of_another_length_than_the_list_tells_is_refused(
    fake_hub: Hub, told_bytes: int
) -> None:
    fake_hub.files, fake_hub.sizes = MODEL, {WEIGHTS: told_bytes}
    with pytest.raises(TransferError, match=f"expected {told_bytes:,} bytes"):
        repository.fetch(NAME)


@pytest.mark.parametrize(
    ("status", "code", "message", "error", "says", "hint"),
    [
        (401, "GatedRepo", "", AccessError, "has not accepted its licence", "org/name"),
        (403, "GatedRepo", "not in the authorized list", AccessError, "not accepted", "org/name"),
        (403, "GatedRepo", "is awaiting a review", AccessError, "have yet to answer", "org/name"),
        (403, "GatedRepo", "has been rejected", AccessError, "refused", "org/name"),
        (403, "GatedRepo", "your fine-grained token", AccessError, "may not", "settings/tokens"),
        (401, "", BAD_TOKEN["X-Error-Message"], AccessError, "does not accept", "settings/tokens"),
        (401, "RepoNotFound", "Invalid username", ModelNotFoundError, "no repository", "name"),
        (404, "RepoNotFound", "", ModelNotFoundError, "no repository", "models?search=name"),
        (404, "RevisionNotFound", "", ModelNotFoundError, "no revision v1", "commits/main"),
        (403, "", "Access to this resource is disabled.", AccessError, "disabled", "org/name"),
        (429, "", "", TransferError, "too many requests", "wait"),
        (502, "", "", TransferError, "out of order", "status"),
        (418, "", "", TransferError, "HTTP 418", "HF_ENDPOINT"),
    ],
)
def test_every_refusal_has_its_own_words_and_a_page_to_open(
    fake_hub: Hub, status: int, code: str, message: str, error: type, says: str, hint: str
) -> None:
    fake_hub.failure, fake_hub.message = (status, code), message
    with pytest.raises(LlamachatError) as caught:
        repository.fetch(HubName("org/name", revision="v1"))
    assert type(caught.value) is error
    assert says in caught.value.message
    assert hint in str(caught.value.hint)
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"


def test_a_gated_model_without_a_token_says_where_to_get_one(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    fake_hub.files, fake_hub.gated = MODEL, 401
    said: list[str] = []
    with pytest.raises(AccessError, match="is gated, and there is no token") as caught:
        repository.fetch(NAME, notice=said.append)
    assert f"{fake_hub.url}/org/name" in str(caught.value.hint)
    assert said[0].endswith("3 files, 0.3 MB, licence llama2, gated")


def test_the_token_goes_to_the_hub_and_nowhere_else(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    repository.fetch(NAME, token="hf_other")
    assert "Bearer hf_other" in fake_hub.authorized
    assert fake_hub.stored
    assert not any("hf_other" in str(headers) for headers in fake_hub.stored)
    assert not any("authorization" in headers for headers in fake_hub.stored)


def test_too_little_room_is_told_with_both_numbers_before_anything_moves(fake_hub: Hub) -> None:
    fake_hub.files, fake_hub.sizes = MODEL, {WEIGHTS: 10**18}
    with pytest.raises(TransferError, match=r"[\d,]+ bytes are free, 1,000,000,000,[\d,]+ are nee"):
        repository.fetch(NAME)
    assert fake_hub.served == []


def test_a_cache_that_cannot_be_written_is_told_with_the_numbers(
    fake_hub: Hub, hub_folder: Path
) -> None:
    fake_hub.files = MODEL
    hub_folder.write_text("a file where the folder would be: not even root can write there")
    with pytest.raises(TransferError, match=r"[\d,]+ bytes are free, 300,168 more are needed"):
        repository.fetch(NAME)


def test_a_hostile_file_name_is_refused(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.files = {**MODEL, "../../../x.safetensors": "x", "a\\b.safetensors": "x"}
    with pytest.raises(LlamachatError, match="is no name for a file"):
        repository.fetch(NAME)
    assert not list(tmp_path.rglob("x.safetensors"))


def test_a_new_commit_shares_the_files_that_stayed(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    old = repository.fetch(NAME)
    fake_hub.files, fake_hub.sha = {**MODEL, "tokenizer.json": "{ }"}, "d" * 40
    fake_hub.served.clear()
    new = repository.fetch(NAME)
    assert [path for path, _, _ in fake_hub.served] == ["tokenizer.json"]
    assert hub_cache.locate(NAME) == new
    assert_right(old)
    assert (new / "tokenizer.json").read_text() == "{ }"


def test_without_the_right_to_make_links_files_move_to_the_snapshot(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("A required privilege is not held by the client")

    fake_hub.files = {**MODEL, "chat_template.json": "{}"}  # as long as tokenizer.json is
    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = repository.fetch(NAME)
    assert_right(path, {**MODEL, "chat_template.json": "{}"})
    assert not (path / WEIGHTS).is_symlink()
    fake_hub.served.clear()
    assert repository.fetch(NAME) == path
    assert fake_hub.served == []


def test_progress_begins_with_what_is_there_and_ends_with_all(fake_hub: Hub) -> None:
    fake_hub.files = MODEL
    partial().parent.mkdir(parents=True)
    partial().write_bytes(BIG[:100_000])
    seen: list[tuple[int, int]] = []
    repository.fetch(NAME, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(content) for content in MODEL.values())
    assert seen[0] == (100_000, total)
    assert seen[-1] == (total, total)
    assert [path for path, offset, _ in fake_hub.served if offset] == [WEIGHTS]


def test_the_first_failure_of_one_file_ends_the_others(fake_hub: Hub) -> None:
    shards = {f"model-{i}.safetensors": BIG + bytes([i]) for i in range(12)}
    fake_hub.files, fake_hub.pause_s = {**MODEL, **shards}, 0.02
    fake_hub.faults["model-11.safetensors"] = [Fault(status=418)] * 9
    fake_hub.faults["model-10.safetensors"] = [Fault(status=404)] * 99
    with pytest.raises(TransferError):
        repository.fetch(NAME)
    assert len(fake_hub.served) < 13


def test_partial_files_cannot_grow_beyond_the_size_that_was_told(fake_hub: Hub) -> None:
    file = download.RemoteFile("x", 10, "0" * 64)
    NAME.folder.mkdir(parents=True)
    with download._Partial(file, NAME.folder / "x") as held:
        held.append(b"0123456789")
        with pytest.raises(TransferError, match="more than its 10 bytes"):
            held.append(b"x")
