"""Writes a quantized folder weight by weight, so that whatever happens nothing wrong is there.

All is made in `NAME.partial`, which becomes `NAME` in one step when it is whole. Beside the data
grows a journal: its first line is the job, every other one a weight that was written wholly. Room
for the header is kept at the front, since what is to be said is known only at the end; safetensors
allows blanks after it. Another run of the same job keeps what the journal and the sha256 prove.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llamachat.checkpoints import Checkpoint
from llamachat.checkpoints.gguf import GgufCheckpoint
from llamachat.checkpoints.gguf_header import without_tensors
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.quantized import (
    FORMAT,
    GGUF_HEADER,
    MAGIC,
    SEAL,
    VERSION,
    WEIGHTS,
    parts_of,
    raw_bytes,
    sha256_of,
)
from llamachat.checkpoints.quantized_layout import PARTS, ROPE_FREQS
from llamachat.errors import TransferError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

PARTIAL = ".partial"
JOURNAL = "journal.jsonl"
_REPLACED = "replaced"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
_MAX_JOB_BYTES = 1 << 16
_UNSYNCED_BYTES = 64 * 2**20  # at most so much is lost when the power fails
_ENTRY_BYTES = 120  # of the header for a tensor or a sha256, beside the name
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}


def partial_of(folder: Path) -> Path:
    """Where a folder is while it is being made."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def read_job(partial: Path) -> Mapping[str, Any] | None:
    """The job that a partial folder belongs to; None for any other folder."""
    try:
        with (partial / JOURNAL).open("rb") as journal:
            job = json.loads(journal.readline(_MAX_JOB_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(job, dict) and job.get("format") == FORMAT
    return job if is_ours and isinstance(job.get("source"), dict) else None


@dataclass(frozen=True, slots=True)
class _Written:
    """A line of the journal: `tensors` are names, types and shapes, in the order of the bytes."""

    name: str
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    sha256: str
    error: float | None

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes for *_, n_bytes in self.tensors)

    def line(self) -> bytes:
        return json.dumps([self.name, self.tensors, self.sha256, self.error]).encode() + b"\n"


class QuantizedWriter:
    """A quantized folder while it is being made; a context, which closes its files."""

    def __init__(self, folder: Path, source: Checkpoint, job: Mapping[str, Any]) -> None:
        """Begin, or go on with what an earlier run of the same job left.

        Args:
            folder: what it will be.
            source: whose weights will be appended, in its order.
            job: what must be equal for weights to be kept: "recipe", "source" (a mapping)...

        Raises:
            UsageError: `NAME.partial` is there and is not ours.
            TransferError: it cannot be written.
        """
        self._folder = folder
        self._partial = partial_of(folder)
        self._source = source
        self._header_bytes = _room_for_header(source, job)
        self._written: list[_Written] = []
        self._unsynced = 0
        job = {"format": FORMAT, "version": VERSION, **job, "header_bytes": self._header_bytes}
        with _writing(self._partial):
            self._require_ours()
            self._partial.mkdir(parents=True, exist_ok=True)
            self._journal = _open(self._partial / JOURNAL)
            self._data = _open(self._partial / WEIGHTS)
            self._recover(json.dumps(job).encode() + b"\n")

    def __enter__(self) -> QuantizedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._data, self._journal):
            with suppress(OSError):  # what could not be flushed is not in the journal either
                file.close()

    @property
    def done(self) -> frozenset[str]:
        """The weights that are there, those of an earlier run included."""
        return frozenset(written.name for written in self._written)

    def append(self, name: str, weight: Tensor | QTensor, error: float | None = None) -> None:
        """Write the next weight; `error` is what quantizing did to it.

        Raises:
            TransferError: the disk is full or cannot be written; what is there is kept.
        """
        digest = hashlib.sha256()
        tensors = []
        with _writing(self._partial):
            for suffix, tensor in parts_of(weight).items():
                raw = raw_bytes(tensor)
                dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
                tensors.append((f"{name}{suffix}", dtype, tuple(tensor.shape), raw.nbytes))
                digest.update(raw)
                self._data.write(raw)
            self._data.flush()
            written = _Written(name, tuple(tensors), digest.hexdigest(), error)
            self._sync_now_and_then(written.n_bytes)
            self._journal.write(written.line())
            self._journal.flush()
        self._written.append(written)

    def finish(self, recipe: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        """Write the header and what is beside the weights, and give the folder its name.

        It replaces one that has that name.

        Args:
            recipe: as `Facts` has it.
            source: as `Facts` has it.

        Raises:
            TransferError: the disk is full or cannot be written.
        """
        with _writing(self._partial):
            files = dict(self._copy_small_files())
            header = self._header(recipe, source, files)
            self._data.write(hashlib.sha256(header).digest())
            self._data.seek(0)
            self._data.write(header)
            self._data.flush()
            os.fsync(self._data.fileno())
            self._data.close()
            self._journal.close()
            self._publish()

    def _require_ours(self) -> None:
        if self._partial.exists() and read_job(self._partial) is None:
            left = {path.name for path in self._partial.iterdir()} - {JOURNAL, WEIGHTS}
            if left:
                raise UsageError(
                    f"{self._partial} is in the way: it holds {min(left)}",
                    hint="move it elsewhere, or name another folder with -o",
                )

    def _recover(self, job: bytes) -> None:
        """Keep the weights of the same job that are as they were written; drop all else."""
        kept = end = 0
        if self._journal.readline() == job:
            kept = len(job)
            self._data.seek(8 + self._header_bytes)
            for line in self._journal:
                written = _parsed(line)
                if written is None or sha256_of(self._data, written.n_bytes) != written.sha256:
                    break
                self._written.append(written)
                kept += len(line)
                end += written.n_bytes
        self._journal.seek(kept)
        self._journal.truncate()
        if not kept:
            self._journal.write(job)
            self._journal.flush()
            self._data.truncate(0)
            for file in self._partial.iterdir():
                if file.is_file() and file.name not in (JOURNAL, WEIGHTS):
                    file.unlink()  # of another job, which would go along
        self._data.truncate(8 + self._header_bytes + end)
        self._data.seek(0, os.SEEK_END)

    def _sync_now_and_then(self, n_bytes: int) -> None:
        self._unsynced += n_bytes
        if self._unsynced >= _UNSYNCED_BYTES:
            os.fsync(self._data.fileno())
            self._unsynced = 0

    def _copy_small_files(self) -> Iterator[tuple[str, str]]:
        for name, content in _small_files(self._source):
            with (self._partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield name, hashlib.sha256(content).hexdigest()

    def _header(
        self, recipe: Mapping[str, Any], source: Mapping[str, Any], files: Mapping[str, str]
    ) -> bytes:
        weights = {it.name: {"sha256": it.sha256, "error": it.error} for it in self._written}
        described = {"recipe": recipe, "source": source, "weights": weights, "files": files}
        metadata = {key: json.dumps(value) for key, value in described.items()}
        header: dict[str, Any] = {
            "__metadata__": {"format": FORMAT, "version": VERSION, **metadata}
        }
        end = 0
        seal = (SEAL, "U8", (32,), 32)
        for name, dtype, shape, n_bytes in (*(t for it in self._written for t in it.tensors), seal):
            start, end = end, end + n_bytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(self._header_bytes)
        assert text.startswith(MAGIC)
        assert len(text) == self._header_bytes, "more is said than room was kept for"
        return self._header_bytes.to_bytes(8, "little") + text

    def _publish(self) -> None:
        """Give the folder its name; what had it goes along and is deleted then."""
        if self._folder.exists():
            shutil.rmtree(self._partial / _REPLACED, ignore_errors=True)
            self._folder.rename(self._partial / _REPLACED)
        _sync_folder(self._partial)
        self._partial.rename(self._folder)
        (self._folder / JOURNAL).unlink(missing_ok=True)
        _sync_folder(self._folder.parent)
        shutil.rmtree(self._folder / _REPLACED, ignore_errors=True)


def _small_files(source: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Config, tokenizer and template of a model: names and contents."""
    if isinstance(source, GgufCheckpoint):
        yield GGUF_HEADER, without_tensors(source.files[0])
        return
    for file in source.files:
        if not file.name.removesuffix(".index.json").endswith(_WEIGHT_SUFFIXES):
            yield file.name, file.read_bytes()


def weight_files(source: Checkpoint) -> tuple[Path, ...]:
    """The files that hold a model's tensors."""
    if isinstance(source, GgufCheckpoint):
        return source.files
    return tuple(file for file in source.files if file.suffix in _WEIGHT_SUFFIXES)


def _room_for_header(source: Checkpoint, job: Mapping[str, Any]) -> int:
    """A multiple of 8, enough for all that will be said."""
    names = [*(weight.hf for weight in iter_weights(source.config)), ROPE_FREQS]
    tensors = sum((len(PARTS) + 1) * (len(name) + _ENTRY_BYTES) for name in names)
    described = json.dumps(json.dumps([job, [str(file) for file in source.files]]))
    room = 4096 + tensors + 2 * len(described) + _ENTRY_BYTES * len(source.files)
    return -(-room // 8) * 8


def _parsed(line: bytes) -> _Written | None:
    """A line of the journal, if it was written to its end."""
    try:
        name, tensors, sha256, error = json.loads(line)
        rows = ((str(n), str(dtype), tuple(shape), int(size)) for n, dtype, shape, size in tensors)
        return _Written(str(name), tuple(rows), str(sha256), error)
    except (ValueError, TypeError, RecursionError):
        return None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Failures of the disk, with what is free on it."""
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(folder).free:,} bytes are free there"
        raise TransferError(
            f"{error.filename or folder}: {error.strerror or error}{free}",
            hint="make room and run the same command again: it goes on where it stopped",
        ) from error


def _open(path: Path) -> IO[bytes]:
    """To read and write from its beginning, whether it is there or not."""
    path.touch()
    return path.open("r+b")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # which cannot open one
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
