"""From what a client asks to a request of the engine, and to its answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import date
from functools import partial
from typing import TYPE_CHECKING

from llamachat.chat.context import turns_of
from llamachat.chat.dates import set_date
from llamachat.chat.options import Options, Said
from llamachat.chat.reply import Reply
from llamachat.chat.sources import Source, settle
from llamachat.chat.templates import Template, encode
from llamachat.engine.scheduler import Request
from llamachat.errors import LlamachatError
from llamachat.serving.answers import Answer, Kind
from llamachat.serving.metrics import Metrics
from llamachat.serving.protocol import Asked, ChatAsked, CompletionAsked
from llamachat.serving.several import Several
from llamachat.serving.worker import Worker
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding


class UnknownModelError(LlamachatError):
    """Another model is asked for than the one that is served."""


@dataclass(frozen=True, slots=True)
class Service:
    """One model, and the engine's thread that runs it.

    Attributes:
        name: what clients call the model.
        tokenizer: text to ids and back.
        template: how conversations are written.
        options: defaults for decoding.
        ctx_size: tokens that a prompt and its reply may have together.
        worker: the engine's thread.
        metrics: of this server.
        created: when it began, in seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    template: Template
    options: Options
    ctx_size: int
    worker: Worker
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    _prompts: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="prompts")
    )

    async def chat(self, asked: ChatAsked) -> Answer:
        """The answer to a conversation.

        Raises:
            LlamachatError: it cannot be had; see `Worker.submit`.
        """
        stops = (*asked.stops, *self.template.stops)
        messages = [turn.message() for turn in asked.messages]
        turn = max(0, len(turns_of(messages)) - 1)

        def ids() -> list[int]:
            set_date(self.template, date.today().isoformat())  # the prompts of a day begin alike
            return encode(self.template.segments(messages), self.tokenizer)

        return await self._answer("chat.completion", asked, ids, stops, turn)

    async def completion(self, asked: CompletionAsked) -> Answer | Several:
        """How texts go on; each is a request of its own to the engine. See `chat`."""
        answers: list[Answer] = []
        try:
            for prompt in asked.prompts:
                ids = partial(self._ids, prompt)
                answers.append(await self._answer("text_completion", asked, ids, asked.stops, 0))
        except BaseException:
            self.worker.release(*(answer.stream for answer in answers))
            raise
        return answers[0] if len(answers) == 1 else Several(answers)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return encode([prompt], self.tokenizer) if isinstance(prompt, str) else prompt

    async def _answer(
        self,
        kind: Kind,
        asked: ChatAsked | CompletionAsked,
        ids: Callable[[], list[int]],
        stops: tuple[str, ...],
        turn: int,
    ) -> Answer:
        began = time.perf_counter()
        if asked.model is not None and asked.model != self.name:
            raise UnknownModelError(f"the model here is {self.name!r}, not {asked.model!r}")
        decoding = self._decoding(asked)
        self.worker.check_room((asked.n or 1) * decoding.width)
        prompt = await asyncio.get_running_loop().run_in_executor(self._prompts, ids)
        n, wanted = asked.n or 1, asked.alternatives
        replies = [Reply(self.tokenizer, stops, began) for _ in range(n)]
        request = Request(
            tuple(prompt),
            (decoding,) * n,
            max_new_tokens=asked.limit,
            ends=replies[0].ends if stops else None,
            logprobs=0 if wanted is None else max(1, wanted),
            stop_loops=asked.stop_loops,
            turn=turn,
        )
        stream = self.worker.submit(request)
        return Answer(kind, self.name, stream, replies, alternatives=wanted, metrics=self.metrics)

    def _decoding(self, asked: Asked) -> Decoding:
        return under(asked.said(), self.options).decoding(self.tokenizer)


def under(said: Said, defaults: Options) -> Options:
    """What a client says, over what the server was told, as flags are over the config file."""
    settled = settle([_source(said, "the request"), _source(defaults.said, "config.toml")])
    return Options(settled.said, (*settled.layers, *defaults.layers))


def _source(said: Said, origin: str) -> Source:
    values = {field.name: getattr(said, field.name) for field in fields(Said)}
    return {name: (value, origin) for name, value in values.items() if value is not None}


def in_fields(message: str) -> str:
    """What is said of a flag, said of the field of its name: "--top-p 0.9" as "top_p 0.9"."""
    return re.sub(r"--([a-z][a-z-]*[a-z])", lambda flag: flag[1].replace("-", "_"), message)
