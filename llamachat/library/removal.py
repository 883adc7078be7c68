"""Deleting from the Hub's cache: what other revisions share stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from llamachat.library import hub_cache
from llamachat.library.hub_cache import HubName


def remove(name: HubName, path: Path) -> int:
    """Delete the repository, or of several GGUF files in it the one that `path` is.

    Returns:
        bytes freed.
    """
    others = (other for other, _ in hub_cache.installed() if other.repo == name.repo)
    if name.file is None or all(other == name for other in others):
        return _remove_all(name)
    return _unlink(name.folder, hub_cache.parts(path))


def remove_revision(name: HubName, path: Path) -> int:
    """Delete the snapshot that `path` is in, or of several GGUF files in it the one that it is.

    With the last snapshot all of the repository goes.

    Returns:
        bytes freed.
    """
    commit, snapshots = hub_cache.commit(name, path), name.folder / "snapshots"
    snapshot, parts = snapshots / commit, hub_cache.parts(path)
    if path.is_file() and not set(snapshot.rglob("*.gguf")) <= set(parts):
        return _unlink(name.folder, parts)
    if all(other == snapshot for other in snapshots.iterdir()):
        return _remove_all(name)
    freed = _unlink(name.folder, [path for path in snapshot.rglob("*") if not path.is_dir()])
    shutil.rmtree(snapshot)
    for ref in (name.folder / "refs").rglob("*"):
        if ref.is_file() and ref.read_text(encoding="ascii", errors="replace").strip() == commit:
            ref.unlink()
    return freed


def _remove_all(name: HubName) -> int:
    files = (path for path in name.folder.rglob("*") if not path.is_symlink() and path.is_file())
    freed = sum(path.stat().st_size for path in files)
    shutil.rmtree(name.folder)
    shutil.rmtree(name.locks, ignore_errors=True)
    return freed


def _unlink(folder: Path, links: Iterable[Path]) -> int:
    """Delete files of snapshots, and those blobs that no other file is a link to."""
    blobs = folder.resolve() / "blobs"
    freed, unused = 0, set()
    for link in links:
        target = link.resolve()
        if target.is_relative_to(blobs):
            unused.add(target)
        else:
            freed += link.stat().st_size
        link.unlink()
    kept = {link.resolve() for link in (folder / "snapshots").rglob("*") if link.is_symlink()}
    for blob in unused - kept:
        if blob.exists():
            freed += blob.stat().st_size
            blob.unlink()
    return freed
