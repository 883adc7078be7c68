"""What servers of the OpenAI protocol take beyond it, and our ways to decode in their words.

Sources: vLLM, vllm/entrypoints/openai/protocol.py; SGLang, python/sglang/srt/entrypoints/openai/
protocol.py; llama.cpp, tools/server/README.md; text-generation-inference, router/src/lib.rs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llamachat.chat.options import FLAGS
from llamachat.engine.beam import Beam
from llamachat.engine.parameters import ORDERS, PARAMETERS
from llamachat.engine.strategies import Greedy
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding

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
        owner: what `owned_by` of its /v1/models begins with.
        takes: by our name of a value, the field of the request.
        off: the value of such a field that switches it off, where that is not ours; None: leave
            the field out.
        samplers: how an order of filters is written; None: the server has one of its own.
        beams: whether it searches with beams.
        goes_on: fields that let it go on with a last message of the assistant; None: it cannot.
        ignores_ends: whether it can be told to go on where the model would stop.
    """

    name: str
    owner: str = ""
    takes: Mapping[str, str] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    samplers: Literal["list", "text"] | None = None
    beams: bool = False
    goes_on: Mapping[str, Any] | None = None
    ignores_ends: bool = False

    def fields(self, decoding: Decoding) -> dict[str, Any]:
        """The fields of a request that decodes so; all that it means is said.

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
            elif name in STANDARD or name in self.takes:
                said = self.off.get(name, value) if is_off else value
                if said is not None and (not is_off or STANDARD.get(name, True)):
                    found[self.takes.get(name, name)] = said
            elif not is_off:
                raise self.refusal(FLAGS.get(name, f"--{name.replace('_', '-')}"))
        if "logit_bias" in found:
            found["logit_bias"] = {str(token): bias for token, bias in found["logit_bias"]}
        return found

    def refusal(self, flag: str) -> UsageError:
        """That the server does not take what a flag asks for."""
        return UsageError(f"{flag}: {self.name} does not take it", hint="leave it out")

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
            return {"samplers": ["penalties", *known]}
        if not is_default:
            raise self.refusal("--samplers")
        return {}


_LLAMA_CPP = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_LLAMA_CPP_SAMPLERS = {"typical_p": "typ_p"}
_VLLM = {name: name for name in ("top_k", "min_p", "repetition_penalty")}
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
UNKNOWN = Dialect("this server")
DIALECTS = (
    Dialect("vLLM", "vllm", _VLLM, {"top_k": -1}, goes_on=_CONTINUE, ignores_ends=True),
    Dialect(
        "SGLang", "sglang", _VLLM, {"top_k": -1}, goes_on={"continue_final_message": True},
        ignores_ends=True,
    ),
    Dialect(
        "llama.cpp", "llamacpp",
        {**{name: name for name in _LLAMA_CPP}, "repetition_penalty": "repeat_penalty"},
        samplers="list", goes_on={}, ignores_ends=True,
    ),
    Dialect(
        "llamachat serve", "llamachat",
        {name: name for name in PARAMETERS}, samplers="text", beams=True,
    ),
)  # fmt: skip
TGI = Dialect("text-generation-inference", off={"top_p": None})


def dialect_of(owner: str) -> Dialect:
    """That of a server, by the owner that it says its models have."""
    return next((it for it in DIALECTS if owner.startswith(it.owner)), UNKNOWN)
