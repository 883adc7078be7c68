"""Sampling options: what the user said, over what the model suggests, and where each came from."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from llamachat.errors import UsageError

if TYPE_CHECKING:
    from llamachat.engine.decoding import Decoding

STRATEGIES = ("greedy", "random", "top-k", "top-p")
FILTERS_OFF: Mapping[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
ALONE: Mapping[str, tuple[str, float]] = {"top-k": ("top_k", 40), "top-p": ("top_p", 0.9)}
BUILT_IN: Mapping[str, float] = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.0}
OFF: Mapping[str, float] = {"temperature": 0, **FILTERS_OFF}  # temperature 0: nothing is drawn
# What must be off under each strategy, and what must not.
OFF_AND_ON: Mapping[str, tuple[Set[str], Set[str]]] = {
    "greedy": (OFF.keys(), set()),
    "random": (FILTERS_OFF.keys(), {"temperature"}),
    "top-k": (set(), {"temperature", "top_k"}),
    "top-p": (set(), {"temperature", "top_p"}),
}


@dataclass(frozen=True, slots=True)
class Said:
    """What the user named; None where nothing was said."""

    strategy: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def named(self) -> dict[str, float]:
        """The numbers that were said, by name, the seed aside."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if k in BUILT_IN and v is not None}


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling settings in layers.

    Attributes:
        said: the user's own words.
        layers: (origin, values) below it, the strongest first: config file, model, catalog.
    """

    said: Said
    layers: tuple[tuple[str, Mapping[str, float]], ...] = ()

    def values(self) -> dict[str, tuple[float, str]]:
        """Every value and its origin, the strategy applied.

        Raises:
            UsageError: what was said contradicts itself; both are named.
        """
        strategy, amount = _parse(self.said.strategy)
        named = self.said.named()
        if amount is not None:
            filter_name = ALONE[strategy or ""][0]
            if filter_name in named and named[filter_name] != amount:
                raise _contradiction(f"{strategy}:{amount:g}", filter_name, named[filter_name])
            named[filter_name] = amount
        if strategy is not None:
            _check(strategy, named)
        values = {name: self._layered(name, named) for name in BUILT_IN}
        if strategy is not None:
            off = {name: value for name, value in FILTERS_OFF.items() if name not in named}
            values |= {name: (value, f"strategy {strategy}") for name, value in off.items()}
            if strategy in ALONE and ALONE[strategy][0] not in named:
                name, value = ALONE[strategy]
                values[name] = (value, f"strategy {strategy}")
        if strategy == "greedy":
            values["temperature"] = (0.0, "strategy greedy")
        elif values["temperature"][0] == 0 and "temperature" not in named:
            # The model would rather not draw, but the user asks for it.
            if strategy is not None:
                values["temperature"] = (1.0, f"strategy {strategy}")
            elif any(named[name] != FILTERS_OFF[name] for name in named):
                values["temperature"] = (1.0, "filters that you named")
        return values

    def decoding(self) -> Decoding:
        """The frozen options that the engine takes.

        Raises:
            UsageError: a contradiction, or a value out of its range.
        """
        from llamachat.engine.strategies import Greedy, Sample

        values = {name: value for name, (value, _) in self.values().items()}
        sample = Sample(
            temperature=values["temperature"],
            top_k=int(values["top_k"]),
            top_p=values["top_p"],
            min_p=values["min_p"],
            seed=self.said.seed,
        )
        return sample if sample.temperature > 0 else Greedy()

    def saying(self, **changes: object) -> Options:
        """The same with some of the user's words changed; None takes a word back."""
        said = replace(self.said, **changes)  # type: ignore[arg-type]  # callers parse them
        return replace(self, said=said)

    def _layered(self, name: str, named: Mapping[str, float]) -> tuple[float, str]:
        if name in named:
            return named[name], "you"
        for origin, values in self.layers:
            if name in values:
                return values[name], origin
        return BUILT_IN[name], "built in"


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
        if name not in ALONE:
            raise ValueError(name)
        return name, int(amount) if name == "top-k" else float(amount)
    except ValueError:
        raise UsageError(
            f"strategy {strategy!r} is not understood", hint="write top-k:40 or top-p:0.9"
        ) from None


def _check(strategy: str, named: Mapping[str, float]) -> None:
    """Refuse what the strategy would have to ignore, and what would undo it."""
    off, on = OFF_AND_ON[strategy]
    for name, value in named.items():
        if name in (on if value == OFF[name] else off):
            raise _contradiction(strategy, name, value)


def _contradiction(strategy: str, name: str, value: float) -> UsageError:
    flag = "--" + name.replace("_", "-")
    return UsageError(
        f"--strategy {strategy} and {flag} {value:g} contradict each other",
        hint="leave one of them out",
    )
