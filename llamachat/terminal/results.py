"""What `eval` found: the progress to it, a table for people, JSON for programs."""

from __future__ import annotations

import json as jsonlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from llamachat.terminal.failure import say
from llamachat.terminal.output import write
from llamachat.terminal.progress import Status

Result = Mapping[str, Any]
MB = 1e6


def last_of(results: Iterable[Result], status: Status) -> Result:
    """The last of results that come one after the other; Ctrl-C says what it is so far."""
    latest: deque[Result] = deque(maxlen=1)
    try:
        latest.extend(results)
    except KeyboardInterrupt:
        status.clear()
        for result in latest:
            say(f"llamachat: interrupted after {_figures(result)}")
        raise
    finally:
        status.clear()
    return latest[0]


def show_result(result: Result, *, json: bool) -> None:
    """Write a result to stdout."""
    if json:
        write(jsonlib.dumps(result, ensure_ascii=False, indent=2) + "\n")
    else:
        write("".join(f"{name:<12}  {value}\n" for name, value in _rows(result)))


def dated_lines(results: Iterable[Result]) -> list[str]:
    """A line each of what was found some time ago; what a file says otherwise is passed over."""
    lines: list[str] = []
    for result in results:
        with suppress(KeyError, TypeError, ValueError):
            ran = f"{result['quantize']}, {result['backend']}, KV cache {result['kv_cache']}"
            lines.append(f"{result['date']:.10}: {ran}, {_figures(result)}")
    return lines


def _figures(result: Result) -> str:
    """Those that matter most."""
    kl = f", KL {_uncertain(result['kl'], 'mean')}" if "kl" in result else ""
    return f"{_windows(result)}: perplexity {_uncertain(result, 'perplexity')}{kl}"


def _rows(result: Result) -> Iterator[tuple[str, str]]:
    yield "model", _described(result)
    yield "text", f"{_windows(result)}, {result['tokens']:,} tokens scored"
    yield "perplexity", _uncertain(result, "perplexity")
    if "against" not in result:
        return
    against, kl = result["against"], result["kl"]
    yield "against", _described(against)
    yield "perplexity", _uncertain(against, "perplexity")
    yield "ratio", _uncertain(result["perplexity_ratio"], "value")
    yield "KL mean", _uncertain(kl, "mean")
    yield "KL median", f"{kl['median']:.6f}"
    yield "KL 99 %", f"{kl['p99']:.6f}"
    yield "KL max", f"{kl['max']:.6f}"
    yield "RMS Δp", f"{result['rms_dp_percent']:.3f} %"
    yield "same top-1", f"{result['top1_agreement']:.2%}"


def _windows(result: Result) -> str:
    n = result["chunks"]
    return f"{n} window{'s' if n > 1 else ''} of {result['ctx_size']}"


def _described(ran: Result) -> str:
    bits = ran["bits_per_weight"]
    return (
        f"{ran['model']}: {ran['quantize']}, {ran['backend']}, {ran['dtype']}, "
        f"KV cache {ran['kv_cache']}, {ran['size_bytes'] / MB:,.1f} MB on disk"
        + ("" if bits is None else f", {bits:.2f} bits per weight")
    )


def _uncertain(figures: Result, name: str) -> str:
    value, stderr = figures[name], figures["stderr"]
    digits = 4 if name == "perplexity" else 6
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
