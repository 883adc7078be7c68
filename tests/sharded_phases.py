"""The first of two processes, until the other is lost: `python sharded_phases.py FOLDER PHASE`.

It says PHASE once that has begun, and "over" if it came to an end.
"""

from __future__ import annotations

import sys
import time

import llamachat
from llamachat.engine.events import Prefill, Token


def say(word: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main(folder: str, phase: str) -> None:
    """Load, and answer a prompt that takes a while."""
    if phase == "load":
        say(phase)
    model = llamachat.load(folder, device="cpu", quantize="none", threads=1, tensor_parallel=2)
    if phase == "idle":
        say(phase)
        time.sleep(60)
    n_prompt = 20_000 if phase == "prefill" else 8
    kinds = {"prefill": Prefill, "decode": Token}
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
