"""`llamachat pull` in processes that are killed, interrupted, crowded, cut off or out of room."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hub_server import FOLDER, INDEX, PIECE_BYTES, TOKEN, Fault, Hub, add_snapshot, serving
from programs import LLAMACHAT, run, start

from llamachat.library import repository
from llamachat.library.hub_cache import HubName
from llamachat.library.sources import HEADER_BYTES

KILLS = int(os.environ.get("LLAMACHAT_TEST_KILLS", "3"))
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARD_BYTES = int(os.environ.get("LLAMACHAT_TEST_SHARD_BYTES", str(2 << 20)))
CHUNK_BYTES = 1 << 20
PULL = (*LLAMACHAT, "pull", "org/name")


@pytest.fixture
def sharded(fake_hub: Hub) -> Hub:
    rng = random.Random(2)
    fake_hub.files = {
        "config.json": FOLDER["config.json"],
        "tokenizer.json": "{}",
        "model.safetensors.index.json": INDEX,
        **{name: rng.randbytes(SHARD_BYTES) for name in SHARDS},
    }
    return fake_hub


def online(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}


def partials(home: Path) -> list[Path]:
    return list((home / "hub").rglob("*partial"))


def partial_bytes(home: Path) -> int:
    n_bytes = 0
    for path in partials(home):
        with suppress(FileNotFoundError):  # it has just become whole
            n_bytes += path.stat().st_size
    return n_bytes


def wait_until(happens: Callable[[], object]) -> None:
    for _ in range(1000):
        if happens():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def assert_whole(done: subprocess.CompletedProcess[bytes], hub: Hub, home: Path) -> None:
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.decode().strip())
    assert all((path / name).read_bytes() == hub.content(name) for name in hub.files)
    assert partials(home) == []


def assert_fetched(server: Hub) -> None:
    """In this process."""
    path = repository.fetch(HubName("org/name"))
    assert all((path / name).read_bytes() == server.content(name) for name in server.files)


def test_after_kill_9_the_next_pull_goes_on(sharded: Hub, tmp_path: Path) -> None:
    sharded.pause_s = KILLS * 0.3 / (SHARD_BYTES / PIECE_BYTES)  # longer than all tries together
    rng = random.Random(KILLS)
    for _ in range(KILLS):
        before = partial_bytes(tmp_path)
        process = start(PULL, tmp_path, **online(sharded))
        wait_until(lambda: partial_bytes(tmp_path) > before or process.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
    kept = partial_bytes(tmp_path)
    sharded.pause_s = 0.0
    time.sleep(0.1)  # until the server has seen that they are gone
    began = sum(map(sharded.sent_bytes, SHARDS))
    assert_fetched(sharded)
    assert sum(map(sharded.sent_bytes, SHARDS)) - began == 2 * SHARD_BYTES - kept
    for name in SHARDS:
        assert sharded.sent_bytes(name) <= SHARD_BYTES + KILLS * CHUNK_BYTES


def test_two_pulls_at_once_fetch_every_byte_once_and_say_so(sharded: Hub, tmp_path: Path) -> None:
    sharded.pause_s = 0.02
    (tmp_path / "token").write_text("hf_fromfile\n")
    pull = (*PULL, "--hf-token-file", str(tmp_path / "token"))
    processes = [start(pull, tmp_path, **online(sharded)) for _ in range(2)]
    ends = [(*process.communicate(timeout=30), process.returncode) for process in processes]
    for out, err, exit_code in ends:
        assert_whole(subprocess.CompletedProcess(pull, exit_code, out, err), sharded, tmp_path)
        first = err.decode().splitlines()[0]
        assert first.startswith("llamachat: org/name at aaaaaaa: 5 files, 4.2 MB")
        assert first.endswith(", licence llama2, not gated")
    headers = 2 * HEADER_BYTES  # of the first shard, for the forecasts
    assert [sharded.sent_bytes(name) for name in SHARDS] == [SHARD_BYTES + headers, SHARD_BYTES]
    assert any(b"another process is fetching" in err for _, err, _ in ends)
    assert any(b"llamachat: 4 of 4 MB, " in err for _, err, _ in ends)
    assert sharded.authorized == {"Bearer hf_fromfile"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_what_has_arrived_and_does_not_wait_for_a_silent_network(
    sharded: Hub, tmp_path: Path
) -> None:
    for name in SHARDS:
        sharded.faults[name] = [Fault(stall_after=1 << 20)]
    sharded.faults[SHARDS[0]].insert(0, Fault())  # the forecast reads its header
    process = start(PULL, tmp_path, **online(sharded), HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_until(lambda: partial_bytes(tmp_path) >= 2 << 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert_fetched(sharded)
    sent = [sharded.sent_bytes(name) for name in SHARDS]
    assert sent == [SHARD_BYTES + HEADER_BYTES, SHARD_BYTES]


def in_small_disk(size: str, folder: Path) -> tuple[str, ...]:
    """A command prefix: `folder` is a disk of that size, seen by this process alone."""
    script = f'mount -t tmpfs -o size={size} none "{folder}" && exec "$@"'
    return ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    command = (*in_small_disk("1m", folder), "true")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


DISK_BYTES = 64 << 20


@pytest.fixture
def small_disk(fake_hub: Hub, tmp_path: Path) -> tuple[str, ...]:
    """A command prefix: the cache is on a disk of DISK_BYTES."""
    (tmp_path / "hub").mkdir()
    if not can_mount(tmp_path / "hub"):
        pytest.skip("no right to mount")
    return in_small_disk(str(DISK_BYTES), tmp_path / "hub")


def serve_weights(hub: Hub, n_bytes: int) -> None:
    hub.files = {**FOLDER, "model.safetensors": random.Random(3).randbytes(n_bytes)}


def test_a_disk_that_is_too_small_ends_a_pull_before_it_begins(
    fake_hub: Hub, small_disk: tuple[str, ...], tmp_path: Path
) -> None:
    serve_weights(fake_hub, DISK_BYTES + 1)
    done = run((*small_disk, *PULL), tmp_path, **online(fake_hub))
    assert done.returncode == 7, done.stderr
    needed = sum(map(fake_hub.length, fake_hub.files))
    assert re.search(rb"[\d,]+ bytes are free, " + f"{needed:,} are needed".encode(), done.stderr)
    assert fake_hub.sent_bytes("model.safetensors") == HEADER_BYTES


def test_a_disk_that_fills_ends_with_the_numbers_and_the_next_pull_goes_on(
    fake_hub: Hub, small_disk: tuple[str, ...], tmp_path: Path
) -> None:
    """Another program takes the room that was free when the download began."""
    n_bytes = DISK_BYTES // 2
    serve_weights(fake_hub, n_bytes)
    fake_hub.pause_s = 0.001
    filler = (
        "(until ls hub/*/blobs/*partial; do sleep 0.01; done;"
        f" head -c {DISK_BYTES * 3 // 4} /dev/zero > hub/filler) > /dev/null 2>&1 &"
    )
    script = (
        f'cd "{tmp_path}"; {filler} "$@"; echo $?; wait; stat -c %s hub/*/blobs/*partial;'
        ' rm hub/filler; "$@" 2> /dev/null && sha256sum hub/*/snapshots/*/model.safetensors'
    )
    done = run((*small_disk, "sh", "-c", script, "sh", *PULL), tmp_path, **online(fake_hub))
    exit_code, kept, _path, digest = done.stdout.decode().splitlines()
    assert exit_code == "7", done.stderr
    assert b"No space left on device; 0 bytes are free, " in done.stderr
    assert 0 < int(kept) == n_bytes - told(done.stderr)
    assert digest.split()[0] == hashlib.sha256(fake_hub.content("model.safetensors")).hexdigest()
    sent = [(offset, count) for path, offset, count in fake_hub.served if path.endswith("tensors")]
    assert sent[-1] == (int(kept), n_bytes - int(kept))


def test_after_a_change_of_the_network_the_next_pull_goes_on(sharded: Hub, tmp_path: Path) -> None:
    sharded.pause_s = 0.04
    process = start(PULL, tmp_path, **online(sharded))
    wait_until(lambda: partial_bytes(tmp_path) > 1 << 20)
    process.kill()
    process.communicate()
    kept = partial_bytes(tmp_path)
    with serving() as elsewhere:
        elsewhere.files = sharded.files
        assert_whole(run(PULL, tmp_path, **online(elsewhere)), elsewhere, tmp_path)
    headers = HEADER_BYTES  # of the first shard, for the forecast
    assert sum(map(elsewhere.sent_bytes, SHARDS)) - headers == 2 * SHARD_BYTES - kept


def told(stderr: bytes) -> int:
    """The bytes that are said to be needed."""
    found = re.search(r"([\d,]+) more are needed", stderr.decode())
    assert found
    return int(found[1].replace(",", ""))


NO_SOCKETS = """
import sys

def refuse(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {args}")

sys.addaudithook(refuse)
from llamachat.cli import app
for name in ("org/name", "org/other", "org/name@v1", "smollm2-135m", "org/name:Q4_K_M"):
    sys.argv[1:3] = ["pull", name]
    print(app.run(), flush=True)
"""


@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_offline_opens_no_socket(hub_folder: Path, tmp_path: Path, switch: str) -> None:
    snapshot = add_snapshot(hub_folder, "org/name", FOLDER)
    flag = ("--offline",) if switch == "flag" else ()
    program = (sys.executable, "-c", NO_SOCKETS, "pull", "name", *flag)
    done = run(program, tmp_path, HF_HUB_OFFLINE="0" if flag else "1")
    assert done.stdout.decode().split() == [str(snapshot), "0", "3", "3", "3", "3"], done.stderr
    for name in ("org/other", "org/name@v1", "smollm2-135m", "org/name:Q4_K_M"):
        assert f"with the network: llamachat pull {name}\n" in done.stderr.decode()
