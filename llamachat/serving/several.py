"""Replies to several prompts, as one response: OpenAI's choices, prompt by prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from llamachat.serving.answers import Answer
from llamachat.serving.worker import Stream


class Several:
    """Answers that belong together. See `Answer`."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        """Nothing has come yet."""
        self._answers = answers

    @property
    def streams(self) -> tuple[Stream, ...]:
        """What the engine says, of each prompt."""
        return tuple(stream for answer in self._answers for stream in answer.streams)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts, and of all replies."""
        each = [answer.usage for answer in self._answers]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        cached = sum(it["prompt_tokens_details"]["cached_tokens"] for it in each)
        counts = {name: sum(it[name] for it in each) for name in names}
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    async def whole(self) -> dict[str, Any]:
        """The response, once all replies are over."""
        wholes = [self._of(k, await it.whole()) for k, it in enumerate(self._answers)]
        choices = [choice for whole in wholes for choice in whole["choices"]]
        return {**wholes[0], "choices": choices, "usage": self.usage}

    async def chunks(self, *, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The parts of a streamed response, of every prompt as they come."""
        parts = [answer.chunks(usage=False) for answer in self._answers]
        awaited = {asyncio.ensure_future(anext(it)): k for k, it in enumerate(parts)}
        none = {"usage": None} if usage else {}
        last: dict[str, Any] = {}
        try:
            while awaited:
                done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    k = awaited.pop(task)
                    try:
                        last = self._of(k, task.result())
                    except StopAsyncIteration:
                        continue
                    awaited[asyncio.ensure_future(anext(parts[k]))] = k
                    yield {**last, **none}
        finally:
            for task in awaited:
                task.cancel()
        if usage:
            yield {**last, "choices": [], "usage": self.usage}

    def account(self, end: str) -> None:
        """Tell the metrics how it ended: once."""
        for answer in self._answers:
            answer.account(end)

    def _of(self, k: int, response: dict[str, Any]) -> dict[str, Any]:
        """What prompt k came to, as a part of the whole."""
        before = sum(answer.n for answer in self._answers[:k])
        choices = [{**it, "index": before + it["index"]} for it in response["choices"]]
        return {**response, **self._answers[0].head, "choices": choices}
