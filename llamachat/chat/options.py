"""Sampling options: what the user said, over what the model suggests, and where each came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llamachat.engine import parameters
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Penalties
from llamachat.engine.parameters import FILTERS, ORDERS, PARAMETERS, PENALTIES
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding
    from llamachat.tokenizer import Tokenizer

STRATEGIES = ("greedy", "random", "top-k", "top-p", "beam")
ALONE: Mapping[str, tuple[str, float]] = {"top-k": ("top_k", 40), "top-p": ("top_p", 0.9)}
BEAMS: Mapping[str, float | str] = {
    "num_beams": 4,
    "length_penalty": 1.0,
    "early_stopping": "false",
    "beam_groups": 1,
    "diversity_penalty": 0.0,
}
_DEFAULTS = {f.name: f.default for f in fields(Sample)}
BUILT_IN: Mapping[str, Any] = {
    name: _DEFAULTS[name] for name in (*FILTERS, "samplers", *PENALTIES, "bad_words", "logit_bias")
}
FLAGS = {"bad_words": "--bad-word"}  # where they are not named as the setting


@dataclass(frozen=True, slots=True)
class Said:
    """What the user named; None where nothing was said."""

    strategy: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    samplers: tuple[str, ...] | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: tuple[str, ...] | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    seed: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: str | None = None
    beam_groups: int | None = None
    diversity_penalty: float | None = None

    def beams(self) -> dict[str, float | str]:
        """What was said of beams, by name."""
        values = {name: getattr(self, name) for name in BEAMS}
        return {name: value for name, value in values.items() if value is not None}

    def named(self) -> dict[str, Any]:
        """The values that were said, by name, strategy and seed aside."""
        values = {name: getattr(self, name) for name in BUILT_IN}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling settings in layers.

    Attributes:
        said: the user's own words.
        layers: (origin, values) below it, the strongest first: config file, model, catalog.
        origins: who said what the user said, by name, where that was not the user just now.
    """

    said: Said
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, tuple[Any, str]]:
        """Every value and its origin, the strategy applied.

        Raises:
            UsageError: what was said contradicts itself; both are named.
        """
        strategy, amount = self._strategy()
        named = self.said.named()
        if amount is not None and strategy != "beam":
            filter_name = ALONE[strategy or ""][0]
            if filter_name in named and named[filter_name] != amount:
                raise _contradiction(f"--strategy {strategy}:{amount:g}", filter_name, named)
            named[filter_name] = amount
        _check(strategy, named)
        values = {name: self._layered(name, named) for name in BUILT_IN}
        decided: dict[str, Any] = {}
        if strategy is not None:
            decided = {name: FILTERS[name].off for name in FILTERS if name != "temperature"}
            decided |= dict([ALONE[strategy]]) if strategy in ALONE else {}
            draws = _asks_for_draws(named) if strategy == "beam" else strategy != "greedy"
            decided |= {} if draws else {"temperature": 0.0}
        values |= _by(f"strategy {strategy}", decided, named)
        order = values["samplers"][0]
        absent = {name: FILTERS[name].off for name in FILTERS if name not in order}
        values |= _by("samplers", absent, named)
        if values["temperature"][0] == 0 and "temperature" not in {*named, *decided}:
            # The model would rather not draw, but the user asks for it.
            if strategy is not None:
                values["temperature"] = (1.0, f"strategy {strategy}")
            elif _asks_for_draws(named):
                values["temperature"] = (1.0, "filters that you named")
        return values

    def beams(self) -> dict[str, tuple[float | str, str]]:
        """Every value of beam search and its origin; nothing where there are no beams.

        Raises:
            UsageError: what was said contradicts itself; both are named.
        """
        strategy, amount = self._strategy()
        said = self.said.beams()
        if strategy != "beam":
            for name, value in said.items():
                if strategy is None and name != "num_beams":
                    raise UsageError(
                        f"{_flag(name, said)} is nothing without beams",
                        hint="add --strategy beam",
                    )
                if (name, value) != ("num_beams", 1):
                    raise _contradiction(f"--strategy {strategy}", name, said)
            return {}
        if amount is not None and said.setdefault("num_beams", amount) != amount:
            raise _contradiction(f"--strategy beam:{amount:g}", "num_beams", said)
        values: dict[str, tuple[float | str, str]] = {
            name: (value, "strategy beam") for name, value in BEAMS.items()
        }
        if "beam_groups" in said and "diversity_penalty" not in said:
            values["diversity_penalty"] = (1.0, "beam groups")
        for origin, layer in reversed(self.layers):
            values |= {name: (layer[name], origin) for name in BEAMS if name in layer}
        return values | {name: (value, self.origin(name)) for name, value in said.items()}

    def origin(self, name: str) -> str:
        """Who said what was said of this, if only as the amount of a strategy."""
        if name in (*FILTERS, "num_beams") and getattr(self.said, name) is None:
            name = "strategy"
        return self.origins.get(name, "you")

    def decoding(self, tokenizer: Tokenizer | None = None) -> Decoding:
        """The frozen options that the engine takes.

        Args:
            tokenizer: makes ids of bad words; without one, they are left out.

        Raises:
            UsageError: a contradiction, or a value out of its range.
        """
        values = {name: value for name, (value, _) in self.values().items()}
        values["bad_words"] = _word_ids(values["bad_words"], tokenizer)
        if tokenizer is not None:
            _check_bias(values["logit_bias"], tokenizer)
        penalties = {f.name: values.pop(f.name) for f in fields(Penalties)}
        sample = Sample(**values, seed=self.said.seed)
        drawn = sample if sample.temperature > 0 else None
        if beams := {name: value for name, (value, _) in self.beams().items()}:
            return _beam(beams, drawn, penalties)
        return replace(drawn, **penalties) if drawn else Greedy(**penalties)

    def _strategy(self) -> tuple[str | None, float | None]:
        """The strategy and its amount; to name several beams is to name theirs."""
        strategy, amount = _parse(self.said.strategy)
        if strategy is None and (self.said.num_beams or 1) > 1:
            return "beam", None
        return strategy, amount

    def saying(self, **changes: object) -> Options:
        """The same with some of the user's words changed; None takes a word back."""
        said = replace(self.said, **changes)  # type: ignore[arg-type]  # callers parse them
        return replace(self.by_you(*changes), said=said)

    def by_you(self, *names: str) -> Options:
        """The same, but that these were said just now."""
        kept = {name: origin for name, origin in self.origins.items() if name not in names}
        return replace(self, origins=kept)

    def _layered(self, name: str, named: Mapping[str, Any]) -> tuple[Any, str]:
        if name in named:
            return named[name], self.origin(name)
        for origin, values in self.layers:
            if name in values:
                return values[name], origin
        return BUILT_IN[name], "built in"


