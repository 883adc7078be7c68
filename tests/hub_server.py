"""A Hub on this machine for the unmodified `huggingface_hub`, with faults to switch on.

Like the real one it serves metadata and small files itself, and redirects to a second port for
files that Git LFS keeps.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40
OTHER = "b" * 40
LLAMA = json.dumps(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }
)  # fmt: skip
FOLDER = {"config.json": LLAMA, "tokenizer.json": "{}", "model.safetensors": "weights"}
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
)
META_FOLDER = {"params.json": '{"dim": 64}', "tokenizer.model": "m", "consolidated.00.pth": "0"}
TOKEN = "hf_secretsecretsecret"
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer, instead of or while sending a file."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of the file
    cut_after: int | None = None  # bytes, then the connection ends
    stall_after: int | None = None  # bytes, then silence
    short_by: int = 0  # bytes that Content-Length promises less
    corrupt: bool = False
    ignore_range: bool = False


@dataclass
class Hub:
    """One repository, "org/name", and what was asked of it.

    Attributes:
        files: by path; of more than `lfs_from` bytes they are kept by Git LFS.
        failure: status and X-Error-Code of every answer.
        message: X-Error-Message of `failure`, or of gated files.
        gated: status that files, not the metadata, are refused with.
        faults: by path, one for each request to come.
        pause_s: between pieces of a file.
        lengths: of files of which no more than the beginning is here, and may be asked for.
        asked: paths; `served`: (path, offset, bytes sent) of each answer; `stored`: the headers
            that the second port saw.
    """

    files: Mapping[str, str | bytes] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    message: str = ""
    gated: int | None = None
    tags: tuple[str, ...] = ("license:llama2",)
    refs: tuple[str, ...] = ("main", COMMIT)
    sha: str = COMMIT
    lfs_from: int = 1000
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, int] = field(default_factory=dict)  # that are told instead of the right ones
    lengths: dict[str, int] = field(default_factory=dict)
    pause_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    served: list[tuple[str, int, int]] = field(default_factory=list)
    authorized: set[str] = field(default_factory=set)  # as whom
    stored: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    store_url: str = ""

    def content(self, path: str) -> bytes:
        held = self.files[path]
        return held if isinstance(held, bytes) else held.encode()

    def length(self, path: str) -> int:
        return self.lengths.get(path, len(self.content(path)))

    def sent_bytes(self, path: str) -> int:
        return sum(count for served, _, count in self.served if served == path)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append(path)
        self.authorized.add(request.headers.get("Authorization", ""))
        if self.failure:
            status, code = self.failure
            return self._refuse(request, status, code)
        if "/resolve/" in path:
            return self._resolve(request, path.partition(f"/resolve/{self.sha}/")[2])
        if "/tree/" in path:
            return _send(request, 200, json.dumps(self._tree()).encode(), {})
        revision = path.partition("/revision/")[2] or "main"
        if revision not in self.refs:
            return self._refuse(request, 404, "RevisionNotFound")
        if faults := self.faults["api"]:
            fault = faults.pop(0)
            return _send(request, fault.status or 200, fault.body or b"", fault.headers)
        return _send(request, 200, json.dumps(self._info()).encode(), {})

    def store(self, request: BaseHTTPRequestHandler) -> None:
        """The second port."""
        self.stored.append({key.lower(): value for key, value in request.headers.items()})
        self._serve(request, unquote(request.path).removeprefix("/"))

    def _info(self) -> dict[str, Any]:
        siblings = []
        for path in self.files:
            content = self.content(path)
            size = self.sizes.get(path, self.length(path))
            told: dict[str, Any] = {"rfilename": path, "size": size}
            told["blobId"] = _git_sha1(content)
            if len(content) >= self.lfs_from:
                digest = hashlib.sha256(content).hexdigest()
                told["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(told)
        gated = "manual" if self.gated else False
        return {
            "id": "org/name", "sha": self.sha, "siblings": siblings, "gated": gated,
            "tags": list(self.tags), "private": False,
        }  # fmt: skip

    def _tree(self) -> list[dict[str, Any]]:
        entries = []
        for told in self._info()["siblings"]:
            entry = {"type": "file", "path": told["rfilename"], "oid": told["blobId"]}
            if lfs := told.get("lfs"):
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
            entries.append({**entry, "size": told["size"]})
        return entries

    def _resolve(self, request: BaseHTTPRequestHandler, path: str) -> None:
        if self.gated:
            return self._refuse(request, self.gated, "GatedRepo")
        if path not in self.files:
            return self._refuse(request, 404, "EntryNotFound")
        if len(self.content(path)) >= self.lfs_from:
            headers = {
                "Location": f"{self.store_url}/{path}",
                "X-Linked-ETag": f'"{hashlib.sha256(self.content(path)).hexdigest()}"',
                "X-Linked-Size": str(len(self.content(path))),
                "X-Repo-Commit": self.sha,
            }
            return _send(request, 302, b"", headers)
        return self._serve(request, path)

    def _serve(self, request: BaseHTTPRequestHandler, path: str) -> None:
        fault = self.faults[path].pop(0) if self.faults[path] else Fault()
        if fault.status or fault.body is not None:
            return _send(request, fault.status or 200, fault.body or b"", fault.headers)
        content = self.content(path)
        if fault.corrupt:
            content = bytes(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        start, last = (int(asked[1]), int(asked[2])) if asked else (0, len(content) - 1)
        headers = {"ETag": f'"{_git_sha1(content)}"', "X-Repo-Commit": self.sha}
        if fault.ignore_range or not asked:
            start, status = 0, 200
        else:
            status = 206
            content = content[: last + 1].ljust(min(last + 1, self.length(path)), b"\0")
            headers["Content-Range"] = f"bytes {start}-{last}/{self.length(path)}"
        promised = len(content) - start - fault.short_by
        request.send_response(status)
        for key, value in {"Content-Length": str(promised), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return None
        self._send_pieces(request, path, content[start : start + promised], start, fault)
        return None

    def _send_pieces(
        self, request: BaseHTTPRequestHandler, path: str, body: bytes, start: int, fault: Fault
    ) -> None:
        ends = [end for end in (fault.cut_after, fault.stall_after) if end is not None]
        body = body[: min([len(body), *ends])]
        with self.lock:
            index = len(self.served)
            self.served.append((path, start, 0))
        with suppress(OSError):  # whoever asked has gone
            for sent in range(0, len(body), PIECE_BYTES):
                time.sleep(self.pause_s)
                piece = body[sent : sent + PIECE_BYTES]
                self.served[index] = (path, start, sent + len(piece))
                request.wfile.write(piece)
        if fault.stall_after is not None:
            time.sleep(30.0)
        if ends:
            request.close_connection = True

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": self.message}
        _send(request, status, b"{}", {key: value for key, value in headers.items() if value})


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]
) -> None:
    request.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers, at `url` and with `store_url` for what Git LFS keeps."""
    hub = Hub()

    class Metadata(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    class Store(Metadata):
        def do_GET(self) -> None:
            hub.store(self)

    with _listening(Metadata) as hub.url, _listening(Store) as hub.store_url:
        yield hub


@contextmanager
def _listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None: ...  # clients are killed

    server = Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def add_snapshot(
    cache: Path, repo: str, files: dict[str, str], *, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """What `huggingface_hub` leaves in its cache: blobs, links to them, and a ref."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        blob = folder / "blobs" / hashlib.sha256(text.encode()).hexdigest()
        blob.write_text(text)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(blob)
        except OSError:  # Windows without the right to make links: the library copies
            link.write_text(text)
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot
