"""A conversation as lines of JSON: what was said, and exactly how each reply was made. Torch-free.

The first line has the version and the run, then comes a line for each message; a line with a run
alone stands where it changed. docs/formats.md describes every key. A line that is damaged is lost,
the others are not; keys that are unknown are kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, get_args

from llamachat.chat.events import FinishReason, Timings
from llamachat.chat.record import Ids, Part, Record, common
from llamachat.chat.templates import Message, Role

VERSION = 1
MAX_PROMPT_IDS = 2**22
MAX_IDS_IN_ALL = 2**28  # of all prompts: what a file may ask to be put together
_ROLES = get_args(Role)
_REASONS = (*get_args(FinishReason), None)
_MESSAGE_KEYS = {"role", "content", "ids", "finish_reason", "parts"}
_HEADER_KEYS = {"llamachat", "created", "run"}


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a file says.

    Attributes:
        messages: of the conversation; those with `ids` say what their file says, unchecked.
        created: when it began, in ISO 8601; "" where that is not known.
        run: the last one, see `provenance.facts`; empty where none is known.
        extra: what else the first line says.
        version: of the form.
        problems: what could not be read, a line each.
    """

    messages: tuple[Message, ...]
    created: str = ""
    run: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] | None = None
    version: int = VERSION
    problems: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The first words of the first question."""
        return title_of(next((m.content for m in self.messages if m.role == "user"), ""))


def title_of(question: str) -> str:
    """The first words of a question, on one line."""
    words = " ".join(question[:400].split())
    return words if len(words) <= 60 else f"{words[:59].rstrip()}…"


class Writer:
    """Gives the lines of one file, in order: each says what is new after those before."""

    def __init__(self) -> None:
        self._told: list[int] = []
        self._run: Mapping[str, Any] = {}

    def header(
        self, created: str, run: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> bytes:
        """The first line."""
        self._run = run
        return _line({"llamachat": VERSION, "created": created, "run": run, **(extra or {})})

    def message(self, message: Message) -> bytes:
        """The line of a message, after that of its run if it has another."""
        record = message.record or Record()
        edited = record.text != message.content
        values: dict[str, Any] = {"role": message.role, "content": message.content}
        if edited or not record.ids:
            ids = {} if message.ids is None else {"ids": message.ids}
            return _line({**values, **ids, **record.extra})
        before = b""
        if record.run and record.run != self._run:
            self._run = record.run
            before = _line({"run": record.run})
        values |= {"ids": record.ids, "finish_reason": record.finish_reason}
        values["parts"] = [self._part(part, record) for part in record.parts]
        return before + _line({**values, **record.extra})

    def _part(self, part: Part, record: Record) -> dict[str, Any]:
        whole = part.prompt.whole()
        same = common(self._told, whole)
        self._told = [*whole, *record.ids[: part.end]]
        values = {f.name: getattr(part, f.name) for f in fields(Part) if f.name != "prompt"}
        values["timings"] = {k: round(v, 4) for k, v in asdict(part.timings).items()}
        prompt = {"same": same, "new": whole[same:], "sha256": digest(whole)}
        absent = [name for name in ("date", "note", "quantize") if values[name] is None]
        return {"prompt": prompt} | {k: v for k, v in values.items() if k not in absent}


def parse(lines: Iterable[bytes]) -> Transcript:
    """What the lines of a file say."""
    return _Reader().read(lines)


def digest(ids: Sequence[int]) -> str:
    """16 hexadecimal digits of the SHA-256 of ids as little-endian 32-bit integers."""
    words = array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]


class _Reader:
    """Reads a file line by line."""

    def __init__(self) -> None:
        self._told: list[int] = []
        self._base: Ids | None = None
        self._run: Mapping[str, Any] = {}
        self._header: dict[str, Any] = {}
        self._n_ids = 0
        self._problems: list[str] = []

    def read(self, lines: Iterable[bytes]) -> Transcript:
        messages: list[Message] = []
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
                if "role" in line:
                    messages.append(self._message(line, number))
                elif number == 1 or "llamachat" in line:
                    self._take_header(line)
                else:
                    self._run = _mapping(line["run"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self._problems.append(f"line {number} is damaged, and left out")
        header = self._header
        return Transcript(
            messages=tuple(messages),
            created=str(header.get("created", "")),
            run=self._run,
            extra={k: v for k, v in header.items() if k not in _HEADER_KEYS},
            version=header.get("llamachat", 0 if header else VERSION),
            problems=tuple(self._problems),
        )

    def _take_header(self, line: dict[str, Any]) -> None:
        self._header = _mapping(line)
        self._run = _mapping(line.get("run", {}))
        version = line.get("llamachat", 0)
        if type(version) is not int or version > VERSION:
            self._header["llamachat"] = VERSION + 1
            self._problems.append("written by a newer llamachat: what this one knows is read")

    def _message(self, line: dict[str, Any], number: int) -> Message:
        role, content = line["role"], line["content"]
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(role)
        content.encode("utf-8")  # of half a surrogate pair: UnicodeEncodeError, a ValueError
        extra = {k: v for k, v in line.items() if k not in _MESSAGE_KEYS}
        if role != "assistant" or "ids" not in line:
            return Message(role, content, record=Record(text=content, extra=extra))
        try:
            ids = _ids(line["ids"])
            reason = _one_of(line.get("finish_reason"), _REASONS)
            parts = tuple(self._part(part, ids) for part in line.get("parts", ()))
        except (ValueError, KeyError, TypeError, OverflowError):
            self._problems.append(f"line {number}: how the reply was made is damaged, its text not")
            return Message(role, content, record=Record(text=content, extra=extra))
        return Message(role, content, ids, Record(ids, content, parts, reason, self._run, extra))

    def _part(self, line: dict[str, Any], ids: tuple[int, ...]) -> Part:
        said = _mapping(line["prompt"])
        same, new = _whole(said["same"], len(self._told)), _ids(said["new"])
        self._n_ids += same + len(new)
        if same + len(new) > MAX_PROMPT_IDS or self._n_ids > MAX_IDS_IN_ALL:
            raise ValueError("too long")
        whole = [*self._told[:same], *new]
        if digest(whole) != said["sha256"]:
            raise ValueError("another prompt")
        start = _whole(line["start"], len(ids))
        end = _whole(line["end"], len(ids))
        prompt = Ids(new, same, self._base)
        self._told = [*whole, *ids[:end]]
        self._base = prompt.followed_by(ids[:end])
        seed, limit = line["seed"], line["max_new_tokens"]
        return Part(
            prompt=prompt,
            start=start,
            end=end,
            strategy=_mapping(line["strategy"]),
            seed=None if seed is None else _whole(seed),
            turn=_whole(line["turn"]),
            attempt=_whole(line["attempt"]),
            max_new_tokens=None if limit is None else _whole(limit),
            stop=tuple(_text(stop) for stop in line["stop"]),
            stop_loops=_whole(line["stop_loops"]),
            finish_reason=_one_of(line["finish_reason"], _REASONS),
            forgotten=_whole(line["forgotten"]),
            timings=Timings(**{k: float(v) for k, v in _mapping(line["timings"]).items()}),
            time=_text(line["time"]),
            date=_moment(line["date"]) if "date" in line else None,
            note=_text(line["note"]) if "note" in line else None,
            quantize=_text(line["quantize"]) if "quantize" in line else None,
        )


def _line(values: Mapping[str, Any]) -> bytes:
    line = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return line.encode("utf-8", "replace") + b"\n"  # half a surrogate pair is no character


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(type(value).__name__)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _moment(value: Any) -> str:
    return datetime.fromisoformat(_text(value)).isoformat()


def _whole(value: Any, most: int = 2**64) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(value)
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in value
    ):
        raise ValueError("ids")
    return tuple(value)


def _one_of(value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise ValueError(value)
    return value
