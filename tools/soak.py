"""Many turns over two tiny models, as unruly as users are: nothing leaks, no prefix is wrong.

    python tools/soak.py [--device cpu|cuda|cuda:N] [--turns 2000] [--seed 1]

Each turn a question is asked, a reply drawn anew, taken back, interrupted, searched with beams or
drafted, now and then by the other model or by one that was loaded again. What the model thought of
each token, over whatever the cache held, is compared with one pass over all ids and no cache.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.hardware import resident_bytes
from llamachat.kernels import Kernels
from llamachat.kernels.backends import choose, make
from llamachat.model.decoder import load_decoder
from llamachat.quant.form import Form
from llamachat.quant.tensor import QTensor

CTX_SIZE, VOCABULARY = 256, 80
LONGEST_REPLY, LONGEST_QUESTION = 24, 40
STOP_IDS = frozenset({3})
FORMS = ("float", "int4")
# Mean difference of log-probabilities. Kernels round activations to 8 bits where few tokens are
# run at once and weights are quantized; an id that is wrong moves them by 0.06 to 0.5. It may be
# twice as much where a reply has so few tokens that a mean is nearly one of them.
TOLERANCES = {"float": 2e-3, "int4": 0.05}
FEW = 4
SETTLED = 0.3  # of all turns: by then every kind of pass has been run
MOST_GROWTH_BYTES = 24 << 20


def engine_of(form: str, kernels: Kernels) -> Engine:
    """A model whose best logits stand well apart, made anew."""
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=VOCABULARY, norm_eps=1e-5, rope_theta=1e4, max_seq_len=CTX_SIZE, tied=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(FORMS.index(form))

    def weights() -> Iterator[tuple[str, Tensor | QTensor]]:
        for weight in iter_weights(config):
            values = torch.randn(weight.shape, generator=generator) * 0.3
            is_coded = form != "float" and values.ndim == 2
            yield weight.hf, kernels.quantize(values, Form("int4")) if is_coded else values

    decoder = load_decoder(config, weights(), kernels)
    kv_cache = "f32" if form == "float" else "bf16"
    return Engine(decoder, ctx_size=CTX_SIZE, stop_ids=STOP_IDS, kv_cache=kv_cache, chunk=64)


@dataclass
class Talk:
    """A conversation as ids: where each turn began, and where its reply did."""

    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)

    def ask(self, dice: random.Random) -> None:
        """Add a question; the conversation begins anew where there is no room."""
        if len(self.ids) + LONGEST_QUESTION + LONGEST_REPLY > CTX_SIZE:
            self.undo(dice.randrange(1, len(self.turns) + 1))
        start = len(self.ids)
        self.ids += [dice.randrange(4, VOCABULARY) for _ in range(dice.randint(1, 40))]
        self.turns.append((start, len(self.ids)))

    def undo(self, n: int) -> None:
        """Take the last n turns back."""
        for start, _ in reversed(self.turns[-n:]):
            del self.ids[start:]
        del self.turns[-n:]

    def retry(self) -> None:
        """Take the last reply back."""
        del self.ids[self.turns[-1][1] :]


def reply(talk: Talk, engine: Engine, dice: random.Random, attempt: int) -> list[float]:
    """Add a reply, whole or interrupted; the log-probabilities of its tokens, none of beams."""
    decoding: Decoding = dice.choice(
        (Greedy(), Sample(seed=1), Sample(seed=2, temperature=1.2, top_k=20), Beam(width=3))
    )
    is_search = isinstance(decoding, Beam)
    events = engine.generate(
        talk.ids, decoding, max_new_tokens=dice.randint(1, LONGEST_REPLY),
        logprobs=0 if is_search else 1, draft=0 if is_search else dice.choice((0, 0, 4)),
        turn=len(talk.turns), attempt=attempt,
    )  # fmt: skip
    patience = dice.choice((math.inf, math.inf, math.inf, dice.randint(1, 12)))
    tokens: list[Token] = []
    for n, event in enumerate(events):
        if isinstance(event, Token):
            tokens.append(event)
        if n >= patience:
            if dice.random() < 0.5:
                with suppress(KeyboardInterrupt):
                    events.throw(KeyboardInterrupt())
            events.close()
            break
    talk.ids += [token.id for token in tokens]
    return [it.probabilities.chosen.logprob for it in tokens if it.probabilities]


def difference(engine: Engine, ids: Sequence[int], found: Sequence[float]) -> float:
    """Mean distance of the log-probabilities of the last ids from those without a cache."""
    first = len(ids) - len(found)
    logits = engine.logits(ids)[first - 1 : -1]
    expected = logits.float().log_softmax(-1).cpu()[range(len(found)), list(ids[first:])]
    return float((torch.tensor(found) - expected).abs().mean())


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Of the host, and of the GPU as its driver counts it."""
    gc.collect()
    if device.type != "cuda":
        return resident_bytes(), 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return resident_bytes(), total - free


