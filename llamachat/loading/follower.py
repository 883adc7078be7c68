"""A process that runs its part of what the first one runs, until that ends.

    python -m llamachat.loading.follower RANK SIZE cpu|GPU STORE

It chooses no tokens and shows nothing: the first process sends every batch, and has the cache's
table, the strategies and the terminal. So nothing can come to differ, and a reply stops for all
when the first stops asking. It reads no results: what it runs on a GPU is queued.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from llamachat import settings
from llamachat.errors import LlamachatError

if TYPE_CHECKING:
    from llamachat.kernels import Batch
    from llamachat.kernels.peers import Peers

POLL_S = 0.5
ENDING_S = 10  # that the first process may take


def main(arguments: list[str]) -> NoReturn:
    """Follow the process that started this one."""
    rank, size, gpu, store = arguments
    first = psutil.Process(os.getppid())
    _end_with(first.pid, Path(store).parent)
    try:
        _join(int(rank), int(size), None if gpu == "cpu" else int(gpu), store)
    finally:
        with suppress(psutil.Error):  # as it ends, it writes to the store again
            first.wait(ENDING_S)
        shutil.rmtree(Path(store).parent, ignore_errors=True)
    os._exit(0)


def follow_launch(launch: settings.Launch, backend: str, device: str) -> NoReturn:
    """Follow the first process that torchrun started.

    Args:
        launch: what torchrun says of this process.
        backend: as for `load`.
        device: as for `load`; of GPUs this process has the one of its place on the machine.
    """
    from llamachat.kernels.backends import choose

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = choose(backend, device).gpu
    _join(launch.rank, launch.size, None if first is None else first + launch.local_rank, None)
    os._exit(0)


def _join(rank: int, size: int, gpu: int | None, store: str | None) -> None:
    from llamachat.kernels.peers import Peers

    with suppress(LlamachatError):  # the first has ended
        Follower(Peers(rank, size, gpu=gpu, store=store), gpu).follow()


class Follower:
    """What the first process told this one to keep, by number."""

    def __init__(self, peers: Peers, gpu: int | None) -> None:
        self._peers = peers
        self._device = "cpu" if gpu is None else f"cuda:{gpu}"
        self._models: dict[int, Any] = {}
        self._caches: dict[int, Any] = {}

    def follow(self) -> NoReturn:
        """Do what is heard.

        Raises:
            LlamachatError: the others have ended.
        """
        while True:
            self.do(self._peers.hear())

    def do(self, heard: Mapping[str, Any] | tuple[int, int, Batch]) -> None:
        """What one message says."""
        if not isinstance(heard, Mapping):
            model, cache, batch = heard
            self._models[model](batch, self._caches[cache])
        elif "load" in heard:
            self._load(heard)
        elif "cache" in heard:
            model = self._models[heard["model"]]
            self._caches[heard["cache"]] = model.new_cache(heard["slots"], heard["form"])
        else:
            for number in heard["drop"]:
                self._models.pop(number, None)
                self._caches.pop(number, None)

    def _load(self, task: Mapping[str, Any]) -> None:
        from llamachat.loading.weights import load_told, together

        def load() -> None:
            self._models[task["load"]] = load_told(task, self._device, self._peers)

        with suppress(LlamachatError):  # which the first process tells of
            together(self._peers, load)


def _end_with(parent: int, folder: Path) -> None:
    """Leave when the process that started this one has ended, even if a GPU waits for it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