def parse_samplers(text: str) -> tuple[str, ...]:
    """ "top_k;temperature", or the name of a whole order. Penalties always come first.

    Raises:
        UsageError: a name is unknown, or named twice.
    """
    if text in ORDERS:
        return ORDERS[text]
    names = [name.strip().replace("-", "_") for name in text.split(";") if name.strip()]
    samplers = tuple(names[1:] if names[:1] == ["penalties"] else names)
    parameters.check_order(samplers)
    return samplers


def parse_bias(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """ "17=-2.5" -> (17, -2.5), each of several.

    Raises:
        UsageError: one is not understood.
    """
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise UsageError(f"logit bias {text!r} is not understood", hint="write ID=X") from None
    return tuple(pairs)


PARSERS: Mapping[str, Callable[[str], Any]] = {  # what `Said` holds, from text
    "strategy": str,
    **{name: parameter.kind for name, parameter in PARAMETERS.items()},
    "samplers": parse_samplers,
    "bad_words": lambda text: tuple(text.split(";")),
    "logit_bias": lambda text: parse_bias(text.split(";")),
    **{name: type(value) for name, value in BEAMS.items()},
    "seed": int,
}


def parse_value(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    """A value as text, made what it is.

    Raises:
        UsageError: it is not that; the message begins with `name`.
    """
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name}: found {text!r}, expected {expected}") from None


def shown(value: Any) -> str:
    """A value as people read it, and as `/set` would take it."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        for name, order in ORDERS.items():
            if value == order:
                return name
        items = ("=".join(map(shown, i)) if isinstance(i, tuple) else str(i) for i in value)
        return ";".join(items) or "none"
    return f"{value:g}"


def _parse(strategy: str | None) -> tuple[str | None, float | None]:
    """ "top-k:40" -> ("top-k", 40)."""
    if strategy is None:
        return None, None
    name, colon, amount = strategy.partition(":")
    if name not in STRATEGIES:
        raise UsageError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}")
    if not colon:
        return name, None
    try:
        if name not in (*ALONE, "beam"):
            raise ValueError(name)
        return name, float(amount) if name == "top-p" else int(amount)
    except ValueError:
        raise UsageError(
            f"strategy {strategy!r} is not understood", hint="write top-k:40, top-p:0.9 or beam:4"
        ) from None


def _check(strategy: str | None, named: Mapping[str, Any]) -> None:
    """Refuse what would have to be ignored, and what would undo the strategy."""
    if strategy not in (None, "beam"):
        asked, greedy = f"--strategy {strategy}", strategy == "greedy"
        undone = "temperature" in named and (named["temperature"] == 0) is not greedy
        if undone:
            raise _contradiction(asked, "temperature", named)
        if strategy in ALONE and named.get(on := ALONE[strategy][0]) == FILTERS[on].off:
            raise _contradiction(asked, on, named)
    else:
        asked, greedy = "--temperature 0", named.get("temperature") == 0
    if greedy and "samplers" in named:
        raise _contradiction(asked, "samplers", named)
    for name in FILTERS:
        if name != "temperature" and _is_on(name, named) and (greedy or strategy == "random"):
            raise _contradiction(asked, name, named)
    _check_order(strategy, named)


def _check_order(strategy: str | None, named: Mapping[str, Any]) -> None:
    """Refuse filters that were named, but are not among the samplers that were."""
    order = named.get("samplers")
    if order is None:
        return
    for name in FILTERS:
        if name not in order and _is_on(name, named):
            raise _contradiction(f"--samplers {shown(order)}", name, named)
    if strategy is not None and strategy in ALONE and ALONE[strategy][0] not in order:
        raise _contradiction(f"--strategy {strategy}", "samplers", named)


def _is_on(name: str, named: Mapping[str, Any]) -> bool:
    """Whether a filter was named, and not with the value that switches it off."""
    return bool(name in named and named[name] != FILTERS[name].off)


def _asks_for_draws(named: Mapping[str, Any]) -> bool:
    """Whether something was named that only draws need."""
    filtered = any(_is_on(name, named) for name in FILTERS if name != "temperature")
    return filtered or "samplers" in named or bool(named.get("temperature"))


def _by(
    origin: str, decided: Mapping[str, Any], named: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """What `origin` decides, but for what was named."""
    return {name: (value, origin) for name, value in decided.items() if name not in named}


def _beam(
    values: Mapping[str, float | str], sampling: Sample | None, penalties: Mapping[str, Any]
) -> Beam:
    """Beam search from the values of its flags."""
    stopping = {"true": True, "false": False, "never": "never"}
    said = str(values["early_stopping"])
    if said not in stopping:
        raise UsageError(f"early_stopping is {said}, expected true, false or never")
    return Beam(
        width=int(values["num_beams"]),
        length_penalty=float(values["length_penalty"]),
        early_stopping=stopping[said],  # type: ignore[arg-type]  # a table of just these
        groups=int(values["beam_groups"]),
        diversity_penalty=float(values["diversity_penalty"]),
        sampling=sampling,
        **penalties,
    )


def _contradiction(asked: str, name: str, named: Mapping[str, Any]) -> UsageError:
    return UsageError(
        f"{asked} and {_flag(name, named)} contradict each other",
        hint="leave one of them out",
    )


def _flag(name: str, named: Mapping[str, Any]) -> str:
    """A flag as it would be typed."""
    return f"{FLAGS.get(name, '--' + name.replace('_', '-'))} {shown(named[name])}"


def _word_ids(
    words: Sequence[str | Sequence[int]], tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], ...]:
    """The ids of bad words: a text's with and without a space; a model names ids itself."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not isinstance(word, str):
            found[tuple(word)] = None
        elif not word.strip():
            raise UsageError("a bad word is empty")
        elif tokenizer is not None:
            found |= dict.fromkeys(filter(None, _spellings(word.strip(), tokenizer)))
    return tuple(found)


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    if not tokenizer.space_prefix:
        return [tuple(tokenizer.encode(f"{space}{word}")) for space in ("", " ")]
    # The dummy space makes the first spelling; after a line break there is none.
    line_break = tokenizer.encode("\n")
    bare = tokenizer.encode(f"\n{word}")[len(line_break) :]
    return [tuple(bare), tuple(tokenizer.encode(word))]


def _check_bias(bias: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> None:
    for token, _ in bias:
        if token >= tokenizer.vocab_size:
            raise UsageError(
                f"logit bias of id {token}: the model has ids 0 to {tokenizer.vocab_size - 1}",
                hint="llamachat tokenize tells the ids of a text",
            )
