"""Which of the words hold that flags, variables and the config file say about decoding."""

from __future__ import annotations

from typing import Any

import pytest

from llamachat.chat.options import Options
from llamachat.chat.sources import saying, settle
from llamachat.engine.beam import Beam
from llamachat.engine.strategies import Greedy
from llamachat.errors import UsageError

MODEL = (("generation_config.json", {"temperature": 0.6, "top_k": 20}),)


def options(flags: dict[str, Any], variables: dict[str, Any], config: dict[str, Any]) -> Options:
    names = ("flag", "variable", "config.toml")
    sources = [
        {name: (value, origin) for name, value in words.items()}
        for origin, words in zip(names, (flags, variables, config), strict=True)
    ]
    settled = settle(sources)
    return Options(settled.said, (*settled.layers, *MODEL), settled.origins)


def test_each_value_is_that_of_the_strongest_and_tells_who_it_was() -> None:
    values = options(
        {"top_p": 0.1}, {"top_p": 0.2, "min_p": 0.2}, {"min_p": 0.3, "temperature": 0.3}
    ).values()
    assert {name: values[name] for name in ("top_p", "min_p", "temperature", "top_k")} == {
        "top_p": (0.1, "flag"),
        "min_p": (0.2, "variable"),
        "temperature": (0.3, "config.toml"),
        "top_k": (20, "generation_config.json"),
    }
    assert values["typical_p"] == (1.0, "built in")


def test_a_strategy_switches_off_the_filters_of_weaker_sources_but_not_their_penalties() -> None:
    values = options({"strategy": "top-p"}, {}, {"top_k": 5, "presence_penalty": 0.5}).values()
    assert values["top_k"] == (0, "strategy top-p")
    assert values["presence_penalty"] == (0.5, "config.toml")


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ({"temperature": 0.7}, {"strategy": "greedy"}),
        ({"top_k": 20}, {"strategy": "top-k:40"}),
        ({"top_p": 0.5}, {"temperature": 0.0}),
        ({"strategy": "greedy"}, {"top_p": 0.5}),
        ({"strategy": "greedy"}, {"strategy": "beam:4", "length_penalty": 2.0}),
    ],
)
def test_what_contradicts_a_stronger_source_yields(
    flags: dict[str, Any], config: dict[str, Any]
) -> None:
    found = options(flags, {}, config)
    values = found.values()
    for name, value in flags.items():
        if name in values:
            assert values[name] == (value, "flag")
    assert not found.beams()
    found.decoding()


def test_a_strategy_of_the_config_file_holds_where_nothing_contradicts_it() -> None:
    assert isinstance(options({"seed": 3}, {}, {"strategy": "greedy"}).decoding(), Greedy)


def test_settings_of_beams_wait_until_there_are_beams() -> None:
    config = {"length_penalty": 2.0}
    assert not options({}, {}, config).beams()
    found = options({"strategy": "beam:3"}, {}, config)
    assert found.beams()["length_penalty"] == (2.0, "config.toml")
    assert found.beams()["num_beams"] == (3, "flag")
    decoding = found.decoding()
    assert isinstance(decoding, Beam)
    assert (decoding.width, decoding.length_penalty) == (3, 2.0)


def test_a_seed_holds_beside_a_stronger_strategy() -> None:
    found = options({"strategy": "random"}, {}, {"seed": 7})
    assert (found.said.seed, found.origin("seed")) == (7, "config.toml")


def test_the_amount_of_a_strategy_is_said_by_who_named_the_strategy() -> None:
    assert options({"strategy": "top-k:7"}, {}, {}).values()["top_k"] == (7, "flag")


def test_what_is_said_later_is_said_by_you() -> None:
    found = options({"top_p": 0.1, "min_p": 0.2}, {}, {}).saying(top_p=0.3)
    assert found.values()["top_p"] == (0.3, "you")
    assert found.values()["min_p"] == (0.2, "flag")


def test_the_config_file_yields_to_what_is_said_now_and_holds_when_that_is_taken_back() -> None:
    found = options({"min_p": 0.2}, {}, {"temperature": 0.4, "top_k": 7})
    assert found.values()["top_k"] == (7, "config.toml")
    strict = saying(options({}, {}, {"temperature": 0.4, "top_k": 7}), strategy="greedy")
    assert isinstance(strict.decoding(), Greedy)
    again = saying(strict, strategy=None)
    assert again.values()["top_k"] == (7, "config.toml")
    assert again.values()["temperature"] == (0.4, "config.toml")
    taken = saying(saying(found, temperature=1.5), temperature=None)
    assert taken.values()["temperature"] == (0.4, "config.toml")


def test_a_flag_does_not_yield_to_what_is_said_now() -> None:
    changed = saying(options({"top_k": 7}, {}, {}), strategy="greedy")
    with pytest.raises(UsageError, match="--strategy greedy and --top-k 7"):
        changed.decoding()
