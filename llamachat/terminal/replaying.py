"""`llamachat replay`: a saved conversation shown again, or held again and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llamachat.chat import saved
from llamachat.chat.transcript import Transcript
from llamachat.errors import CheckFailedError, UsageError
from llamachat.quant.form import FORM_NAMES
from llamachat.terminal.failure import Notices, say
from llamachat.terminal.output import write
from llamachat.terminal.sessions import conversation, facts
from llamachat.terminal.tables import write_json

if TYPE_CHECKING:
    from llamachat.chat.replay import Alternative, Checked, Difference
    from llamachat.loading import Model

_COMPARED = ("files", "backend", "instruction_set", "quantize", "dtype", "kv_cache", "versions")


def show(name: str, *, json: bool) -> None:
    """A conversation as it was; as JSON with all that is known of each reply."""
    path = saved.path_of(name)
    transcript = _read(name)
    if not json:
        write(conversation(transcript))
        return
    shown = facts(path, transcript)
    for message, told in zip(transcript.messages, shown["messages"], strict=True):
        record = message.record
        if record is not None and record.parts and record.text == message.content:
            told["finish_reason"] = record.finish_reason
            told["parts"] = [
                {**asdict(part), "prompt": part.prompt.whole()} for part in record.parts
            ]
    write_json(shown)


def check(name: str, *, json: bool) -> None:
    """Answer every question again, with the model and the settings that were recorded.

    Raises:
        UsageError: no reply was recorded.
        CheckFailedError: a token is another one.
    """
    transcript = _read(name)
    from llamachat.chat import replay

    done: list[Checked] = []
    for checked in replay.check(transcript, Models(Notices()).use):
        done.append(checked)
        if checked.skipped:
            say(f"llamachat: turn {checked.turn + 1}: {checked.skipped}")
        if checked.difference is not None:
            break
    if not done:
        raise UsageError(f"{name}: no reply was recorded with how it was made")
    difference, tokens = done[-1].difference, sum(checked.tokens for checked in done)
    skipped = sum(checked.skipped is not None for checked in done)
    if json:
        found = {"equal": difference is None, "tokens": tokens, "skipped": skipped}
        write_json(found | {"difference": asdict(difference) if difference else None})
    if difference is not None:
        raise CheckFailedError(_told(difference))
    if not json:
        write(f"all {tokens} tokens are the same\n")


class Models:
    """Loads the models of runs, one at a time."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._key: object = None
        self._model: Model | None = None

    def use(self, run: Mapping[str, Any], form: str | None) -> Model:
        """The model of a run, in another form if one is named."""
        if self._model is None or self._key != (run, form):
            self._model = None  # it is let go before the next one is loaded
            self._model = self._load(run, form)
            self._key = (dict(run), form)
        return self._model

    def _load(self, run: Mapping[str, Any], form: str | None) -> Model:
        from llamachat.chat import provenance
        from llamachat.chat.builtin import template_for
        from llamachat.loading import load

        if not isinstance(run.get("model"), str):
            raise UsageError("the model was not recorded: there is nothing to check with")
        if run.get("source") == "endpoint":
            raise UsageError(f"a server answered ({run.get('endpoint')}): it cannot be checked")
        lora = [it for it in run.get("lora") or () if isinstance(it, str)]
        quantize = form or run.get("quantize")
        model = load(
            run["model"],
            lora=lora,
            quantize=quantize if quantize in ("none", *FORM_NAMES) else "auto",
            device=_text(run, "device"),
            backend=_text(run, "backend"),
            dtype=_text(run, "dtype"),
            kv_cache=_text(run, "kv_cache"),
            ctx_size=_number(run, "ctx_size"),
            threads=_number(run, "threads"),
            revision=run.get("revision") if run.get("source") == "hub" else None,
            notice=self._notice,
        )
        now = provenance.facts(model, template_for(None, model.tokenizer), lora)
        for key in _COMPARED:
            if form is None and key in run and run[key] != now[key]:
                self._notice(f"recorded with {key} {run[key]}, checked with {now[key]}")
        return model


def _read(name: str) -> Transcript:
    transcript = saved.read(saved.path_of(name))
    for problem in transcript.problems[:3]:
        Notices()(problem)
    return transcript


def _told(difference: Difference) -> str:
    where = f"turn {difference.turn + 1}, token {difference.index + 1}"
    return f"{where}: was {_one(difference.recorded)}, now {_one(difference.now)}"


def _one(one: Alternative) -> str:
    name = one.text if one.id is None else f"{one.id} {one.text}"
    return f"{name} ({100 * one.probability:.2f} %)"


def _text(run: Mapping[str, Any], key: str) -> str:
    value = run.get(key)
    return value if isinstance(value, str) else "auto"


def _number(run: Mapping[str, Any], key: str) -> int | None:
    value = run.get(key)
    return value if type(value) is int and value > 0 else None
