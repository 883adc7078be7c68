"""The Hugging Face Hub: names, the cache folder it shares with other tools, and downloads.

Looking into the cache reads its documented layout directly, `models--org--name/refs/REVISION` and
`models--org--name/snapshots/COMMIT`, because importing `huggingface_hub` takes 0.25 s.
"""

from __future__ import annotations

import glob
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llamachat import settings
from llamachat.architecture import config_from_hf
from llamachat.errors import (
    AccessError,
    DamagedFileError,
    LlamachatError,
    ModelNotFoundError,
    TransferError,
    UsageError,
)

# Stricter than huggingface_hub.utils.validate_repo_id only in that the organization is required.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "ice_text.model")
_WANTED = (
    _CONFIG, "generation_config.json", *_TOKENIZERS, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "*.safetensors", _INDEX,
)  # fmt: skip
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED = ("pytorch_model*.bin", _PICKLED_INDEX)  # where a repository has no safetensors
_ORIGINAL = "original"  # where repositories of Hugging Face's form keep Meta's
_PARAMS = "params.json"
_META = (_PARAMS, "consolidated.*.pth", *_TOKENIZERS, "tokenizer_config.json")
_ADAPTER = "adapter_config.json"  # of a LoRA
# For each form of weights, the best first, what is fetched of it and what is left: other forms.
_FORMS: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (_WANTED, ("*/*", "consolidated*", "adapter_*")),
    ((*_WANTED, *_PICKLED), ("*/*", "adapter_*")),
    (_META, ("*/*",)),
    (tuple(f"{_ORIGINAL}/{name}" for name in _META), ()),
    ((_ADAPTER,), ("*/*",)),  # no model: what it is can be said, then
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, "org/name", or one GGUF file in it, "org/name:file.gguf"."""

    repo: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}:{self.file}" if self.file else self.repo

    @property
    def folder(self) -> Path:
        """Where the cache keeps the repository, whether it is there or not."""
        return settings.hub_cache_dir() / f"models--{self.repo.replace('/', '--')}"


def parse(name: str) -> HubName | None:
    """Read "org/name" or "org/name:file.gguf"; None for anything else."""
    repo, colon, file = name.partition(":")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        return None
    if not colon:
        return None if repo.lower().endswith(".gguf") else HubName(repo)
    path = PurePosixPath(file)
    plain = not (path.is_absolute() or ".." in path.parts or set(file) & set('\\:*?"<>|\0'))
    return HubName(repo, file) if plain and file.lower().endswith(".gguf") else None


def locate(name: HubName, *, revision: str | None = None) -> Path | None:
    """The snapshot folder or GGUF file in the cache, if everything that it needs is there.

    Raises:
        UsageError: `revision` cannot be one.
    """
    _require_revision(revision)
    try:
        snapshot = _snapshot(name, revision)
        return _whole_in(snapshot, name) if snapshot else None
    except OSError:  # another user's, for instance
        return None


def commit(name: HubName, path: Path) -> str:
    """The commit of what `locate` found."""
    return path.relative_to(name.folder / "snapshots").parts[0]


def installed() -> Iterator[tuple[HubName, Path]]:
    """Every whole Llama folder and GGUF file in the cache, at its newest revision."""
    for folder in sorted(settings.hub_cache_dir().glob("models--*--*")):
        name = parse(folder.name.removeprefix("models--").replace("--", "/"))
        with suppress(OSError):  # another user's, for instance
            if name and (snapshot := _snapshot(name, None)):
                yield from _contents(name, snapshot)


def size_bytes(path: Path) -> int:
    """Bytes of what `locate` found; a file that two names share counts once."""
    files = path.rglob("*") if path.is_dir() else _parts(path)
    return sum(file.stat().st_size for file in {f.resolve() for f in files} if file.is_file())


def remove(name: HubName, path: Path) -> int:
    """Delete the repository, or of several GGUF files in it the one that `path` is.

    Returns:
        bytes freed.
    """
    others = [other for other, _ in installed() if other.repo == name.repo and other != name]
    if name.file is None or not others:
        freed = _stored_bytes(name.folder)
        shutil.rmtree(name.folder)
        shutil.rmtree(name.folder.parent / ".locks" / name.folder.name, ignore_errors=True)
        return freed
    before = _stored_bytes(name.folder)
    for link in _parts(path):
        blob = link.resolve()
        link.unlink()
        if blob.is_relative_to(name.folder.resolve() / "blobs"):
            blob.unlink(missing_ok=True)
    return before - _stored_bytes(name.folder)


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Fetch what inference needs of a repository into the Hugging Face cache.

    Args:
        repo_id: "org/name", or "org/name:file.gguf" for one file.
        revision: a branch, tag or commit; the main branch by default.
        token: by default the one that the Hugging Face tools know (HF_TOKEN, `hf auth login`).
        offline: do not touch the network: always an error, since this function fetches.
        force: fetch again what is there.
        show_progress: let the Hub's library draw on stderr.

    Returns:
        the snapshot folder or the file, as `locate` finds it.

    Raises:
        ModelNotFoundError: no such repository, revision or file, or `offline`.
        UsageError: it holds a LoRA, which is no model by itself.
        AccessError: it is gated or private, or the token is not accepted.
        TransferError: the network or the disk failed.
    """
    name = parse(repo_id)
    if name is None:
        raise ModelNotFoundError(
            f"{repo_id!r} is not a Hub repository", hint="org/name, or org/name:file.gguf"
        )
    if offline or settings.is_offline():
        raise _switched_off(name)
    _require_revision(revision)
    forms = [(_of_split(name.file), ())] if name.file else _FORMS
    for form in forms:
        snapshot = _fetch(name, form, revision, token, force, show_progress)
        if path := _whole_in(snapshot, name):
            return path
    if name.file is None and _has(snapshot, _ADAPTER):
        raise UsageError(
            f"{name.repo} is no whole model: it is a LoRA, to be added to one",
            hint="fetch its files, then: llamachat chat -m MODEL --lora FOLDER",
        )
    what = name.file or "tokenizer with *.safetensors, pytorch_model*.bin or consolidated.*.pth"
    raise ModelNotFoundError(
        f"{name.repo} has no {what}",
        hint=f"one GGUF file of a repository: llamachat pull {name.repo}:FILE.gguf",
    )