class Soak:
    """The models, the conversation over them, and what was found so far."""

    def __init__(self, kernels: Kernels, seed: int) -> None:
        self.failures: list[str] = []
        self._kernels = kernels
        self._dice, self._talk = random.Random(seed), Talk()
        self._engines = {form: engine_of(form, kernels) for form in FORMS}
        self._form = FORMS[0]
        self._differences: dict[str, list[float]] = {form: [] for form in FORMS}
        self._memory: list[tuple[int, int]] = []

    def turn(self, number: int) -> None:
        """One turn, and how far its probabilities are from those of a pass without a cache."""
        self._act()
        engine = self._engines[self._form]
        found = reply(self._talk, engine, self._dice, attempt=number)
        if found:
            off = difference(engine, self._talk.ids, found)
            self._differences[self._form].append(off)
            if not off < TOLERANCES[self._form] * (1 if len(found) >= FEW else 2):
                self.failures.append(f"turn {number}, {self._form}: off by {off:.3g}")
        if number % 50 == 49:
            self._memory.append(memory_bytes(self._kernels.device))

    @property
    def state(self) -> str:
        """Memory now, and how much went wrong so far."""
        host, gpu = (n / 2**20 for n in self._memory[-1])
        return f"host {host:.1f} MiB, GPU {gpu:.1f} MiB, {len(self.failures)} failures"

    def report(self) -> Iterator[str]:
        """What was measured; growth becomes a failure."""
        for form, values in self._differences.items():
            mean = statistics.fmean(values)
            yield f"{form}: {len(values)} replies, off by {mean:.2g}, at most {max(values):.2g}"
        settled = self._memory[int(SETTLED * len(self._memory))]
        for where, first, last in zip(("host", "GPU"), settled, self._memory[-1], strict=True):
            yield f"{where}: {first / 2**20:.1f} MiB at first, {last / 2**20:.1f} MiB at the end"
            if last - first > MOST_GROWTH_BYTES:
                self.failures.append(f"{where}: {(last - first) / 2**20:.1f} MiB more at the end")

    def _act(self) -> None:
        """What users do before a reply; there is a question then."""
        dice, talk = self._dice, self._talk
        action = dice.randrange(10)
        if action == 0:
            self._form = dice.choice(FORMS)
        elif action == 1 and dice.random() < 0.2:
            self._engines[self._form] = engine_of(self._form, self._kernels)
        elif action in (2, 3):
            talk.undo(dice.randint(1, 3))
        elif action in (4, 5) and talk.turns:
            talk.retry()
        if not talk.turns or len(talk.ids) > talk.turns[-1][1]:
            talk.ask(dice)


def main() -> None:
    """Run the turns that the command line asks for; exit 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    kernels = make(choose("auto", asked.device), 1, torch.float32)
    began = time.perf_counter()
    soak = Soak(kernels, asked.seed)
    for number in range(asked.turns):
        soak.turn(number)
        if number % 200 == 199:
            print(
                f"{number + 1} turns, {time.perf_counter() - began:.0f} s: {soak.state}", flush=True
            )
    print(f"{asked.turns} turns on {kernels.name} in {time.perf_counter() - began:.0f} s")
    print("\n".join(soak.report()))
    print("\n".join(soak.failures[:20]) or "nothing is wrong")
    sys.exit(bool(soak.failures))


if __name__ == "__main__":
    main()
