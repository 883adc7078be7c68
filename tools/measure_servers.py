"""Ask servers of the OpenAI protocol for replies, several at once, in turn; print medians.

    llamachat serve -m smollm2-135m --parallel 8 --port 8001
    llama-server -m SmolLM2-135M-Instruct.Q4_1.gguf --parallel 8 -c 16384 --port 8002
    python tools/measure_servers.py http://127.0.0.1:8001/v1 http://127.0.0.1:8002/v1 --clients 8

In a round each client asks one question of its own and reads the stream to its end. Every question
begins differently, so that nothing of it was read before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any
from urllib.parse import urlsplit

WORDS = ("river", "stone", "night", "paper", "glass", "winter", "engine", "letter", "garden")


@dataclass(frozen=True, slots=True)
class Heard:
    """One reply: its tokens, and seconds from the question to the first text and to the end."""

    tokens: int
    first_s: float
    whole_s: float


@dataclass(slots=True)
class Figures:
    """Of one server: tokens per second of all clients by round, and each reply."""

    rates: list[float] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)

    def __str__(self) -> str:
        firsts = [1000 * it.first_s for it in self.heard]
        decoded = median((it.tokens - 1) / (it.whole_s - it.first_s) for it in self.heard)
        return (
            f"{median(self.rates):.1f} tok/s ({min(self.rates):.1f} to {max(self.rates):.1f}), "
            f"{decoded:.1f} of each after its first; "
            f"first text after {median(firsts):.0f} ms (longest {max(firsts):.0f})"
        )


def ask(address: str, asked: dict[str, Any]) -> Heard:
    """Read one streamed reply; only what counts is parsed, so that the client costs little."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    began, first_s, tokens = time.perf_counter(), 0.0, 0
    headers = {"Content-Type": "application/json"}
    asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", f"{place.path}/chat/completions", json.dumps(asked), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{address}: {response.status} {response.read(500)!r}")
    for line in response:
        is_event = line.startswith(b"data: {")
        if is_event and not first_s:
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                first_s = time.perf_counter() - began
        elif is_event and b'"completion_tokens"' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    connection.close()
    return Heard(tokens, first_s, time.perf_counter() - began)


def question(n_words: int) -> str:
    """A prompt like no other."""
    words = Random(secrets.randbits(64)).choices(WORDS, k=n_words)
    return f"{' '.join(words)}. Write a long story of several hundred words with these words in it."


def main() -> int:
    """Rounds over all servers in turn; the first one warms up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--words", type=int, default=40, help="of a prompt")
    arguments = parser.parse_args()
    figures = {address: Figures() for address in arguments.addresses}
    sizes = {"max_tokens": arguments.tokens, "temperature": 0}

    def client(address: str) -> Heard:
        messages = [{"role": "user", "content": question(arguments.words)}]
        return ask(address, {"messages": messages, **sizes})

    with ThreadPoolExecutor(arguments.clients) as clients:
        for n in range(arguments.rounds + 1):
            for address, found in figures.items():
                began = time.perf_counter()
                heard = list(clients.map(client, [address] * arguments.clients))
                if n:
                    seconds = time.perf_counter() - began
                    found.rates.append(sum(it.tokens for it in heard) / seconds)
                    found.heard += heard
    for address, found in figures.items():
        sys.stdout.write(f"{address}: {found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
