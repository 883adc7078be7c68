"""Ask a running `llamachat serve` for mixed replies, some of them cut short, and watch its memory.

    python tools/soak_server.py http://127.0.0.1:8000 --pid PID --minutes 10

Greedy replies that are asked again must not change; at the end no row may be in use. Exit 1 where
one of these fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

WORDS = (
    "river",
    "stone",
    "night",
    "paper",
    "glass",
    "winter",
    "engine",
    "letter",
    "seven",
    "garden",
)
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.2, "min_p": 0.05},
    {"strategy": "beam:3"}, {"temperature": 0.8, "n": 3}, {"repetition_penalty": 1.2},
)  # fmt: skip


class Soak:
    """Clients that ask at random until an end is set."""

    def __init__(self, address: str, seed: int) -> None:
        self.end = threading.Event()
        self.counts = dict.fromkeys(("whole", "left", "busy", "wrong", "failed"), 0)
        self._address = urlsplit(address)
        self._seed = seed
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def run(self, number: int) -> None:
        """One client."""
        rng = random.Random(f"{self._seed} {number}")
        while not self.end.is_set():
            prompt = " ".join(rng.choices(WORDS, k=rng.choice((3, 20, 150))))
            asked: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.choice((4, 30, 120))}
            known = rng.random() < 0.4
            if known:
                prompt = f"{WORDS[rng.randrange(10)]} and {WORDS[rng.randrange(10)]}"
                asked = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
            else:
                asked |= rng.choice(SAMPLERS)
            if not known and rng.random() < 0.3:
                self._count(self._left(asked | {"stream": True}, rng.randint(0, 12)))
            else:
                self._count(self._whole(asked, known=known))

    def _whole(self, asked: dict[str, Any], *, known: bool) -> str:
        connection = self._ask(asked)
        try:
            response = connection.getresponse()
            told = json.load(response)
            if response.status != 200:
                return "busy" if response.status == 429 else "failed"
            text = told["choices"][0]["text"]
            same = not known or self._known.setdefault(asked["prompt"], text) == text
            return "whole" if same else "wrong"
        finally:
            connection.close()

    def _left(self, asked: dict[str, Any], n_lines: int) -> str:
        """Read a few lines, and leave."""
        connection = self._ask(asked)
        if n_lines:
            response = connection.getresponse()
            for _ in range(n_lines):
                response.readline()
        connection.close()
        return "left"

    def _ask(self, asked: dict[str, Any]) -> http.client.HTTPConnection:
        place = self._address
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        return connection

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def rows_in_use(address: str) -> float:
    """What the server says."""
    with urlopen(f"{address}/metrics") as response:
        found = re.search(r"^llamachat_rows_running (\S+)", response.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def main() -> int:
    """Run the clients; say each half minute what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    server, soak = psutil.Process(arguments.pid), Soak(arguments.address, arguments.seed)
    clients = [
        threading.Thread(target=soak.run, args=(n,), daemon=True) for n in range(arguments.clients)
    ]
    for client in clients:
        client.start()
    began, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(15, left))
        resident = server.memory_info().rss / 2**20
        print(f"{time.monotonic() - began:5.0f} s {resident:6.0f} MiB {soak.counts}", flush=True)
    soak.end.set()
    for client in clients:
        client.join(300)
    time.sleep(1)
    rows = rows_in_use(arguments.address)
    print(f"rows in use at the end: {rows:g}")
    return int(bool(rows or soak.counts["wrong"] or soak.counts["failed"]))


if __name__ == "__main__":
    sys.exit(main())
