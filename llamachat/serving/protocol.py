"""What clients send: OpenAI's requests, with our ways to decode as further fields.

A field that is not here is refused by its name; one that says only what is so anyway is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llamachat.chat.options import Said, parse_samplers
from llamachat.chat.templates import Message
from llamachat.engine.probabilities import MOST

MAX_STOPS = 16
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells besides text."""

    include_usage: bool = False


class Asked(_Strict):
    """What both kinds of request have in common."""

    model: str | None = Field(None, description="The model that is served; it may be left out.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, description="Replies, which share one prompt.")
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = Field(None, description="Changes nothing.")

    strategy: str | None = Field(None, description="greedy, random, top-k:40, top-p:0.9, beam:4")
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1)
    eta_cutoff: float | None = Field(None, ge=0, lt=1)
    samplers: str | None = Field(None, description="top_k;temperature, or hf, llama.cpp")
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    bad_words: list[Text] | None = None
    num_beams: int | None = Field(None, ge=1)
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    beam_groups: int | None = Field(None, ge=1)
    diversity_penalty: float | None = Field(None, ge=0)
    stop_loops: int = Field(0, ge=0, description="End a reply that repeats itself so many times.")

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: Mapping[str, float] | None) -> Mapping[str, float] | None:
        if value and not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
            raise ValueError("keys are token ids")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether the end of a stream tells its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def said(self) -> Said:
        """How to decode.

        Raises:
            UsageError: the samplers are not understood.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Said)}
        if self.samplers is not None:
            values["samplers"] = parse_samplers(self.samplers)
        if self.bad_words is not None:
            values["bad_words"] = tuple(self.bad_words)
        if self.logit_bias is not None:
            values["logit_bias"] = tuple((int(k), v) for k, v in self.logit_bias.items())
        if self.early_stopping is not None:
            values["early_stopping"] = str(self.early_stopping).lower()
        return Said(**values)


class Part(_Strict):
    """Text in pieces; images and sound are not understood."""

    type: Literal["text"]
    text: str


class Turn(_Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def message(self) -> Message:
        """As a conversation holds it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message("system" if self.role == "developer" else self.role, text)


class TextFormat(_Strict):
    """Plain text, the only form of a reply."""

    type: Literal["text"]


class ChatAsked(Asked):
    """A conversation to be answered."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST)
    response_format: TextFormat | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that a reply may have."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many are told beside each token; None: not even its own probability."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsked(Asked):
    """A text, or its ids, to be gone on with; or several."""

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=MOST)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [it for it in self.prompt if not isinstance(it, int)]
        return several or [[it for it in self.prompt if isinstance(it, int)]]

    @property
    def limit(self) -> int | None:
        """Tokens that a reply may have; without a word 16, as of old."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many are told beside each token; None: not even its own probability."""
        return self.logprobs
