"""The Hugging Face cache, which other tools share: names of the Hub, and what is on disk.

Its documented layout is read directly, `models--org--name/refs/REVISION` and
`models--org--name/snapshots/COMMIT`, because importing `huggingface_hub` takes 0.25 s. What was
fetched is laid out the same way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeVar

from llamachat import settings
from llamachat.architecture import config_from_hf
from llamachat.errors import DamagedFileError, ModelNotFoundError, UsageError
from llamachat.library.download import RemoteFile

# Stricter than huggingface_hub.utils.validate_repo_id only in that the organization is required.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_MOST_CHOICES = 12
AnyPath = TypeVar("AnyPath", bound=PurePath)

CONFIG, INDEX, PICKLED_INDEX = (
    "config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
# The weights of Hugging Face's form: what an index names, or the one file.
WEIGHTS = ((INDEX, "model.safetensors"), (PICKLED_INDEX, "pytorch_model.bin"))
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "ice_text.model")
ORIGINAL = "original"  # where repositories of Hugging Face's form keep Meta's
PARAMS = "params.json"


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, or one GGUF file in it.

    Attributes:
        repo: "org/name".
        file: a path that ends in ".gguf", or a quantization that such a name tells ("Q4_K_M").
        revision: a branch, tag or commit; None for the main branch.

    Raises:
        UsageError: `revision` cannot be one.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and not _is_revision(self.revision):
            raise UsageError(
                f"{self.revision!r} is not a revision", hint="a branch, a tag or a commit"
            )

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}:{self.file}" if self.file else f"{self.repo}{at}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps the repository, whether it is there or not."""
        return settings.hub_cache_dir() / f"models--{self.repo.replace('/', '--')}"

    @property
    def locks(self) -> Path:
        """Where those who write into `folder` keep their locks, one for each blob."""
        return self.folder.parent / ".locks" / self.folder.name


def parse(name: str) -> HubName | None:
    """Read "org/name", "org/name@revision", "org/name:file.gguf", "org/name:Q4_K_M"; else None.

    "hf://" may stand before it.
    """
    place, colon, file = name.removeprefix("hf://").partition(":")
    repo, at, revision = place.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        return None
    if at and not _is_revision(revision):
        return None
    if not colon:
        return None if repo.lower().endswith(".gguf") else HubName(repo, None, revision or None)
    plain = is_plain(file) if file.lower().endswith(".gguf") else _QUANTIZATION.fullmatch(file)
    return HubName(repo, file, revision or None) if plain else None


def is_plain(file: str) -> bool:
    """Whether a path stays inside the folder that it is joined to, on every system."""
    path = PurePosixPath(file)
    hostile = path.is_absolute() or ".." in path.parts or set(file) & set('\\:*?"<>|\0')
    return bool(path.name) and not hostile


def locate(name: HubName) -> Path | None:
    """The snapshot folder or GGUF file in the cache, if everything that it needs is there.

    Raises:
        UsageError: several GGUF files there are of the quantization that is named.
    """
    try:
        snapshot = _snapshot(name)
        return whole_in(snapshot, name) if snapshot else None
    except OSError:  # another user's, for instance
        return None


def gguf_files(name: HubName, files: Iterable[str]) -> list[str]:
    """The file of `files` that `name` means, with all parts where it is split.

    Raises:
        UsageError: several are of that quantization, or none is named.
        ModelNotFoundError: none is.
    """
    files = list(files)
    models = [file for file in files if file.lower().endswith(".gguf") and _is_model(file)]
    found = [name.file] if name.file in files else [m for m in models if _is_of(m, name.file)]
    if len(found) == 1 and name.file:
        return [str(part) for part in parts(PurePosixPath(found[0]))]
    choices = found or models
    listed = ", ".join(choices[:_MOST_CHOICES]) or "none"
    if (more := len(choices) - _MOST_CHOICES) > 0:
        listed += f" and {more} more"
    if found:
        kind = f"several GGUF files of {name.file}" if name.file else "GGUF files"
        raise UsageError(
            f"{name.repo} has {kind}: {listed}",
            hint=f"name one: llamachat pull {name.repo}:FILE.gguf",
        )
    raise ModelNotFoundError(
        f"{name.repo} has no {name.file or 'GGUF file'}", hint=f"its GGUF files: {listed}"
    )


def commit(name: HubName, path: Path) -> str:
    """The commit of what `locate` found."""
    return path.relative_to(name.folder / "snapshots").parts[0]


def installed() -> Iterator[tuple[HubName, Path]]:
    """Every whole Llama folder and GGUF file in the cache, at its newest revision."""
    for folder in sorted(settings.hub_cache_dir().glob("models--*--*")):
        name = parse(folder.name.removeprefix("models--").replace("--", "/"))
        with suppress(OSError):  # another user's, for instance
            if name and (snapshot := _snapshot(name)):
                yield from _contents(name, snapshot)


def size_bytes(path: Path) -> int:
    """Bytes of what `locate` found; a file that two names share counts once."""
    files = path.rglob("*") if path.is_dir() else parts(path)
    return sum(file.stat().st_size for file in {f.resolve() for f in files} if file.is_file())


