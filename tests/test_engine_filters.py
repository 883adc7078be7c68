"""Filters against worked numbers and against the logits processors of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llamachat.engine import filters
from llamachat.engine.parameters import FILTERS, ORDERS
from llamachat.engine.random import uniforms
from llamachat.engine.strategies import Sample

D1 = [0.5, 0.4, 0.05, 0.025, 0.025]
D2 = [0.9, 0.05, 0.025, 0.020, 0.005]
SCORED = torch.tensor([[0.0, -0.5, 1.9]])


def left(probabilities: list[float], keep: Callable[[Tensor], Tensor]) -> list[float]:
    """The probabilities of what a filter keeps."""
    found: list[float] = keep(torch.tensor([probabilities]).log()).softmax(-1)[0].tolist()
    return [p for p in found if p > 0]


def kept(name: str, logits: Tensor, value: float) -> Tensor:
    """What a filter leaves of logits (B, V), as many again."""
    return filters.FILTERS[name](filters.Left(logits), value).dense(logits.shape[-1])


def filtered(options: Sample, logits: Tensor) -> Tensor:
    return options.left(logits).dense(logits.shape[-1])


def random_logits(seed: int, *, ties: bool = False) -> Tensor:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


@pytest.mark.parametrize(
    ("value", "percent"),
    [
        (1, [12.059198, 7.314274, 80.626528]),
        (0.5, [2.170654, 0.798539, 97.030807]),
        (2, [22.912077, 17.843944, 59.243979]),
    ],
)
def test_temperature_gives_the_worked_numbers(value: float, percent: list[float]) -> None:
    found = 100 * kept("temperature", SCORED, value).softmax(-1)[0]
    assert found.tolist() == pytest.approx(percent, rel=1e-5)


@pytest.mark.parametrize(
    ("distribution", "expected"), [(D1, [0.555556, 0.444444]), (D2, [0.947368, 0.052632])]
)
def test_top_k_keeps_the_k_largest(distribution: list[float], expected: list[float]) -> None:
    found = left(distribution, lambda logits: kept("top_k", logits, 2))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "first", "second"), [(0.92, 3, 2), (0.6, 2, 1), (0.97, 4, 3), (0.45, 1, 1)]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, first: int, second: int) -> None:
    assert len(left(D1, lambda logits: kept("top_p", logits, p))) == first
    assert len(left(D2, lambda logits: kept("top_p", logits, p))) == second


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [(D1, [0.526316, 0.421053, 0.052632]), (D2, [0.947368, 0.052632])],
)
def test_top_p_leaves_renormalized_probabilities(
    distribution: list[float], expected: list[float]
) -> None:
    found = left(distribution, lambda logits: kept("top_p", logits, 0.92))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("value", "first", "second"), [(0.04, 5, 2), (0.08, 3, 1), (0.2, 2, 1)])
def test_min_p_keeps_what_is_near_enough_to_the_best(value: float, first: int, second: int) -> None:
    assert len(left(D1, lambda logits: kept("min_p", logits, value))) == first
    assert len(left(D2, lambda logits: kept("min_p", logits, value))) == second


def test_temperature_comes_before_top_p() -> None:
    """With top-p first three would stay, at .452355, .404598 and .143047."""
    found = left(D1, lambda logits: filtered(Sample(temperature=2, top_p=0.92), logits))
    assert found == pytest.approx([0.376241, 0.336520, 0.118978, 0.084130, 0.084130], abs=1e-6)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("temperature", 0.7, TemperatureLogitsWarper(0.7)),
        ("top_k", 40, TopKLogitsWarper(40)),
        ("top_k", 5000, TopKLogitsWarper(5000)),
        ("top_p", 0.3, TopPLogitsWarper(0.3)),
        ("top_p", 0.9, TopPLogitsWarper(0.9)),
        ("min_p", 0.07, MinPLogitsWarper(0.07)),
        ("typical_p", 0.2, TypicalLogitsWarper(0.2)),
        ("typical_p", 0.9, TypicalLogitsWarper(0.9)),
        ("epsilon_cutoff", 3e-4, EpsilonLogitsWarper(3e-4)),
        ("eta_cutoff", 2e-3, EtaLogitsWarper(2e-3)),
    ],
    ids=lambda it: it if isinstance(it, str) else f"{it}" if isinstance(it, int | float) else "",
)
@pytest.mark.parametrize("n", [32_000, 128_256])
def test_a_filter_keeps_what_that_of_transformers_keeps(
    name: str, value: float, theirs: Callable[..., Tensor], n: int, ties: bool
) -> None:
    """Of tokens that tie at the edge of the nucleus, which ones stay may differ, not how many.

    Where cumulative sums of float32 come within rounding of the bound, one token may.
    """
    logits = torch.randn(2, n, generator=torch.Generator().manual_seed(n)) * 4
    logits = (logits * 2).round() / 2 if ties else logits
    logits[:, ::7] = -math.inf
    found = kept(name, logits, value)
    expected = theirs(torch.empty(2, 0, dtype=torch.long), logits)
    differ = found.isfinite() != expected.isfinite()
    if ties and name == "top_p":
        found, expected = found.sort(-1).values, expected.sort(-1).values
        differ = found.isfinite() != expected.isfinite()
    assert differ.sum(-1).max() <= (name == "top_p")
    assert torch.equal(found[~differ], expected[~differ])


def test_filters_in_a_row_are_the_chain_of_transformers() -> None:
    logits = random_logits(5)
    expected = logits
    for warp in (
        TemperatureLogitsWarper(1.3), TopKLogitsWarper(50), TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.1), TypicalLogitsWarper(0.9), EpsilonLogitsWarper(0.01),
        EtaLogitsWarper(0.05),
    ):  # fmt: skip
        expected = warp(torch.empty(4, 0, dtype=torch.long), expected)
    options = Sample(
        temperature=1.3, top_k=50, top_p=0.8, min_p=0.1, typical_p=0.9, epsilon_cutoff=0.01,
        eta_cutoff=0.05,
    )  # fmt: skip
    assert torch.equal(filtered(options, logits), expected)


def test_samplers_say_what_runs_and_when() -> None:
    logits = torch.tensor([D1]).log()
    last = Sample(temperature=2, top_p=0.92, samplers=ORDERS["llama.cpp"])
    found = filtered(last, logits).softmax(-1)[0].tolist()
    assert found == pytest.approx([0.452355, 0.404598, 0.143047, 0, 0], abs=1e-6)
    without = Sample(temperature=2, top_p=0.5, samplers=("temperature",))
    assert torch.equal(filtered(without, logits), logits / 2)


@pytest.mark.parametrize("name", filters.FILTERS)
def test_a_filter_that_is_off_returns_what_it_was_given(name: str) -> None:
    left = filters.Left(random_logits(0))
    assert filters.FILTERS[name](left, FILTERS[name].off) is left


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4097, 9000), st.integers(1, 300), st.booleans())
def test_candidates_are_what_a_mask_over_the_whole_vocabulary_leaves(
    seed: int, n: int, k: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, generator=generator) * 4
    logits = logits.round() if ties else logits
    options = Sample(temperature=1.5, top_k=k, top_p=0.9, min_p=0.01)
    found = filtered(options, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "SMALL", n)
        whole = options.left(logits)
    assert whole.ids is None
    assert torch.equal(found, whole.logits)


def test_off_values_change_nothing() -> None:
    logits = random_logits(0)
    assert Sample(temperature=1, top_p=1).left(logits).logits is logits


def test_ties_at_the_edge_of_the_nucleus_stay_by_lower_id() -> None:
    stay = kept("top_p", torch.zeros(1, 8), 0.3)[0].isfinite()
    assert stay.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize(("p", "n_kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_nucleus_that_reaches_p_exactly_is_large_enough(p: float, n_kept: int) -> None:
    assert kept("top_p", torch.zeros(1, 4), p).isfinite().sum() == n_kept


def test_rows_are_filtered_each_by_itself() -> None:
    logits = torch.tensor([D1, D2]).log()
    stay = kept("top_p", logits, 0.6).isfinite().sum(-1)
    assert stay.tolist() == [2, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0, 5.0, 20.0]),
    st.floats(0.01, 0.999),
    st.integers(300, 2000),
)
def test_the_nucleus_is_the_same_with_and_without_sorting_a_whole_vocabulary(
    seed: int, spread: float, p: float, n: int
) -> None:
    logits = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * spread
    short_cut = kept("top_p", logits, p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "RANKED_GUESSES", ())
        whole = kept("top_p", logits, p)
    assert torch.equal(short_cut, whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.999), st.floats(0.1, 10))
def test_a_nucleus_reaches_p_and_would_not_without_its_least_token(
    seed: int, p: float, spread: float
) -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(seed)) * spread
    stay = kept("top_p", logits, p).isfinite()
    mass = logits.double().softmax(-1)[stay]
    assert mass.sum() >= p - 1e-6
    assert mass.sum() - mass.min() < p + 1e-6


def test_draws_are_distributed_as_softmax_says() -> None:
    n = 20_000
    logits = kept("top_k", torch.randn(1, 12, generator=torch.Generator().manual_seed(0)), 10)
    drawn = filters.draw(logits.expand(n, 12), uniforms((1, 2, 3), n))
    expected = n * logits.double().softmax(-1)[0]
    counts = torch.bincount(drawn, minlength=12).double()
    stay = expected > 0
    assert counts[~stay].sum() == 0
    assert ((counts - expected)[stay] ** 2 / expected[stay]).sum() < 27.9  # 9 degrees: 0.1 % above


@pytest.mark.parametrize("key", [(1, 0, 0), (7, 3, 1)])
def test_draws_from_candidates_are_distributed_as_the_chain_of_transformers_says(
    key: tuple[int, int, int],
) -> None:
    n, logits = 5000, torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0)) * 2
    left = Sample(temperature=0.8, top_k=12, top_p=0.95).left(logits)
    drawn = left.token(filters.draw(left.logits.expand(n, -1), uniforms(key, n)))
    expected = logits
    for warp in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.95)):
        expected = warp(torch.empty(1, 0, dtype=torch.long), expected)
    expected = n * expected.double().softmax(-1)[0]
    counts = torch.bincount(drawn, minlength=32_000).double()
    stay = expected > 0
    assert 8 <= stay.sum() <= 12
    assert counts[~stay].sum() == 0
    assert ((counts - expected)[stay] ** 2 / expected[stay]).sum() < 31.3  # 11 degrees: 0.1 % above


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_least_and_the_greatest_draw_take_a_token_that_is_left(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.3, 1.0, -math.inf, 2.0, -math.inf]])
    drawn = filters.draw(logits, torch.tensor(uniform, dtype=torch.float64))
    assert drawn.tolist() == [1 if uniform == 0 else 4]


def test_a_draw_takes_the_first_id_whose_cumulative_probability_passes_it() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4, 3)
    below_and_above = torch.tensor([0.1999, 0.2001, 0.6999, 0.7001], dtype=torch.float64)
    assert filters.draw(logits, below_and_above).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("n", [1, 31, 32, 700, 5003])
def test_the_largest_are_those_of_topk(n: int) -> None:
    values = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    found, indices = filters.largest(values, min(n, 9))
    assert torch.equal(found, values.topk(min(n, 9)).values)
    assert torch.equal(values.gather(1, indices), found)
