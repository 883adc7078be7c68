"""Removing a revision, or one file: what another revision shares stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamachat.library.hub_cache import HubName
from llamachat.library.removal import remove, remove_revision

NAME = HubName("org/name")
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def folder(hub_folder: Path) -> Path:
    """Two revisions that share one of their two files."""
    folder = NAME.folder
    (folder / "blobs").mkdir(parents=True)
    for blob, n_bytes in (("shared", 1000), ("old", 10), ("new", 1)):
        (folder / "blobs" / blob).write_bytes(bytes(n_bytes))
    for commit, own in ((OLD, "old"), (NEW, "new")):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        try:
            (snapshot / "weights.gguf").symlink_to(folder / "blobs" / "shared")
            (snapshot / "own.gguf").symlink_to(folder / "blobs" / own)
        except OSError:
            pytest.skip("no links here")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    (folder / "refs" / "v1").write_text(OLD)
    return folder


def test_a_revision_frees_what_it_does_not_share(folder: Path) -> None:
    assert remove_revision(NAME, folder / "snapshots" / OLD) == 10
    assert not (folder / "snapshots" / OLD).exists()
    assert not (folder / "refs" / "v1").exists()
    assert (folder / "snapshots" / NEW / "weights.gguf").stat().st_size == 1000


def test_with_the_last_revision_all_of_the_repository_goes(folder: Path) -> None:
    remove_revision(NAME, folder / "snapshots" / OLD)
    assert remove_revision(NAME, folder / "snapshots" / NEW) == 1001 + len(NEW)
    assert not folder.exists()


def test_a_file_that_another_revision_has_frees_nothing(folder: Path) -> None:
    name = HubName(NAME.repo, "weights.gguf")
    assert remove(name, folder / "snapshots" / OLD / "weights.gguf") == 0
    assert (folder / "snapshots" / NEW / "weights.gguf").stat().st_size == 1000


def test_a_file_of_a_revision_leaves_what_else_that_has(folder: Path) -> None:
    snapshot = folder / "snapshots" / OLD
    assert remove_revision(NAME, snapshot / "own.gguf") == 10
    assert [path.name for path in snapshot.iterdir()] == ["weights.gguf"]
    remove_revision(NAME, snapshot / "weights.gguf")
    assert not snapshot.exists()