def _of_split(file: str) -> tuple[str, ...]:
    return (_SPLIT.sub(r"-?????-of-\1", glob.escape(file)),)


def _fetch(
    name: HubName,
    form: tuple[Sequence[str], Sequence[str]],
    revision: str | None,
    token: str | None,
    force: bool,
    show_progress: bool,
) -> Path:
    """The snapshot folder, after `snapshot_download`; every failure as one of ours.

    `form` says which files to fetch, and which of those not.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    token = (token or huggingface_hub.get_token() or "").strip()
    if not re.fullmatch("[!-~]*", token):  # an HTTP library would repeat it in its error
        raise AccessError(
            "the Hub token holds characters that no token has", hint="check HF_TOKEN for a typo"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (enable_progress_bars if show_progress else disable_progress_bars)()
        try:
            folder = huggingface_hub.snapshot_download(
                name.repo,
                revision=revision,
                cache_dir=settings.hub_cache_dir(),
                token=token or None,
                force_download=force,
                allow_patterns=list(form[0]),
                ignore_patterns=list(form[1]),
            )
        except Exception as error:  # noqa: BLE001 (httpx and hf-xet raise their own families)
            raise _failure(name, revision, error, token) from None
    return Path(folder)


def _failure(name: HubName, revision: str | None, error: Exception, token: str) -> LlamachatError:
    """Our error for one of the Hub's; the cause is not chained, for it may hold the token."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return AccessError(
            f"{name.repo} is gated, and this account has no access to it",
            hint=f"ask for it at https://huggingface.co/{name.repo}, then set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the Hub has no repository {name.repo}",
            hint="check the name; a private repository needs HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{name.repo} has no revision {revision}",
            hint=f"its revisions: https://huggingface.co/{name.repo}/commits/main",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _switched_off(name)
    if status in (401, 403):
        return AccessError(
            f"the Hub refuses {name.repo} (HTTP {status})",
            hint="check HF_TOKEN, and that its account may read the repository",
        )
    return TransferError(
        f"cannot download {name.repo}: {_one_line(error, token)}",
        hint="check the network, HF_ENDPOINT and HTTPS_PROXY, then run the command again",
    )


