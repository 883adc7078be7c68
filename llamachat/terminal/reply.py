"""One answer, in one shot: text or JSON on stdout, all else on stderr."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from llamachat.chat.code_blocks import code_blocks
from llamachat.chat.commands import statistics
from llamachat.chat.events import (
    Done,
    Event,
    Prefill,
    Probabilities,
    Probability,
    Summarizing,
    Tails,
    Text,
    Trimmed,
)
from llamachat.chat.keeping import Found
from llamachat.chat.pieces import Pieces
from llamachat.chat.remote import Server
from llamachat.chat.spoken import text_of
from llamachat.errors import UsageError
from llamachat.terminal.failure import Notices, say, understood
from llamachat.terminal.interrupts import interruptible
from llamachat.terminal.opening import Opened, Run, open_session
from llamachat.terminal.output import Lines, write
from llamachat.terminal.progress import PrefillProgress
from llamachat.terminal.saving import is_named, keeping, wanted
from llamachat.terminal.stream import loop_notice, overflow_notice
from llamachat.terminal.tails import TextOverTails
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamachat.loading import Model


def answer(
    question: str, run: Run, *, json: bool, stream: bool | None, extract: bool = False
) -> None:
    """Ask once and write the answer.

    Args:
        question: what is asked.
        run: how.
        json: one object instead of text; with `stream` True, one event a line.
        stream: None is True for text and False for JSON.
        extract: of the text the first block of code alone; if it has none, all of it.

    Raises:
        KeyboardInterrupt: the reply was interrupted; what there was of it is written.
        UsageError: log-probabilities were asked for without JSON to hold them, or an extract of it.
    """
    if extract and json:
        raise UsageError("--extract takes code from text, not from --json")
    if run.logprobs and not json:
        raise UsageError("--logprobs needs --json")
    run, found = wanted(run)
    if json and stream:
        done = _stream_events(question, run, found)
    else:
        opened = open_session(run)
        together: Callable[[str], str] | None = str if stream is False else None
        if extract:
            together = partial(_first_code, notice=run.notices)
        with (
            keeping(opened, run, found, saves=is_named(run)),
            closing(interruptible(opened.session.send(question))) as events,
        ):
            if json:
                *_, last = events
                assert isinstance(last, Done)
                done = last
                write(_json(report(done, opened)))
            else:
                done = _write_text(events, run, together=together)
    if done.finish_reason == "loop":
        run.notices(loop_notice(done))
    if run.verbose:
        say(f"llamachat: {statistics(done)}")
    if done.finish_reason == "interrupted":
        raise done.problem or KeyboardInterrupt


def report(done: Done, opened: Opened) -> dict[str, Any]:
    """The JSON object of one answer."""
    ran = done.prompt_tokens - done.reused_tokens
    times, speculation = done.timings, done.speculation
    tokenizer = opened.model.tokenizer
    logprobs = {"logprobs": [_logprobs(it, tokenizer) for it in done.logprobs]}
    return {
        **_who(opened.model),
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "token_ids": None if isinstance(opened.model, Server) else list(done.token_ids),
        "seed": done.seed,
        "strategy": dict(done.strategy),
        "truncated": {k: v for k, v in asdict(done.trimmed).items() if v is not None},
        **({"speculation": asdict(speculation)} if speculation else {}),
        "timings": {
            "load_s": round(opened.load_s, 4),
            "prefill_s": round(times.prefill_s, 4),
            "decode_s": round(times.decode_s, 4),
            "ttft_s": round(times.ttft_s, 4),
            "prefill_tok_per_s": _rate(ran, times.prefill_s),
            "decode_tok_per_s": _rate(done.completion_tokens - 1, times.decode_s),
        },
        **(logprobs if opened.session.logprobs else {}),
    }


def _who(model: Model | Server) -> dict[str, Any]:
    """Who answered, and in which form."""
    if isinstance(model, Server):
        return {
            "model": model.name,
            "revision": None,
            "quantize": None,
            "endpoint": model.endpoint.url,
        }
    return {
        "model": model.name,
        "revision": model.located.revision,
        "quantize": model.quantize,
    }


def named(model: Model | Server) -> dict[str, Any]:
    """The model as the first event of a stream tells it."""
    told = _who(model)
    return {name: told[name] for name in told if name != "quantize"}


def _first_code(text: str, notice: Notices) -> str:
    blocks = code_blocks(text)
    if not blocks:
        notice("the answer has no block of code: this is all of it")
    return blocks[0].code if blocks else text


def _write_text(
    events: Iterator[Event], run: Run, *, together: Callable[[str], str] | None
) -> Done:
    """Write text as it comes, or what is made of it together; exactly one final newline."""
    done, out, progress = None, TextOverTails(), PrefillProgress(quiet=run.notices.quiet)
    lines = Lines(out.write)
    try:
        for event in events:
            if isinstance(event, Prefill):
                progress.show(event)
            elif isinstance(event, Text) and together is None:
                lines.write(event.text)
            elif isinstance(event, Tails) and together is None:
                out.show(event)
            elif isinstance(event, Summarizing | Trimmed):
                run.notices(overflow_notice(event))
            elif isinstance(event, Done):
                done = event
                lines.write(together(event.text) if together else "")
    finally:
        progress.clear()
        out.clear()
        lines.end(complete=done is not None and done.finish_reason != "interrupted")
    assert done is not None, "a reply ends with Done"
    return done


def _stream_events(question: str, run: Run, found: Found | None) -> Done:
    """One JSON object a line: start, prefill, token, done; or error."""
    done = None
    try:
        opened = open_session(run)
        write_event("start", **named(opened.model))
        with (
            keeping(opened, run, found, saves=is_named(run)),
            closing(interruptible(opened.session.send(question))) as events,
        ):
            for event in events:
                if isinstance(event, Prefill):
                    write_event("prefill", **asdict(event))
                elif isinstance(event, Text):
                    known = event.probabilities
                    told = {"logprobs": [_logprobs(known, opened.model.tokenizer)]} if known else {}
                    write_event("token", text=event.text, **told)
                elif isinstance(event, Done):
                    done = event
                    write_event("done", **report(done, opened))
    except Exception as error:
        write_failure(error)
        raise
    assert done is not None, "a reply ends with Done"
    return done


def _logprobs(found: Probabilities, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_logprob(one, tokenizer) for one in found.top]
    return {**_logprob(found.chosen, tokenizer), "top": top}


def _logprob(one: Probability, tokenizer: Tokenizer) -> dict[str, Any]:
    """One token; `filtered_logprob` is null where the filters removed it, or nobody tells."""
    removed = not math.isfinite(one.filtered_logprob)
    return {
        "id": None if isinstance(tokenizer, Pieces) else one.id,
        "token": text_of(one.id, tokenizer),
        "logprob": round(one.logprob, 6),
        "filtered_logprob": None if removed else round(one.filtered_logprob, 6),
    }


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if seconds > 0 and tokens > 0 else None


def write_failure(error: Exception) -> None:
    """The event of a failure."""
    known = understood(error)
    exit_code, hint = getattr(known, "exit_code", 1), getattr(known, "hint", None)
    write_event("error", message=str(known), hint=hint, exit_code=exit_code)


def write_event(kind: str, **values: Any) -> None:
    """One line of streamed JSON."""
    write(_json({"event": kind, **values}))


def _json(value: Any) -> str:
    return jsonlib.dumps(value, ensure_ascii=False) + "\n"
