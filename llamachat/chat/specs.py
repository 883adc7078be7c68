"""Specs: how one of several replies is chosen, in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llamachat.chat.options import BUILT_IN, PARSERS, STRATEGIES, Options, Said, parse_value
from llamachat.engine.parameters import FILTERS
from llamachat.errors import UsageError
from llamachat.quant.form import FORM_NAMES

DEFAULT = "default"  # nothing is said: as the model suggests, or as the conversation decodes
DEFAULTS = ("greedy", DEFAULT)
FORMS = ("none", *FORM_NAMES)
_KEPT = ("seed", *(name for name in BUILT_IN if name not in (*FILTERS, "samplers")))


@dataclass(frozen=True, slots=True)
class Spec:
    """One way to answer.

    Attributes:
        text: as it was written.
        said: values by name, as `Said` has them.
        quantize: another form of the model's weights; None: as it is.
    """

    text: str
    said: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def options(self, base: Options) -> Options:
        """Those of `base` with what the spec says.

        One that names a strategy keeps of the user's other words penalties and the seed alone.
        """
        said = base.said
        if "strategy" in self.said:
            said = Said(**{name: getattr(said, name) for name in _KEPT})
        return replace(base, said=replace(said, **self.said))


def parse_spec(text: str) -> Spec:
    """ "top-p:0.9,temperature=1.2,seed=7" -> what it says.

    Raises:
        UsageError: a word is not understood, or two contradict each other; the spec is named.
    """
    said: dict[str, Any] = {}
    first, *rest = text.split(",")
    if first.partition(":")[0] in STRATEGIES:
        said["strategy"] = first
    elif first != DEFAULT:
        rest = [first, *rest]
    try:
        for word in rest:
            key, equals, value = word.partition("=")
            name = key.strip().replace("-", "_")
            if name in said:
                raise UsageError(f"{key} is said twice")
            if not equals or name not in (*PARSERS, "quantize"):
                raise UsageError(f"{word!r} is not understood", hint=_known())
            said[name] = parse_value(key, value, PARSERS.get(name, str))
        quantize = said.pop("quantize", None)
        if quantize is not None and quantize not in FORMS:
            raise UsageError(f"quantize is {quantize!r}, expected one of {', '.join(FORMS)}")
        Options(Said(**said)).decoding()
    except UsageError as error:
        raise UsageError(f"{text or 'an empty spec'}: {error.message}", hint=error.hint) from None
    return Spec(text, said, quantize)


def _known() -> str:
    return "write such as greedy, beam:4 or top-p:0.9,temperature=1.2,seed=7,quantize=int4"
