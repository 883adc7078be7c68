"""Starting the processes that run one model together, and ending with them. Torch-free."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from llamachat import settings
from llamachat.architecture import ModelConfig
from llamachat.errors import UsageError
from llamachat.kernels.backends import Backend, check_gpus

if TYPE_CHECKING:
    from llamachat.kernels.peers import Peers

FOLLOWER = "llamachat.loading.follower"
MOST = 64  # processes
POLL_S = 0.2
STOPPED_S = 3  # so long may one of them be stopped, as by SIGSTOP, before all end


def end(message: str) -> NoReturn:
    """Say it on stderr and leave with exit code 1, from any thread."""
    sys.stdout.flush()
    sys.stderr.write(f"llamachat: {message}\n")
    sys.stderr.flush()
    os._exit(1)


def check(size: int, backend: Backend, config: ModelConfig) -> None:
    """Refuse what cannot be.

    Raises:
        UsageError: it is no number of processes, there are too few GPUs, another number was started
            by torchrun, or the model cannot be cut into so many parts.
    """
    if size == 1:
        return
    if not 1 < size <= MOST:
        raise UsageError(f"--tensor-parallel is {size}, expected 1 to {MOST}")
    check_gpus(backend, size)
    check_launch(size)
    if backend.name == "bitsandbytes":
        raise UsageError("--tensor-parallel: the backend bitsandbytes runs in one process")
    if what := config.undivided(size):
        raise UsageError(f"--tensor-parallel {size} does not divide {what}")


def check_launch(size: int) -> None:
    """Raises UsageError: torchrun started another number of processes."""
    launch = settings.launch()
    if launch is not None and launch.size != size:
        raise UsageError(f"--tensor-parallel is {size}, torchrun started {launch.size} processes")


@lru_cache(maxsize=1)
def leading(size: int, gpu: int | None, lost: Callable[[str], NoReturn]) -> Peers:
    """The first of `size` processes; the others are started unless torchrun did. Once.

    Args:
        size: how many.
        gpu: of this process; the others have those after it.
        lost: called from a thread when one of the others has ended.
    """
    from llamachat.kernels.peers import Peers

    if settings.launch() is not None:
        return Peers(0, size, gpu=gpu, store=None)
    folder = Path(tempfile.mkdtemp(prefix="llamachat-ranks-"))
    store = folder / "store"
    others = {rank: _started(rank, size, gpu, store) for rank in range(1, size)}
    threading.Thread(target=_watch, args=(others, folder, lost), daemon=True).start()
    return Peers(0, size, gpu=gpu, store=str(store))


def _started(rank: int, size: int, gpu: int | None, store: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, which Ctrl-C in the terminal does not reach."""
    of_its_own = "cpu" if gpu is None else str(gpu + rank)
    return subprocess.Popen(
        [sys.executable, "-m", FOLLOWER, str(rank), str(size), of_its_own, str(store)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env=settings.child_environment(),
    )


def _is_stopped(pid: int) -> bool:
    """Whether a signal stopped it, which no load of the machine does."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _watch(
    others: Mapping[int, subprocess.Popen[bytes]], folder: Path, lost: Callable[[str], NoReturn]
) -> None:
    polls = dict.fromkeys(others, 0)  # in which it was stopped, one after the other
    while all(it.poll() is None for it in others.values()):
        polls = {rank: _is_stopped(it.pid) * (polls[rank] + 1) for rank, it in others.items()}
        if max(polls.values()) * POLL_S > STOPPED_S:
            break
        time.sleep(POLL_S)
    time.sleep(POLL_S)  # those that end because one did, leave with code 0
    ended = {rank: code for rank, it in others.items() if (code := it.poll()) is not None}
    for other in others.values():
        other.kill()
    shutil.rmtree(folder, ignore_errors=True)
    if ended:
        rank, code = min(ended.items(), key=lambda it: (it[1] == 0, it[1]))
        how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    else:
        rank, how = max(polls, key=polls.__getitem__), f"was stopped for {STOPPED_S} s"
    lost(f"process {rank} of the {len(others) + 1} that run the model together {how}")