def has(name: HubName, commit: str, file: RemoteFile) -> bool:
    """Whether a verified file of that content is there, as a blob or in the snapshot."""
    blob = name.folder / "blobs" / file.digest
    places = (blob, name.folder / "snapshots" / commit / file.path)
    return any(place.is_file() and place.stat().st_size == file.size_bytes for place in places)


def add_snapshot(name: HubName, commit: str, files: Sequence[RemoteFile]) -> Path:
    """Link blobs into the snapshot, the largest last: what is located has all of them.

    Without the right to make links (Windows) the blob itself moves there, as `huggingface_hub`
    has it.
    """
    snapshot = name.folder / "snapshots" / commit
    moved: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: file.size_bytes):
        blob, link = name.folder / "blobs" / file.digest, snapshot / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        if blob.exists() and not (link.is_symlink() and link.resolve() == blob.resolve()):
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except FileExistsError:  # another process made it meanwhile
                continue
            except OSError:
                moved[file.digest] = blob.replace(link)
        elif file.digest in moved:
            shutil.copyfile(moved[file.digest], link)
    if (revision := name.revision or "main") != commit:
        ref = name.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="ascii")
    return snapshot


def is_commit(text: str) -> bool:
    """Whether it is the full name of one."""
    return _COMMIT.fullmatch(text) is not None


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text


def _snapshot(name: HubName) -> Path | None:
    """The folder of a revision; by default of the main branch, else of the newest snapshot."""
    snapshots, revision = name.folder / "snapshots", name.revision
    try:
        ref = (name.folder / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        ref = revision or ""
    if is_commit(ref):
        return snapshots / ref if (snapshots / ref).is_dir() else None
    if revision is not None or not snapshots.is_dir():
        return None
    folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def whole_in(snapshot: Path, name: HubName) -> Path | None:
    """What of a snapshot `name` means, if everything that it needs is there.

    Raises:
        UsageError: several GGUF files are of the quantization that is named.
    """
    if name.file is None:
        return _whole_folder(snapshot)
    if name.file.lower().endswith(".gguf"):
        path = snapshot / name.file
        return path if _is_gguf_whole(path) else None
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
    with suppress(ModelNotFoundError):
        path = snapshot / gguf_files(name, files)[0]
        return path if _is_gguf_whole(path) else None
    return None


def _contents(name: HubName, snapshot: Path) -> Iterator[tuple[HubName, Path]]:
    folder = _whole_folder(snapshot)
    if folder is not None and _is_llama(folder):
        yield name, folder
    for path in sorted(snapshot.rglob("*.gguf")):
        if _is_first(path.name) and _is_gguf_whole(path):
            yield HubName(name.repo, path.relative_to(snapshot).as_posix()), path


def _whole_folder(snapshot: Path) -> Path | None:
    """What of a snapshot can be run: all of it, else what it has in Meta's form."""
    if _is_whole(snapshot):
        return snapshot
    folders = (snapshot, snapshot / ORIGINAL)
    return next((folder for folder in folders if _is_whole_meta(folder)), None)


def _is_whole_meta(folder: Path) -> bool:
    if not _has(folder, PARAMS) or not any(_has(folder, file) for file in TOKENIZERS):
        return False
    from llamachat.checkpoints.meta import has_all_shards, is_meta  # numpy, seldom of use here

    return is_meta(folder) and has_all_shards(folder)


def _is_whole(snapshot: Path) -> bool:
    """Whether a folder has a config, a tokenizer and all weights that its index names."""
    if not _has(snapshot, CONFIG) or not any(_has(snapshot, file) for file in TOKENIZERS):
        return False
    return any(_has_all(snapshot, index, file) for index, file in WEIGHTS)


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
    if _has(folder, PARAMS):
        return True
    try:
        config_from_hf(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, DamagedFileError):
        return False
    return True


def _is_gguf_whole(path: Path) -> bool:
    return all(part.is_file() and part.stat().st_size > 0 for part in parts(path))


def parts(path: AnyPath) -> list[AnyPath]:
    """A GGUF file, or all files of the split that it belongs to."""
    if (split := _SPLIT.search(path.name)) is None:
        return [path]
    stem, end = path.name[: split.start()], path.name[split.start(2) :]
    parts = [path.with_name(f"{stem}-{i:05}-of-{end}") for i in range(1, int(split[2]) + 1)]
    return parts if path in parts else [path]


def _is_first(file: str) -> bool:
    split = _SPLIT.search(file)
    return split is None or int(split[1]) == 1


def _is_model(file: str) -> bool:
    """Whether a GGUF file may be a language model: no later part, no projector of images."""
    return _is_first(file) and not PurePosixPath(file).name.lower().startswith("mmproj")


def _is_of(file: str, quantization: str | None) -> bool:
    """Whether the name of a GGUF file tells that quantization; every one is of None."""
    if quantization is None:
        return True
    stem = _SPLIT.sub("", file)[: -len(".gguf")]
    told = rf"(?:^|[-._/]){re.escape(quantization)}(?:$|[-./])"
    return re.search(told, stem, re.IGNORECASE) is not None
