"""Words about decoding from several sources: which of them hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from llamachat.chat.options import BEAMS, BUILT_IN, Options, Said
from llamachat.errors import UsageError

BEAMS_ALONE = tuple(name for name in BEAMS if name != "num_beams")  # nothing without a beam
Source: TypeAlias = Mapping[str, tuple[Any, str]]  # what one says: values and their origin, by name


@dataclass(frozen=True, slots=True)
class Settled:
    """What holds of the words of several sources.

    Attributes:
        said: as if the user had just said it.
        layers: (origin, values) of what is below it, the strongest first.
        origins: of what was said, by name.
    """

    said: Said
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)


def settle(sources: Sequence[Source]) -> Settled:
    """Join what is said, the strongest source first.

    A source that contradicts a stronger one yields: its strategy is not heard, and its numbers
    hold where the strategy leaves them. So does one below a source that names a strategy, for that
    switches off every filter that was not named with it.

    Raises:
        UsageError: the strongest source contradicts itself.
    """
    strongest, *weaker = sources
    said = dict(strongest)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    for source in weaker:
        known = {name: it for name, it in source.items() if name not in BEAMS_ALONE}
        joined = {**known, **said}
        if "strategy" not in said and _is_consistent(joined):
            said = joined
        elif "seed" in source:
            said.setdefault("seed", source["seed"])
        layers += [
            (origin, {name: value})
            for name, (value, origin) in source.items()
            if name in (*BUILT_IN, *BEAMS)
        ]
    return Settled(
        Said(**{name: value for name, (value, _) in said.items()}),
        tuple(layers),
        {name: origin for name, (_, origin) in said.items()},
    )


def saying(options: Options, **changes: object) -> Options:
    """The options with some of the user's words changed just now; None takes a word back.

    Variables and the config file yield to what they contradict; what was said in flags does not.
    """
    changed = options.saying(**changes)
    if _are_consistent(changed):
        return changed
    weaker = [name for name, origin in changed.origins.items() if origin != "flag"]
    kept = [field.name for field in fields(Said) if field.name not in weaker]
    said = Said(**{name: getattr(changed.said, name) for name in kept})
    return replace(changed.by_you(*weaker), said=said)


def _is_consistent(words: Source) -> bool:
    return _are_consistent(Options(Said(**{name: value for name, (value, _) in words.items()})))


def _are_consistent(options: Options) -> bool:
    try:
        options.decoding()
    except UsageError:
        return False
    return True
