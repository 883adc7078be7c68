"""From nothing to the first token: how long each step takes, and what memory loading takes.

    python tools/measure_start.py MODEL [--device cuda] [--quantize auto] [-c 4096] [--most-gib 1]

Each run is a process of its own. On a GPU it fails where loading took more than that many GiB
beside weights, keys and values.
"""

from __future__ import annotations

import argparse
import sys
import time

import psutil


def main() -> None:
    """Load what the command line names, and answer."""
    began = psutil.Process().create_time()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--ctx-size", "-c", type=int, default=4096)
    parser.add_argument("--most-gib", type=float, default=1.0)
    asked = parser.parse_args()

    def say(step: str) -> None:
        print(f"{time.time() - began:6.2f} s  {step}", flush=True)

    import llamachat
    from llamachat.kernels.backends import gpu_of
    from llamachat.loading import load
    from llamachat.loading.device import peak_bytes

    say("imported")
    model = load(
        asked.model, device=asked.device, quantize=asked.quantize, ctx_size=asked.ctx_size,
        notice=say,
    )  # fmt: skip
    import torch

    gpu = gpu_of(model.device)
    taken = 0 if gpu is None else torch.cuda.memory_allocated(gpu)
    say(f"loaded on {model.device} as {model.quantize}")
    ids = model.tokenizer.encode("Once upon a time")
    replies = model.generate(ids, llamachat.Greedy(), max_new_tokens=3, stop_ids=())
    for number, _ in enumerate(replies, 1):
        say(f"token {number}")
    peak = peak_bytes(gpu) / 2**30
    if gpu is None:
        say(f"memory: {peak:.2f} GiB resident at most")
        return
    say(f"memory: {taken / 2**30:.2f} GiB for weights and context, {peak:.2f} GiB at most")
    sys.exit(peak - taken / 2**30 > asked.most_gib)


if __name__ == "__main__":
    main()
