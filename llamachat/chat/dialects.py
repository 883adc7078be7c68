"""What servers of the OpenAI protocol take beyond it, and our ways to decode in their words.

None but ours refuses a field that it does not know. Sources: vLLM, vllm/entrypoints/openai/
chat_completion/protocol.py (002032e); SGLang, python/sglang/srt/entrypoints/openai/protocol.py
(004c82e); llama.cpp, tools/server/server-schema.cpp and server-common.cpp (in llama-cpp-python
0.3.36), which clamps and wraps numbers without a word; text-generation-inference,
router/src/lib.rs (`ChatRequest`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llamachat.chat.context import UNBOUNDED
from llamachat.chat.options import FLAGS
from llamachat.engine.beam import Beam
from llamachat.engine.parameters import ORDERS, PARAMETERS
from llamachat.engine.strategies import Greedy
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding

MOST_LOOK_BACK = 1 << 17  # tokens; llama.cpp takes memory for as many as it is told
# What every server takes, and whether it is said where it changes nothing: its default may differ.
STANDARD: Mapping[str, bool] = {
    "temperature": True, "top_p": True,
    "frequency_penalty": False, "presence_penalty": False, "logit_bias": False,
}  # fmt: skip
_EMPTY = {"bad_words": (), "logit_bias": (), "samplers": ORDERS["hf"]}
_OFF: Mapping[str, Any] = {**{name: it.off for name, it in PARAMETERS.items()}, **_EMPTY}
_BEAMS = {"width": "num_beams", "groups": "beam_groups"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a kind of server takes.

    Attributes:
        name: for people.
        owner: what `owned_by` of its /v1/models says.
        takes: by our name of a value, the field of the request.
        lacks: what it ignores of `STANDARD`, or takes as something else.
        off: the value of such a field that switches it off, where that is not ours; None: leave
            the field out.
        samplers: how an order of filters is written; None: the server has one of its own.
        beams: whether it searches with beams.
        goes_on: fields that let it go on with a last message of the assistant; None: it cannot.
        ignores_ends: whether it can be told to go on where the model would stop.
        looks_back: the field for how many tokens a repetition penalty looks at; None: at all.
        most_seed: the largest that it tells from others.
        most_bias: the largest of a logit that it does not make smaller.
    """

    name: str
    owner: str = ""
    takes: Mapping[str, str] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    off: Mapping[str, Any] = field(default_factory=dict)
    samplers: Literal["list", "text"] | None = None
    beams: bool = False
    goes_on: Mapping[str, Any] | None = None
    ignores_ends: bool = False
    looks_back: str | None = None
    most_seed: int = (1 << 63) - 1
    most_bias: float = math.inf

    def fields(self, decoding: Decoding, ctx_size: int = UNBOUNDED) -> dict[str, Any]:
        """The fields of a request that decodes so; all that it means is said, but the seed.

        Raises:
            UsageError: the server does not take some of it; the flag is named.
        """
        values = asdict(decoding)
        values.pop("seed", None)
        if isinstance(decoding, Beam):
            return self._beams(values)
        if isinstance(decoding, Greedy):
            values["temperature"] = 0.0
        found: dict[str, Any] = {}
        for name, value in values.items():
            is_off = value == _OFF[name]
            if name == "samplers":
                found |= self._order(value, is_default=is_off)
            elif name in self.takes or (name in STANDARD and name not in self.lacks):
                said = self.off.get(name, value) if is_off else value
                if said is not None and (not is_off or STANDARD.get(name, True)):
                    found[self.takes.get(name, name)] = said
            elif not is_off:
                raise self.refusal(FLAGS.get(name, f"--{name.replace('_', '-')}"))
        if "logit_bias" in found:
            found["logit_bias"] = dict(map(self._bias, found["logit_bias"]))
        if self.looks_back and values["repetition_penalty"] != 1:
            found[self.looks_back] = min(ctx_size, MOST_LOOK_BACK)
        return found

    def seed(self, seed: int) -> int:
        """The seed.

        Raises:
            UsageError: the server would take it for another one.
        """
        if seed > self.most_seed:
            raise UsageError(f"--seed {seed}: {self.name} takes none above {self.most_seed}")
        return seed

    def refusal(self, flag: str) -> UsageError:
        """That the server does not take what a flag asks for."""
        return UsageError(f"{flag}: {self.name} does not take it", hint="leave it out")

    def _bias(self, pair: tuple[int, float]) -> tuple[str, float]:
        token, bias = pair
        if abs(bias) > self.most_bias:
            most = f"{self.name} takes -{self.most_bias:g} to {self.most_bias:g}"
            raise UsageError(f"--logit-bias {token}={bias:g}: {most}")
        return str(token), bias

    def _beams(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.beams:
            raise UsageError(
                f"--strategy beam (--num-beams): {self.name} does not search with beams",
                hint="greedy, random, top-k and top-p are what it can be asked for",
            )
        values = {_BEAMS.get(name, name): it for name, it in values.items() if it is not None}
        if values.pop("sampling", None) is not None:
            raise self.refusal("--strategy beam with filters")
        values.pop("samplers", None)
        kept = {name: it for name, it in values.items() if it != _OFF.get(name, ...)}
        if "bad_words" in kept:
            raise self.refusal("--bad-word")
        return kept

    def _order(self, order: tuple[str, ...], *, is_default: bool) -> dict[str, Any]:
        """The order of filters, as far as the server has them."""
        if self.samplers == "text":
            return {"samplers": ";".join(order)}
        if self.samplers == "list":
            known = (_LLAMA_CPP_SAMPLERS.get(name, name) for name in order if name in _LLAMA_CPP)
            # Mirostat, which the server may be told to use, would leave the rest out.
            return {"samplers": ["penalties", *known], "mirostat": 0, "dynatemp_range": 0.0}
        if not is_default:
            raise self.refusal("--samplers")
        return {}


_LLAMA_CPP = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_LLAMA_CPP_SAMPLERS = {"typical_p": "typ_p"}
_VLLM = {name: name for name in ("top_k", "min_p", "repetition_penalty")}
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
UNKNOWN = Dialect("this server")
DIALECTS = (
    Dialect(
        "vLLM", "vllm", _VLLM, off={"top_k": -1}, goes_on=_CONTINUE, ignores_ends=True,
        most_bias=100,
    ),
    Dialect(
        "SGLang", "sglang", _VLLM, off={"top_k": -1}, ignores_ends=True,
        goes_on={"continue_final_message": True},
    ),
    Dialect(
        "llama.cpp", "llamacpp",
        {**{name: name for name in _LLAMA_CPP}, "repetition_penalty": "repeat_penalty"},
        samplers="list", goes_on=_CONTINUE, ignores_ends=True, looks_back="repeat_last_n",
        most_seed=(1 << 32) - 2,  # of 32 bits; the last stands for any
    ),
    Dialect(
        "llamachat serve", "llamachat",
        {name: name for name in PARAMETERS}, samplers="text", beams=True,
    ),
)  # fmt: skip
# It makes a repetition penalty of `presence_penalty`; its top-p is below 1.
TGI = Dialect(
    "text-generation-inference", lacks=frozenset({"logit_bias", "presence_penalty"}),
    off={"top_p": None},
)  # fmt: skip


def dialect_of(owner: str) -> Dialect:
    """That of a server, by the owner that it says its models have."""
    return next((it for it in DIALECTS if owner == it.owner), UNKNOWN)
