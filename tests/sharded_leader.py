"""The first process of several that share models: `python sharded_leader.py CASES RESULTS SIZE`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from programs import environment

IDS = [5, 9, 17, 3, 33, 60, 2, 2, 41, 77, 101, 9, 17, 200, 13, 44, 45, 46, 47, 48, 49]


def run(case: dict[str, Any], size: int) -> dict[str, Any]:
    """Logits of some ids and of a few, and replies of several strategies; one is left early."""
    import llamachat

    model = llamachat.load(
        case["folder"], backend=case["backend"], quantize=case["quantize"], dtype=case["dtype"],
        device=case.get("device", "cpu"), threads=1, ctx_size=256, tensor_parallel=size,
    )  # fmt: skip

    def reply(decoding: Any, n: int = 24) -> list[int]:
        return list(model.generate(IDS, decoding, n, stop_ids=()))

    prompts = [IDS, IDS[:5]]  # a prompt, a few tokens
    if case["quantize"] == "none":  # else activations are rounded: not every bit is the same
        prompts.append(IDS * 8)  # more than one message takes
    logits = [row for ids in prompts for row in model.logits(ids).tolist()]
    greedy = reply(llamachat.Greedy())
    left = model.generate(IDS, llamachat.Sample(seed=3), 24, stop_ids=())
    next(left)
    left.close()
    sampled = reply(llamachat.Sample(temperature=1.0, top_p=0.9, seed=7))
    return {
        "logits": logits,
        "replies": [greedy, sampled, reply(llamachat.Beam(3), 8)],
        "bytes": model.engine.bytes_per_token(0),
        "joined": getattr(model.engine.decoder.kernels, "_joined", 0),
    }


def ask(cases: Mapping[str, Mapping[str, str]], size: int, home: Path) -> dict[str, Any]:
    """What several processes answer to all cases, one after the other."""
    asked, answered = home / "cases.json", home / "results.json"
    asked.write_text(json.dumps(cases), "utf-8")
    done = subprocess.run(
        [sys.executable, __file__, asked, answered, str(size)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    results: dict[str, Any] = json.loads(answered.read_text("utf-8"))
    return results


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    results = {name: run(case, int(sys.argv[3])) for name, case in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(results), "utf-8")