def _switched_off(name: HubName) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{name} is not on disk, and the network is switched off",
        hint=f"with the network: llamachat pull {name}",
    )


def _one_line(error: Exception, token: str) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return (text.replace(token, "***") if token else text)[:200]


def _require_revision(revision: str | None) -> None:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{revision!r} is not a revision", hint="a branch, a tag or a commit")


def _snapshot(name: HubName, revision: str | None) -> Path | None:
    """The folder of a revision; by default of the main branch, else of the newest snapshot."""
    snapshots = name.folder / "snapshots"
    try:
        ref = (name.folder / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        ref = revision or ""
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return snapshots / ref if (snapshots / ref).is_dir() else None
    if revision is not None or not snapshots.is_dir():
        return None
    folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def _whole_in(snapshot: Path, name: HubName) -> Path | None:
    if name.file is None:
        return _whole_folder(snapshot)
    return snapshot / name.file if _is_gguf_whole(snapshot / name.file) else None


def _contents(name: HubName, snapshot: Path) -> Iterator[tuple[HubName, Path]]:
    folder = _whole_folder(snapshot)
    if folder is not None and _is_llama(folder):
        yield name, folder
    for path in sorted(snapshot.rglob("*.gguf")):
        is_first = _SPLIT.search(path.name) is None or "-00001-of-" in path.name
        if is_first and _is_gguf_whole(path):
            yield HubName(name.repo, path.relative_to(snapshot).as_posix()), path


def _whole_folder(snapshot: Path) -> Path | None:
    """What of a snapshot can be run: all of it, else what it has in Meta's form."""
    if _is_whole(snapshot):
        return snapshot
    folders = (snapshot, snapshot / _ORIGINAL)
    return next((folder for folder in folders if _is_whole_meta(folder)), None)


def _is_whole_meta(folder: Path) -> bool:
    if not _has(folder, _PARAMS) or not any(_has(folder, file) for file in _TOKENIZERS):
        return False
    from llamachat.checkpoints.meta import has_all_shards, is_meta  # numpy, seldom of use here

    return is_meta(folder) and has_all_shards(folder)


def _is_whole(snapshot: Path) -> bool:
    """Whether a folder has a config, a tokenizer and all weights that its index names."""
    if not _has(snapshot, _CONFIG) or not any(_has(snapshot, file) for file in _TOKENIZERS):
        return False
    return any(
        _has_all(snapshot, index, file)
        for index, file in ((_INDEX, "model.safetensors"), (_PICKLED_INDEX, "pytorch_model.bin"))
    )


def _has_all(snapshot: Path, index_file: str, only_file: str) -> bool:
    """Whether the weights of one form are there: what its index names, or the one file."""
    if not (snapshot / index_file).is_file():
        return _has(snapshot, only_file)
    try:
        index = json.loads((snapshot / index_file).read_text(encoding="utf-8"))
        return all(_has(snapshot, file) for file in set(index["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False


def _has(snapshot: Path, file: str) -> bool:
    path = snapshot / file
    return path.is_file() and path.stat().st_size > 0


def _is_llama(folder: Path) -> bool:
    if _has(folder, _PARAMS):
        return True
    try:
        config_from_hf(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, DamagedFileError):
        return False
    return True


def _is_gguf_whole(path: Path) -> bool:
    return all(part.is_file() and part.stat().st_size > 0 for part in _parts(path))


def _parts(path: Path) -> list[Path]:
    """A GGUF file, or all files of the split that it belongs to."""
    if (split := _SPLIT.search(path.name)) is None:
        return [path]
    stem, total = path.name[: split.start()], int(split[1])
    parts = [path.with_name(f"{stem}-{i:05}-of-{split[1]}.gguf") for i in range(1, total + 1)]
    return parts if path in parts else [path]


def _stored_bytes(folder: Path) -> int:
    files = (path.lstat() for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return sum(file.st_size for file in files)
