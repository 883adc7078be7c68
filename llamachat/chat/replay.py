"""A recorded conversation held again: is every token the same, and if not, what else was there?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

from llamachat.chat.record import Part, Record, common
from llamachat.chat.reply import Reply
from llamachat.chat.spoken import Begun, spelled
from llamachat.chat.transcript import Transcript
from llamachat.engine.beam import Beam
from llamachat.engine.events import Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import DamagedFileError, UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding
    from llamachat.loading import Model

THE_END = "the end"
_DECODINGS: Mapping[str, type[Greedy | Sample | Beam]] = {
    "greedy": Greedy, "sample": Sample, "beam": Beam,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of two tokens that might have come, and how probable the model alone has it."""

    id: int | None
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that is not the same.

    Attributes:
        turn: of the conversation, from 0.
        index: of the token in its reply, from 0.
        recorded: what it was; no id where the reply had ended.
        now: what it is now.
    """

    turn: int
    index: int
    recorded: Alternative
    now: Alternative


@dataclass(frozen=True, slots=True)
class Checked:
    """A stretch of a reply that was made again.

    Attributes:
        turn: of the conversation, from 0.
        tokens: how many are the same.
        skipped: why nothing was compared, if so.
        difference: where it is not what it was.
    """

    turn: int
    tokens: int
    skipped: str | None = None
    difference: Difference | None = None


def check(
    transcript: Transcript, use: Callable[[Mapping[str, Any], str | None], Model]
) -> Iterator[Checked]:
    """Make every reply again, in order.

    Args:
        transcript: what was recorded.
        use: gives the model of a run, in another form if one is named.

    Raises:
        LlamachatError: a model cannot be loaded, or what was recorded cannot be run on it.
    """
    for message in transcript.messages:
        record = message.record
        if record is None or record.text != message.content:
            continue
        for part in record.parts:
            if part.finish_reason == "interrupted" and part.strategy.get("name") == "beam":
                yield Checked(part.turn, 0, "beams that were interrupted cannot be made again")
            else:
                yield _checked(part, record, use(record.run, part.quantize))


def decoding_of(part: Part) -> Decoding:
    """The decoding that was recorded.

    Raises:
        DamagedFileError: it is none.
        UsageError: a value is out of its range.
    """
    return _decoding(part.strategy, part.seed)


def _decoding(strategy: Mapping[str, Any], seed: int | None) -> Decoding:
    values = dict(strategy)
    kind = _DECODINGS.get(str(values.pop("name", None)))
    known = {field.name for field in fields(kind)} if kind is not None else set()
    if kind is None or not set(values) <= known:
        raise DamagedFileError(f"a strategy that is not known: {dict(strategy)!r:.200}")
    if kind is Beam and isinstance(sampling := values.get("sampling"), dict):
        values["sampling"] = _decoding({"name": "sample", **sampling}, seed)
    values = {name: _frozen(value) for name, value in values.items()}
    if kind is Sample:
        values["seed"] = seed
    try:
        return kind(**values)
    except TypeError as error:
        raise DamagedFileError(f"a strategy that is damaged: {error}") from error


def _frozen(value: Any) -> Any:
    """Lists, as JSON has them, as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _checked(part: Part, record: Record, model: Model) -> Checked:
    ids, prompt = record.ids, part.prompt.whole()
    tokenizer = model.tokenizer
    largest = max((*prompt, *ids), default=0)
    if largest >= tokenizer.vocab_size:
        raise UsageError(f"id {largest} was recorded, {model.name} has {tokenizer.vocab_size}")
    begun = Begun(tuple(map(Token, ids[: part.start])))
    reply = Reply(tokenizer, part.stop, time.perf_counter(), begun)
    events = model.engine.generate(
        [*prompt, *ids[: part.start]],
        decoding_of(part),
        max_new_tokens=part.max_new_tokens,
        ends=reply.ends if part.stop else None,
        stop_loops=part.stop_loops,
        turn=part.turn,
        attempt=part.attempt,
        continued=part.start,
    )
    expected = ids[part.start : part.end]
    comes_to_its_end = part.finish_reason in ("stop", "loop") or part.strategy["name"] == "beam"
    tokens = (event.id for event in events if isinstance(event, Token))
    found = tuple(tokens if comes_to_its_end else islice(tokens, len(expected)))
    same = common(expected, found)
    if same == len(expected) and (len(found) == same or not comes_to_its_end):
        return Checked(part.turn, same)
    told = [*prompt, *ids[: part.start + same]]
    now = found[same] if same < len(found) else None
    recorded = expected[same] if same < len(expected) else None
    alternatives = _alternatives(told, (recorded, now), model)
    return Checked(
        part.turn, same, difference=Difference(part.turn, part.start + same, *alternatives)
    )


def _alternatives(
    told: list[int], tokens: tuple[int | None, int | None], model: Model
) -> tuple[Alternative, Alternative]:
    """Two tokens that might follow, None for the end, with the model's own probabilities."""
    (*_, logits) = model.iter_logits(told, first=len(told) - 1)
    shares = logits[-1, : model.tokenizer.vocab_size].double().softmax(-1)
    stops = model.tokenizer.stop_ids

    def of(token: int | None) -> Alternative:
        if token is None:
            return Alternative(None, THE_END, sum(shares[stop].item() for stop in stops))
        return Alternative(token, spelled(token, model.tokenizer), shares[token].item())

    return of(tokens[0]), of(tokens[1])
