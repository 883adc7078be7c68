"""Sampling options: who decides what, and what contradicts what."""

from __future__ import annotations

from typing import Any

import pytest

from llamachat.chat.options import BUILT_IN, Options, Said
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

CONFIG = ("config file", {"temperature": 0.4})
MODEL = ("generation_config.json", {"temperature": 0.6, "top_k": 20, "min_p": 0.05})
CATALOG = ("catalog", {"temperature": 0.2, "top_p": 0.8})
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def said(**words: Any) -> Options:
    return Options(Said(**words), (CONFIG, MODEL, CATALOG))


def plain(options: Options) -> dict[str, float]:
    return {name: value for name, (value, _) in options.values().items()}


def test_each_value_comes_from_the_strongest_who_has_one() -> None:
    assert said(min_p=0.1).values() == {
        "temperature": (0.4, "config file"),
        "top_k": (20, "generation_config.json"),
        "top_p": (0.8, "catalog"),
        "min_p": (0.1, "you"),
    }


def test_without_any_layer_the_built_in_values_hold() -> None:
    values = Options(Said()).values()
    assert values == {name: (value, "built in") for name, value in BUILT_IN.items()}
    assert (BUILT_IN["temperature"], BUILT_IN["top_p"]) == (0.7, 0.9)


def test_a_value_of_zero_is_a_word_too() -> None:
    assert said(top_k=0).values()["top_k"] == (0, "you")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("greedy", {**OFF, "temperature": 0}),
        ("random", {**OFF, "temperature": 0.4}),
        ("top-k", {**OFF, "temperature": 0.4, "top_k": 40}),
        ("top-p", {**OFF, "temperature": 0.4, "top_p": 0.9}),
        ("top-k:7", {**OFF, "temperature": 0.4, "top_k": 7}),
        ("top-p:0.35", {**OFF, "temperature": 0.4, "top_p": 0.35}),
    ],
)
def test_naming_a_strategy_switches_off_every_filter_that_was_not_named(
    strategy: str, expected: dict[str, float]
) -> None:
    assert plain(said(strategy=strategy)) == expected


def test_filters_that_were_named_stay_beside_the_strategy() -> None:
    found = plain(said(strategy="top-k", top_p=0.5, temperature=1.5))
    assert found == {"temperature": 1.5, "top_k": 40, "top_p": 0.5, "min_p": 0}


def test_a_flag_may_give_the_amount_of_the_strategy() -> None:
    assert plain(said(strategy="top-k", top_k=5))["top_k"] == 5
    assert plain(said(strategy="top-k:5", top_k=5))["top_k"] == 5


def test_what_a_strategy_decides_is_said_to_be_its_own() -> None:
    values = said(strategy="top-p").values()
    assert values["top_p"] == (0.9, "strategy top-p")
    assert values["top_k"] == (0, "strategy top-p")
    assert values["temperature"] == (0.4, "config file")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"strategy": "greedy", "temperature": 0.5}, "--temperature 0.5"),
        ({"strategy": "greedy", "top_k": 5}, "--top-k 5"),
        ({"strategy": "greedy", "top_p": 0.5}, "--top-p 0.5"),
        ({"strategy": "greedy", "min_p": 0.1}, "--min-p 0.1"),
        ({"strategy": "random", "top_k": 5}, "--top-k 5"),
        ({"strategy": "random", "top_p": 0.5}, "--top-p 0.5"),
        ({"strategy": "random", "min_p": 0.1}, "--min-p 0.1"),
        ({"strategy": "random", "temperature": 0}, "--temperature 0"),
        ({"strategy": "top-k", "temperature": 0}, "--temperature 0"),
        ({"strategy": "top-k", "top_k": 0}, "--top-k 0"),
        ({"strategy": "top-p", "temperature": 0}, "--temperature 0"),
        ({"strategy": "top-p", "top_p": 1.0}, "--top-p 1"),
        ({"strategy": "top-k:5", "top_k": 6}, "--top-k 6"),
        ({"strategy": "top-p:0.5", "top_p": 0.6}, "--top-p 0.6"),
    ],
    ids=str,
)
def test_a_contradiction_names_both_sides(words: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(Said(**words)).decoding()
    assert f"--strategy {words['strategy']} and {named} contradict" in caught.value.message


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_a_filter_that_is_named_off_contradicts_nothing(strategy: str) -> None:
    named = said(strategy=strategy, top_k=0, top_p=1.0, min_p=0.0)
    assert plain(named) == plain(said(strategy=strategy))


@pytest.mark.parametrize(
    "strategy", ["beam", "", "top-k:", "top-k:x", "top-k:1.5", "top-p:a", "greedy:1", "TOP-K"]
)
def test_a_strategy_that_is_not_understood_is_refused(strategy: str) -> None:
    with pytest.raises(UsageError, match="strategy"):
        said(strategy=strategy).decoding()


@pytest.mark.parametrize("strategy", ["top-k:-1", "top-p:0", "top-p:1.5"])
def test_an_amount_out_of_range_is_refused(strategy: str) -> None:
    with pytest.raises(UsageError):
        said(strategy=strategy).decoding()


def test_options_become_what_the_engine_takes() -> None:
    assert said(seed=7).decoding() == Sample(0.4, top_k=20, top_p=0.8, min_p=0.05, seed=7)
    assert said(strategy="greedy").decoding() == Greedy()


def test_temperature_zero_is_greedy() -> None:
    assert said(temperature=0).decoding() == Greedy()


@pytest.mark.parametrize(
    ("words", "origin"),
    [({"strategy": "top-p"}, "strategy top-p"), ({"top_p": 0.5}, "filters that you named")],
    ids=str,
)
def test_a_greedy_model_draws_where_the_user_asks_for_it(
    words: dict[str, Any], origin: str
) -> None:
    layers = (("generation_config.json", {"temperature": 0.0}),)
    assert Options(Said(), layers).decoding() == Greedy()
    assert Options(Said(**words), layers).values()["temperature"] == (1.0, origin)


def test_words_can_be_changed_and_taken_back() -> None:
    changed = said(top_k=5).saying(top_k=None, min_p=0.2)
    assert changed.said == Said(min_p=0.2)
    assert changed.layers == said().layers
