"""The first of two processes, until the other is lost: `python sharded_phases.py FOLDER PHASE`.

It says PHASE once that has begun, and "over" if it came to an end. In the phase "queued" passes are
queued as on GPUs; in "failed" one of those fails in this process, which then asks for another one.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import Any

import llamachat
from llamachat.engine.events import Prefill, Token
from llamachat.errors import LlamachatError
from llamachat.kernels.reference import Reference

QUEUED = ("queued", "failed")


def say(word: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def fail(model: Any) -> None:
    """Let the third pass fail, and say what becomes of a reply after it."""
    backend = model.engine.decoder.kernels.backend
    run, passes = backend.run, count(1)

    def failing(*arguments: Any) -> Any:
        if next(passes) == 3:
            raise ValueError("failed")
        return run(*arguments)

    backend.run = failing
    for _ in range(2):
        try:
            say(str(len(list(model.generate([5] * 8, llamachat.Greedy(), 4, stop_ids=())))))
        except (ValueError, LlamachatError) as error:
            say(str(error))


def main(folder: str, phase: str) -> None:
    """Load, and answer a prompt that takes a while."""
    if phase == "load":
        say(phase)
    Reference.queues = phase in QUEUED
    model = llamachat.load(
        folder, device="cpu", backend="reference" if phase in QUEUED else "auto",
        quantize="none", threads=1, tensor_parallel=2,
    )  # fmt: skip
    if phase == "idle":
        say(phase)
        time.sleep(60)
    if phase == "failed":
        say(phase)
        fail(model)
        return
    n_prompt = 20_000 if phase == "prefill" else 8
    kinds = {"prefill": Prefill, "decode": Token, "queued": Token}
    events = model.engine.generate(
        [5] * n_prompt, llamachat.Greedy(), max_new_tokens=50_000, stop_ids=frozenset()
    )
    for event in events:
        if isinstance(event, kinds.get(phase, ())):
            say(phase)
            phase = ""
    say("over")


if __name__ == "__main__":
    main(*sys.argv[1:])
