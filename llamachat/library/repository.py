"""A repository of the Hub: what of it inference needs, how files begin, and fetching them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from llamachat import settings
from llamachat.architecture import brief
from llamachat.errors import DamagedFileError, ModelNotFoundError, TransferError, UsageError
from llamachat.library import Notice, Progress, download, hub_cache, told_size
from llamachat.library.download import Place, RemoteFile
from llamachat.library.hub import Client, Listing, switched_off
from llamachat.library.hub_cache import (
    CONFIG,
    INDEX,
    ORIGINAL,
    PARAMS,
    PICKLED_INDEX,
    TOKENIZERS,
    WEIGHTS,
    HubName,
)

_MOST_JSON_BYTES = 1 << 20
_ADAPTER = "adapter_config.json"  # of a LoRA
_BESIDE = (
    CONFIG, "generation_config.json", *TOKENIZERS, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_META = (PARAMS, "consolidated.*.pth", *TOKENIZERS, "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        client: reads its files.
        listing: all that it holds.
        files: those that inference needs, by path.
        notice: told, in one line, what is waited for.
    """

    client: Client
    listing: Listing
    files: Mapping[str, RemoteFile]
    notice: Notice

    @property
    def name(self) -> HubName:
        """As it was asked for."""
        return self.listing.name

    @property
    def size_bytes(self) -> int:
        """Of `files`."""
        return sum(file.size_bytes for file in self.files.values())

    def beginning(self, path: str, n_bytes: int) -> bytes:
        """The first bytes of one of `files`, or all of a shorter one.

        Raises:
            LlamachatError: the Hub refuses, or the network failed.
        """
        file = self.files[path]
        return self.client.beginning(self.listing, file, n_bytes, notice=self.notice)

    def json(self, path: str) -> Mapping[str, Any]:
        """The JSON object that is one of `files`.

        Raises:
            DamagedFileError: the file is something else, or larger than any config.
            LlamachatError: the Hub refuses, or the network failed.
        """
        size = self.files[path].size_bytes
        if size > _MOST_JSON_BYTES:
            raise DamagedFileError(
                f"{self.name.repo}: {path} has {size:,} bytes, a config up to {_MOST_JSON_BYTES:,}"
            )
        try:
            values = json.loads(self.beginning(path, size))
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{self.name.repo}: {path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DamagedFileError(f"{self.name.repo}: {path} is {brief(values)}, not an object")
        return values

    def place(self, *, force: bool = False) -> Place:
        """Where `files` go; with `force` what is there already does not count."""

        def has(file: RemoteFile) -> bool:
            return not force and hub_cache.has(self.name, self.listing.commit, file)

        return Place(self.name.folder / "blobs", self.name.locks, has)

    def missing_bytes(self, *, force: bool = False) -> int:
        """How much of `files` is to be fetched."""
        return download.missing_bytes(list(self.files.values()), self.place(force=force))


def open_repository(name: HubName, *, token: str | None = None, notice: Notice) -> Repository:
    """Ask the Hub, once, what a repository holds.

    Raises:
        LlamachatError: as `fetch`.
    """
    client = Client(token)
    listing = client.listing(name, notice=notice)
    return Repository(client, listing, {file.path: file for file in choose(listing)}, notice)


def fetch(
    name: HubName,
    *,
    token: str | None = None,
    offline: bool = False,
    force: bool = False,
    approve: Callable[[Repository], None] = lambda _repository: None,
    notice: Notice = lambda _message: None,
    progress: Progress | None = None,
) -> Path:
    """Bring what inference needs of a repository into the Hugging Face cache, resuming.

    Args:
        name: a repository, or one GGUF file of it.
        token: by default the one that the Hugging Face tools know (HF_TOKEN, `hf auth login`).
        offline: do not touch the network: always an error, since this function fetches.
        force: fetch again what is there.
        approve: raises what is to be raised instead of fetching.
        notice: told, in one line, what comes, and what is waited for.
        progress: told the bytes done and in all.

    Returns:
        the snapshot folder or the file, as `hub_cache.locate` finds it.

    Raises:
        ModelNotFoundError: no such repository, revision or file, or `offline`.
        UsageError: it holds a LoRA, which is no model by itself; or several files are meant.
        AccessError: it is gated or private, or the token is not accepted.
        TransferError: the network or the disk failed.
        DamagedFileError: the list of its files is hostile, or it lacks some of its parts.
    """
    if offline or settings.is_offline():
        raise switched_off(name)
    repository = open_repository(name, token=token, notice=notice)
    listing, files = repository.listing, list(repository.files.values())
    notice(_announced(repository, force=force))
    approve(repository)
    read = partial(repository.client.read, listing)
    place = repository.place(force=force)
    download.fetch(files, place, read, notice=notice, progress=progress)
    try:
        snapshot = hub_cache.add_snapshot(name, listing.commit, files)
    except OSError as error:
        raise TransferError(f"{name.folder}: {error.strerror or error}") from error
    if path := hub_cache.whole_in(snapshot, name):
        return path
    raise DamagedFileError(f"{name.repo}: some of the files that its index names are missing")


def choose(listing: Listing) -> list[RemoteFile]:
    """What inference needs: safetensors, else pickled weights, else Meta's form; or a GGUF file.

    Raises:
        ModelNotFoundError: it has none of them.
        UsageError: it is a LoRA, or several GGUF files are meant.
        DamagedFileError: a name leads out of its folder.
    """
    name, files = listing.name, {file.path: file for file in listing.files}
    chosen = hub_cache.gguf_files(name, files) if name.file else _form(files)
    if not chosen and _ADAPTER in files:
        raise UsageError(
            f"{name.repo} is no whole model: it is a LoRA, to be added to one",
            hint="fetch its files, then: llamachat chat -m MODEL --lora FOLDER",
        )
    if not chosen and any(path.lower().endswith(".gguf") for path in files):
        chosen = hub_cache.gguf_files(name, files)
    if not chosen:
        what = "tokenizer with *.safetensors, pytorch_model*.bin or consolidated.*.pth"
        raise ModelNotFoundError(
            f"{name.repo} has no {what}", hint="it may hold no language model, or another form"
        )
    if absent := [path for path in chosen if path not in files]:
        raise ModelNotFoundError(f"{name.repo} has no {absent[0]}")
    if hostile := [path for path in chosen if not hub_cache.is_plain(path)]:
        raise DamagedFileError(f"{name.repo}: {hostile[0]!r} is no name for a file")
    return [files[path] for path in chosen]


def _form(files: Collection[str]) -> list[str]:
    """The files of the best form of weights that is there with all that belongs to it."""

    def matching(*patterns: str) -> list[str]:
        return [path for path in files if any(fnmatchcase(path, it) for it in patterns)]

    if CONFIG in files and matching(*TOKENIZERS):
        (index, single), (pickled_index, pickled) = WEIGHTS
        if index in files or single in files:
            found = matching(*_BESIDE, INDEX, "*.safetensors")
            others = ("*/*", "consolidated*", "adapter_*")
            return [path for path in found if not any(fnmatchcase(path, it) for it in others)]
        if pickled_index in files or pickled in files:
            found = matching(*_BESIDE, PICKLED_INDEX, "pytorch_model*.bin")
            return [path for path in found if "/" not in path]
    for folder in ("", f"{ORIGINAL}/"):
        found = matching(*(f"{folder}{it}" for it in _META))
        found = [path for path in found if "/" not in path.removeprefix(folder)]
        if f"{folder}{PARAMS}" in found and any(path.endswith(".pth") for path in found):
            return found
    return []


def _announced(repository: Repository, *, force: bool) -> str:
    """What comes, before it does."""
    listing, n_files, total = repository.listing, len(repository.files), repository.size_bytes
    size = told_size(total)
    if (missing_bytes := repository.missing_bytes(force=force)) < total:
        size += f" ({told_size(missing_bytes)} of it to fetch)"
    count = "1 file" if n_files == 1 else f"{n_files} files"
    licence = f"licence {listing.licence}" if listing.licence else "licence not stated"
    gated = "gated" if listing.gated else "not gated"
    return f"{listing.name} at {listing.commit[:7]}: {count}, {size}, {licence}, {gated}"
