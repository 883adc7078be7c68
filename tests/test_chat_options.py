"""Sampling options: who decides what, and what contradicts what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from llamachat.chat.options import BUILT_IN, Options, Said, parse_bias, parse_samplers
from llamachat.engine.beam import Beam
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError

CONFIG = ("config file", {"temperature": 0.4})
MODEL = ("generation_config.json", {"temperature": 0.6, "top_k": 20, "min_p": 0.05})
CATALOG = ("catalog", {"temperature": 0.2, "top_p": 0.8})
NAMES = ("temperature", "top_k", "top_p", "min_p")
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def said(**words: Any) -> Options:
    return Options(Said(**words), (CONFIG, MODEL, CATALOG))


def plain(options: Options) -> dict[str, float]:
    return {name: options.values()[name][0] for name in NAMES}


def test_each_value_comes_from_the_strongest_who_has_one() -> None:
    values = said(min_p=0.1).values()
    assert {name: values[name] for name in NAMES} == {
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
        ({"strategy": "greedy", "typical_p": 0.5}, "--typical-p 0.5"),
        ({"strategy": "random", "eta_cutoff": 0.1}, "--eta-cutoff 0.1"),
        ({"strategy": "greedy", "samplers": ("top_k",)}, "--samplers top_k"),
        ({"strategy": "top-k", "samplers": ("min_p", "top_p")}, "--samplers min_p;top_p"),
    ],
    ids=str,
)
def test_a_contradiction_names_both_sides(words: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(Said(**words)).decoding()
    assert f"--strategy {words['strategy']} and {named} contradict" in caught.value.message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"temperature": 0, "top_p": 0.5}, "--temperature 0 and --top-p 0.5"),
        ({"temperature": 0, "samplers": ("top_k",)}, "--temperature 0 and --samplers top_k"),
        ({"samplers": ("top_k",), "top_p": 0.5}, "--samplers top_k and --top-p 0.5"),
        ({"samplers": ("top_k",), "temperature": 2}, "--samplers top_k and --temperature 2"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_both_named(words: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(Said(**words)).decoding()
    assert f"{named} contradict" in caught.value.message


def test_samplers_switch_off_what_they_leave_out() -> None:
    values = said(samplers=("top_k", "min_p")).values()
    assert values["top_p"] == (1.0, "samplers")
    assert values["temperature"] == (1.0, "samplers")
    assert values["top_k"] == (20, "generation_config.json")
    assert said(samplers=("top_k",), top_p=1.0).values()["top_p"] == (1.0, "you")


def test_samplers_are_read_as_other_programs_write_them() -> None:
    assert parse_samplers("temperature; top-k ;top_p") == ("temperature", "top_k", "top_p")
    assert parse_samplers("penalties;top_k;temperature") == ("top_k", "temperature")
    assert parse_samplers("hf")[:2] == ("temperature", "top_k")
    assert parse_samplers("llama.cpp")[-1] == "temperature"


@pytest.mark.parametrize("text", ["", ";", "top_k;psychic", "top_k;top_k", "top_k;penalties"])
def test_samplers_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^samplers") as refused:
        parse_samplers(text)
    assert "twice" in refused.value.message or "typical_p" in (refused.value.hint or "")


def test_penalties_go_with_greedy_and_stay_where_a_strategy_is_named() -> None:
    model = ("generation_config.json", {"repetition_penalty": 1.1, "bad_words": ((3, 4),)})
    greedy = Options(Said(strategy="greedy", frequency_penalty=0.5), (model,)).decoding()
    assert greedy == Greedy(repetition_penalty=1.1, frequency_penalty=0.5, bad_words=((3, 4),))


@dataclass
class Words:
    """A tokenizer whose letters are tokens; it may put a dummy space before a text."""

    space_prefix: bool
    vocab_size: int = 256

    def encode(self, text: str) -> list[int]:
        return list((" " * self.space_prefix + text).encode())


@pytest.mark.parametrize("space_prefix", [False, True])
def test_a_bad_word_is_banned_with_and_without_a_space_before_it(space_prefix: bool) -> None:
    decoding = said(bad_words=(" no",)).decoding(Words(space_prefix))  # type: ignore[arg-type]
    assert isinstance(decoding, Sample)
    assert set(decoding.bad_words) == {tuple(b"no"), tuple(b" no")}


def test_a_bad_word_that_is_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        said(bad_words=("  ",)).decoding()


def test_biases_are_ids_and_numbers() -> None:
    assert parse_bias(["17=-2.5", "3=100"]) == ((17, -2.5), (3, 100.0))
    with pytest.raises(UsageError, match="ids 0 to 255"):
        said(logit_bias=((256, 1.0),)).decoding(Words(space_prefix=False))  # type: ignore[arg-type]
    for text in ("17", "=1", "a=1", "17=x", ""):
        with pytest.raises(UsageError, match="logit bias"):
            parse_bias([text])


@pytest.mark.parametrize("strategy", ["greedy", "random"])
def test_a_filter_that_is_named_off_contradicts_nothing(strategy: str) -> None:
    named = said(strategy=strategy, top_k=0, top_p=1.0, min_p=0.0)
    assert plain(named) == plain(said(strategy=strategy))


@pytest.mark.parametrize(
    "strategy", ["beam:x", "", "top-k:", "top-k:x", "top-k:1.5", "top-p:a", "greedy:1", "TOP-K"]
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"strategy": "beam"}, Beam(4)),
        ({"strategy": "beam:8"}, Beam(8)),
        ({"num_beams": 3}, Beam(3)),
        ({"strategy": "beam", "num_beams": 2, "seed": 3}, Beam(2)),
        ({"strategy": "beam:2", "num_beams": 2, "length_penalty": -1.5}, Beam(2, -1.5)),
        ({"strategy": "beam", "early_stopping": "never"}, Beam(early_stopping="never")),
        ({"strategy": "beam", "early_stopping": "true"}, Beam(early_stopping=True)),
        ({"strategy": "beam", "beam_groups": 2}, Beam(groups=2, diversity_penalty=1.0)),
        (
            {"num_beams": 2, "temperature": 1.5, "seed": 3},
            Beam(2, sampling=Sample(1.5, top_p=1.0, seed=3)),
        ),
        ({"num_beams": 1}, said().decoding()),
    ],
    ids=str,
)
def test_beams_draw_only_where_the_user_names_what_to_draw_from(
    words: dict[str, Any], expected: object
) -> None:
    assert said(**words).decoding() == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"strategy": "greedy", "num_beams": 4}, ["--strategy greedy", "--num-beams 4"]),
        ({"strategy": "top-k", "length_penalty": 2.0}, ["top-k", "--length-penalty 2"]),
        ({"strategy": "beam:4", "num_beams": 5}, ["beam:4", "--num-beams 5"]),
        ({"early_stopping": "never"}, ["--early-stopping never", "beams"]),
        ({"num_beams": 1, "beam_groups": 2}, ["--beam-groups 2", "beams"]),
        ({"strategy": "beam", "diversity_penalty": 1.0}, ["groups", "diversity_penalty"]),
        ({"strategy": "beam", "beam_groups": 2, "top_k": 3}, ["beam groups", "sampling"]),
        ({"strategy": "beam", "early_stopping": "maybe"}, ["early_stopping", "maybe"]),
    ],
    ids=str,
)
def test_words_that_beams_contradict_are_named(words: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        said(**words).decoding()
    assert all(name in caught.value.message for name in named)
