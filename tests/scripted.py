"""A model without weights for tests of the terminal: it repeats the question, or what that asks.

Run as a program it is `llamachat` itself, but for the model: it starts without torch.
"""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamachat.__main__ import main
from llamachat.chat.context import check_overflow
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import JinjaTemplate
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Tail
from llamachat.engine.events import (
    Done,
    EngineEvent,
    Prefill,
    Probabilities,
    Probability,
    Speculation,
    Tails,
    Token,
)
from llamachat.engine.strategies import Sample
from llamachat.errors import DamagedFileError, PromptTooLongError, WillNotFitError
from llamachat.terminal import conversation, opening
from llamachat.terminal.front import Front
from llamachat.terminal.opening import Opened, Run

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
START, END = 256, 257


@dataclass(frozen=True)
class Bytes:
    """A tokenizer: a byte is a token."""

    vocab_size: int = 258
    bos_id: int | None = None
    eos_id: int | None = END
    add_bos: bool = False
    stop_ids: frozenset[int] = frozenset({END})
    space_prefix: bool = False
    specials: Mapping[str, int] = field(
        default_factory=lambda: {"<|im_start|>": START, "<|im_end|>": END}
    )

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < START else b""

    def piece(self, token: int) -> str:
        return self.token_bytes(token).decode("latin-1")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


TICKS = "tick " * 1000
SLOW = {"read slowly": 0.1, "slowly": 0.02}  # seconds a step


def reply_to(turns: list[tuple[str, str]]) -> str:
    """What is answered to a conversation of (role, text)."""
    questions = [text for role, text in turns if role == "user"]
    systems = [text for role, text in turns if role == "system"]
    replies = {
        "slowly": TICKS,
        "read slowly": TICKS,
        "interrupt the reply": TICKS,
        "interrupt the reading": TICKS,
        "nothing": "",
        "newlines": "\n\nfirst\n\nlast\n\n\n",
        "escapes": "safe\x1b]0;owned\x07\x1b[2J\x9b31mtext",
        "recall": " | ".join(questions),
        "system": " | ".join(systems),
    }
    return replies.get(questions[-1], questions[-1])


SHARES = dict(zip(b"0123\xe6", (0.01, 0.1, 0.3, 0.6, 0.01), strict=True))  # E6 begins 漢


def probabilities(token: int) -> Probabilities:
    """The token, half likely, and sure once its one rival was removed.

    The rival is the end, or of what is less likely its neighbour: of 0 it is 1, of 2 it is 3.
    """
    share, rival = SHARES.get(token, 0.5), token ^ 1 if token in SHARES else END
    chosen = Probability(token, math.log(share), 0.0)
    return Probabilities(chosen, (chosen, Probability(rival, math.log(1 - share), -math.inf)))


