"""Draws: a function of seed, turn, attempt and step, and nothing else."""

from __future__ import annotations

import pytest
import torch

from llamachat.engine.random import uniforms

KEY = (7, 3, 1)


def test_a_draw_does_not_depend_on_how_many_follow() -> None:
    assert torch.equal(uniforms(KEY, 500)[:5], uniforms(KEY, 5))


@pytest.mark.parametrize(
    "other", [(8, 3, 1), (7, 4, 1), (7, 3, 2), (7, 1, 3), (3, 7, 1), (7 + 2**32, 3, 1)]
)
def test_another_seed_turn_or_attempt_draws_otherwise(other: tuple[int, int, int]) -> None:
    assert not (uniforms(KEY, 20) == uniforms(other, 20)).any()


def test_a_seed_over_32_bits_is_no_other_seed_and_turn() -> None:
    assert not torch.equal(uniforms((2**32, 0, 0), 5), uniforms((0, 1, 0), 5))


def test_draws_are_uniform_below_one() -> None:
    draws = uniforms((0, 0, 0), 100_000)
    counts = torch.histc(draws.float(), bins=100, min=0, max=1)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 148  # chi-square, 99 degrees: 0.1 % above


def test_seeds_mean_the_same_in_every_release() -> None:
    expected = [0.18110685480680477, 0.35576521519666693, 0.049053365460406284]
    assert uniforms((1, 2, 3), 3).tolist() == expected
