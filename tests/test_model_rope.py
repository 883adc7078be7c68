"""Angles and rotations against worked numbers, and the scaling rules of long contexts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamachat.architecture import ModelConfig, RopeScaling, config_from_hf
from llamachat.kernels import Batch, CacheShape
from llamachat.kernels.reference import Reference
from llamachat.model.rope import inverse_frequencies, query_scale

CONFIG = ModelConfig(
    dim=4, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, hidden_dim=4, vocab_size=4,
    norm_eps=1e-5, rope_theta=1e4, max_seq_len=16, tied=True,
)  # fmt: skip


def rotated(x: list[float], position: int) -> Tensor:
    """What the reference kernels store as the key of a token at `position`."""
    kernels = Reference()
    cache = kernels.cache(CacheShape(1, 1, 4), slots=1)
    one = torch.tensor([0], dtype=torch.int32)
    at = torch.tensor([position], dtype=torch.int32)
    batch = Batch(one, one, one, one + 1, at, one.view(1, 1), one)
    turn = kernels.angles(at, inverse_frequencies(CONFIG))
    qkv = torch.tensor([[*x, *x, *x]])
    kernels.run(lambda batch: kernels.attention(qkv, turn, batch, cache, 0), batch)
    return cache.keys[0, 0, 0]


@pytest.mark.parametrize(
    ("x", "position", "expected"),
    [
        ([1, 2, 3, 4], 0, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 1, [-1.984111, 1.959901, 2.462378, 4.019800]),
        # Interleaved pairs, brought to the half-split order.
        ([1, 3, 2, 4], 1, [-1.142640, 2.959851, 1.922076, 4.029800]),
        ([1, 3, 2, 4], 3, [-1.272233, 2.878668, -1.838865, 4.088187]),
    ],
)
def test_a_key_is_turned_by_its_position(
    x: list[float], position: int, expected: list[float]
) -> None:
    assert rotated(x, position).tolist() == pytest.approx(expected, abs=1e-6)


def test_angles_are_exact_at_odd_positions_of_a_long_context() -> None:
    """Half precision cannot tell 4097 from 4096."""
    cos, sin = Reference().angles(torch.tensor([4097]), torch.tensor([1.0]))
    assert (cos.item(), sin.item()) == pytest.approx((math.cos(4097), math.sin(4097)))


def test_inverse_frequencies_fall_from_one_by_powers_of_theta() -> None:
    config = replace(CONFIG, head_dim=8, rope_theta=1e8)
    assert inverse_frequencies(config).tolist() == pytest.approx([1, 1e-2, 1e-4, 1e-6])


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(CONFIG)
    scaled = inverse_frequencies(replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0)))
    assert torch.equal(scaled, plain / 4)


@pytest.mark.parametrize(
    ("head_dim", "factor", "kept", "blended"),
    [
        (128, 8.0, 29, [
            2.166570764e-3, 1.371893568e-3, 8.567514129e-4, 5.24846161e-4, 3.126937504e-4,
            1.785078128e-4,
        ]),
        (64, 32.0, 15, [1.290547928e-3, 4.295567966e-4, 9.708287803e-5]),
    ],
)  # fmt: skip
def test_llama3_scaling_keeps_high_frequencies_and_blends_into_low_ones(
    head_dim: int, factor: float, kept: int, blended: list[float]
) -> None:
    config = replace(CONFIG, head_dim=head_dim, rope_theta=5e5)
    plain = inverse_frequencies(config)
    scaled = inverse_frequencies(replace(config, rope_scaling=RopeScaling("llama3", factor)))
    low = kept + len(blended)
    assert torch.equal(scaled[:kept], plain[:kept])
    assert scaled[kept:low].tolist() == pytest.approx(blended, rel=1e-6)
    assert scaled[low:].tolist() == pytest.approx((plain[low:] / factor).tolist(), rel=1e-6)


def test_divisors_of_a_file_come_before_its_scaling() -> None:
    """As in llama.cpp, whose `ggml_rope_ext` takes both."""
    divisors = torch.tensor([2.0, 8.0])
    assert inverse_frequencies(CONFIG, divisors).tolist() == pytest.approx([1 / 2, 0.01 / 8])
    config = replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    assert inverse_frequencies(config, divisors).tolist() == pytest.approx([1 / 8, 0.01 / 32])


def test_of_a_head_that_turns_in_part_the_rest_has_no_divisors() -> None:
    config = replace(CONFIG, head_dim=8, rope_dim=4)
    found = inverse_frequencies(config, torch.tensor([2.0, 8.0]))
    assert found.tolist() == pytest.approx([1 / 2, 0.01 / 8, 0, 0])


LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "dynamic": {"rope_type": "dynamic", "factor": 32.0},
    "yarn": YARN,
    "yarn with other betas": YARN | {"beta_fast": 20, "beta_slow": 3},
    "yarn with a factor": YARN | {"attention_factor": 0.8},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn that keeps all": YARN | {"original_max_position_embeddings": 2**30},
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_turns_as_in_transformers_up_to_position_131071(
    name: str, head_dim: int
) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=4096,
        rope_parameters=SCALINGS[name] | {"rope_theta": 1e4},
    )  # fmt: skip
    kind = SCALINGS[name]["rope_type"]
    theirs, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    if kind != "default":
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=131072)
    ours = config_from_hf(config.to_dict()).at_context(131072)
    frequencies = inverse_frequencies(ours)
    assert query_scale(ours) == pytest.approx(factor**2, rel=1e-6)
    positions = torch.tensor([0, 1, 4095, 4096, 65537, 131071])
    exact = positions.double().unsqueeze(-1) * theirs.double()
    rounded = exact * 2**-21 + 1e-6  # float32 frequencies and products differ by a few units
    for found, expected in zip(
        Reference().angles(positions, frequencies), (exact.cos(), exact.sin()), strict=True
    ):
        assert bool(((found - expected).abs() <= rounded).all())


@pytest.mark.parametrize(
    ("ctx_size", "theta"), [(4096, 1e4), (100, 1e4), (8192, pytest.approx(30527.737, abs=1e-3))]
)
def test_dynamic_scaling_raises_theta_for_a_longer_context_only(
    ctx_size: int, theta: float
) -> None:
    scaling = RopeScaling("dynamic", 2.0)
    config = replace(CONFIG, head_dim=128, max_seq_len=4096, rope_scaling=scaling)
    assert config.at_context(ctx_size).rope_theta == theta


def test_dynamic_scaling_leaves_the_models_own_context_alone() -> None:
    scaled = replace(CONFIG, rope_scaling=RopeScaling("dynamic", 2.0))
    assert torch.equal(inverse_frequencies(scaled), inverse_frequencies(CONFIG))
