"""What a conversation needs of a model and of its engine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llamachat.engine import events as engine_events
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


class Answers(Protocol):
    """As much of an engine as a conversation needs."""

    @property
    def ctx_size(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        ...

    def generate(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        logprobs: int = 0,
        draft: int = 0,
        stop_loops: int = 0,
        turn: int = 0,
        attempt: int = 0,
        continued: int = 0,
    ) -> Generator[engine_events.EngineEvent, None, None]:
        """See `Engine.generate`."""
        ...

    def generate_many(
        self,
        ids: Sequence[int],
        decodings: Sequence[Decoding],
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        stop_loops: int = 0,
        turn: int = 0,
        attempt: int = 0,
    ) -> Generator[tuple[int, engine_events.EngineEvent], None, None]:
        """See `Engine.generate_many`."""
        ...


class Speaks(Protocol):
    """As much of a `Model` as a conversation needs."""

    @property
    def engine(self) -> Answers:
        """What runs ids."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, or None for a base model."""
        ...

    @property
    def sampling(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Sampling defaults by origin."""
        ...