@dataclass
class ScriptedEngine:
    """Ids in, ids of `reply_to` out."""

    tokenizer: Bytes
    ctx_size: int = 8192
    kv_cache: str = "f32"

    def generate(
        self,
        ids: Sequence[int],
        decoding: Any,
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
    ) -> Generator[EngineEvent, None, None]:
        if len(ids) > self.ctx_size:
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens, not {self.ctx_size}")
        begun = len(ids) - continued
        bounds = slice(continued, continued + (max_new_tokens or self.ctx_size))
        drafted = Speculation(3, 2) if draft else None
        return self._generate(ids[:begun], bounds, attempt, drafted, logprobs)

    def generate_many(
        self, ids: Sequence[int], decodings: Sequence[Any], **settings: Any
    ) -> Generator[tuple[int, EngineEvent], None, None]:
        """In turn; what is drawn goes on in capitals after eight tokens, beams end after five."""
        draw = partial(self.generate, ids, **{k: v for k, v in settings.items() if k != "ends"})
        streams = {i: draw(decoding) for i, decoding in enumerate(decodings)}
        said = [0] * len(decodings)
        for i in cycle(range(len(decodings))):
            if not streams:
                return
            for event in streams.get(i, ()):
                if isinstance(event, Prefill) and i:
                    continue
                if isinstance(event, Token):
                    capital = isinstance(decodings[i], Sample) and said[i] >= 8
                    event = Token(ord(chr(event.id).upper()) if capital else event.id, None, -0.5)
                    said[i] += 1
                over = isinstance(decodings[i], Beam) and said[i] == 5
                yield i, event
                if isinstance(event, Done) or over:
                    del streams[i]
                    if over:
                        yield i, Done("stop")
                break

    def _generate(
        self,
        ids: Sequence[int],
        bounds: slice,
        attempt: int,
        speculation: Speculation | None,
        logprobs: int,
    ) -> Generator[EngineEvent, None, None]:
        names = {START: b"<|im_start|>", END: b"<|im_end|>"}
        text = b"".join(names.get(i) or bytes([i]) for i in ids).decode()
        turns = TURN.findall(text)
        reading_s, speaking_s = (turns[-1][1] == text and s for text, s in SLOW.items())
        for read in range(0, len(ids), 1 + len(ids) // 100):
            yield Prefill(read, len(ids), 0)
            time.sleep(reading_s)
        yield Prefill(len(ids), len(ids), 0)
        if turns[-1][1] == "interrupt the reading":
            signal.raise_signal(signal.SIGINT)
        spoken = reply_to(turns) + (f" (attempt {attempt})" if attempt else "")
        for i, token in enumerate(spoken.encode()[bounds]):
            if i == 7 and turns[-1][1] == "interrupt the reply":
                signal.raise_signal(signal.SIGINT)
            yield Token(token, probabilities(token) if logprobs else None)
            if turns[-1][1].startswith("beams "):
                yield Tails(tuple(Tail(tuple(b"open %d" % n), -n) for n in (1, 2)))
            time.sleep(speaking_s)
        if turns[-1][1] == "loop":
            yield Done("loop", speculation)
        else:
            yield Done("stop" if len(spoken.encode()) <= bounds.stop else "length", speculation)


def model(ctx_size: int = 8192) -> Any:
    """As much of a `Model` as a conversation on a terminal needs."""
    tokenizer = Bytes()
    return SimpleNamespace(
        name="scripted",
        config=SimpleNamespace(n_params=1_000_000),
        dtype="float32",
        form="float32",
        threads=1,
        quantize="none",
        located=SimpleNamespace(path=Path(__file__), repo=None, revision="r1", source="bundled"),
        path=Path(__file__),
        backend="scripted",
        device="cpu",
        tokenizer=tokenizer,
        engine=ScriptedEngine(tokenizer, ctx_size),
        chat_template=CHATML,
        sampling=(("generation_config.json", {"temperature": 0.5}),),
    )


@lru_cache(maxsize=1)
def template() -> JinjaTemplate:
    """One for all sessions of a process: it has a worker process of its own."""
    return JinjaTemplate(CHATML, Bytes())


def open_session(run: Run, front: Front | None = None) -> Opened:
    """What the terminal opens in place of a real model.

    One that is named opens while the user types: "slow" in two seconds, "broken" never, "large" if
    the user agrees.
    """
    if front is not None and run.model is not None:
        with front.loading(run.notices):
            time.sleep(0.3 if run.model == "broken" else 2.0)
        if run.model == "broken":
            raise DamagedFileError("scripted.gguf: no tensors", hint="fetch it again")
        if run.model == "large" and not front.ask("large; go on all the same?"):
            raise WillNotFitError("large: too large")
        run.notices(f"{run.model} was opened")
    speaker = model(run.ctx_size or 8192)
    session = ChatSession(
        speaker,
        system=run.system,
        options=run.options(speaker.sampling),
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        speculate=run.speculate,
        stop_loops=run.stop_loops,
        template=template(),
        logprobs=run.logprobs,
        overflow=check_overflow(run.overflow),
    )
    return Opened(speaker, session, load_s=0.1)


def reopened(opened: Opened, run: Run) -> Opened:
    """The same, in another form."""
    other = model()
    other.quantize = run.quantize
    return Opened(other, opened.session, load_s=0.2)


if __name__ == "__main__":
    opening.open_session, opening.reopened = open_session, reopened
    conversation.opens_meanwhile = lambda: "-m" in sys.argv
    main()
