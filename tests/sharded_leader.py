"""The first process of several that share models: `python sharded_leader.py CASES RESULTS SIZE`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

from programs import environment

IDS = [5, 9, 17, 3, 33, 60, 2, 2, 41, 77, 101, 9, 17, 200, 13, 44, 45, 46, 47, 48, 49]


def endings(model: Any) -> list[list[int]]:
    """Replies that end in several ways, and after each what is held."""
    import llamachat

    sample = llamachat.Sample(temperature=1.0, top_p=0.9, seed=7)
    found: list[list[int]] = []

    def reply(decoding: Any, stop_ids: Sequence[int] = (), most: int = 24, **ends: Any) -> None:
        events = model.engine.generate(
            IDS, decoding, max_new_tokens=24, stop_ids=frozenset(stop_ids), **ends
        )
        ids: list[int] = []
        with closing(events), suppress(KeyboardInterrupt):
            ids.extend(islice((event.id for event in events if hasattr(event, "id")), most))
        found.extend([ids, [*model.engine.held]])

    def interrupted(ids: Sequence[int]) -> bool:
        if len(ids) == 4:
            raise KeyboardInterrupt
        return False

    reply(llamachat.Greedy())
    (greedy, _) = found
    reply(llamachat.Greedy(), stop_ids=[greedy[9]])
    reply(llamachat.Greedy(), ends=interrupted)
    reply(sample, most=3)  # left early
    reply(sample, ends=lambda ids: len(ids) == 5)
    reply(sample, ends=interrupted)
    reply(llamachat.Greedy(repetition_penalty=1.4))
    reply(sample)
    return found


def order(model: Any) -> list[str]:
    """What is done for three tokens, and when: ids are shared, a pass is run, a token is read."""
    import llamachat

    log: list[str] = []
    kernels = model.engine.decoder.kernels
    backend, peers = kernels.backend, kernels._peers

    def logged(word: str, do: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (log.append(word), do(*arguments))[1]

    model.engine.clear()
    with (
        mock.patch.object(backend, "run", logged("pass", backend.run)),
        mock.patch.object(peers, "_share", logged("ids", peers._share)),
    ):
        events = model.engine.generate(
            IDS, llamachat.Greedy(), max_new_tokens=3, stop_ids=frozenset(),
            ends=lambda _: log.append("read"),
        )  # fmt: skip
        list(events)
    return log


def after_ctrl_c(model: Any) -> list[list[int]]:
    """A reply after one that Ctrl-C ended while its third token was run, and what is held then.

    Only in a process of its own.
    """
    backend = model.engine.decoder.kernels.backend
    run, passes = backend.run, count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(passes) == 4:
            signal.raise_signal(signal.SIGINT)
        return run(*arguments)

    model.engine.clear()
    with mock.patch.object(backend, "run", interrupted), suppress(KeyboardInterrupt):
        list(model.generate(IDS, None, 24, stop_ids=()))
        raise AssertionError("it was not interrupted")
    return [list(model.generate(IDS, None, 24, stop_ids=())), [*model.engine.held]]


def of_queued(model: Any, size: int) -> dict[str, Any]:
    """What comes of passes that are queued before the host knows their token."""
    found: dict[str, Any] = {"endings": endings(model)}
    if size > 1:
        found |= {"order": order(model), "after Ctrl-C": after_ctrl_c(model)}
    model.engine._queues = False
    found["endings that were not queued"] = endings(model)
    model.engine._queues = True
    return found


def run(case: dict[str, Any], size: int) -> dict[str, Any]:
    """Logits of some ids and of a few, and replies of several strategies; one is left early."""
    import llamachat
    from llamachat.kernels.reference import Reference

    with mock.patch.object(Reference, "queues", "queues" in case):  # it takes ids of any type
        model = llamachat.load(
            case["folder"], backend=case["backend"], quantize=case["quantize"],
            dtype=case["dtype"], device=case.get("device", "cpu"), threads=1, ctx_size=256,
            tensor_parallel=size,
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
        **(of_queued(model, size) if model.engine._queues else {}),
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
