"""Positions to angles: rotary embeddings with scaling (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, divisors: Tensor | None = None) -> Tensor:
    """theta^(-2i / R) for i < R / 2, scaled, then zeros: (head_dim / 2,) float32.

    R is rope_dim, or head_dim. A pair of frequency 0 never turns.

    Args:
        config: gives theta, the sizes and the scaling.
        divisors: (R / 2,) from a file (GGUF `rope_freqs`); scaling, if there is any, comes on top.
    """
    exponents = torch.arange(config.rope_pairs, dtype=torch.float64) / config.rope_pairs
    frequencies = config.rope_theta**-exponents
    if divisors is not None:
        frequencies = frequencies / divisors.double()
    still = config.head_dim // 2 - config.rope_pairs
    return torch.nn.functional.pad(_scaled(frequencies, config), (0, still)).float()


def query_scale(config: ModelConfig) -> float:
    """What queries are multiplied with: yarn's factor on queries and keys, which meet in scores."""
    return 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor**2


def _scaled(frequencies: Tensor, config: ModelConfig) -> Tensor:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":  # which leaves the model's own context alone
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    kept = _kept_by_yarn if scaling.kind == "yarn" else _kept_by_llama3
    keep = kept(frequencies, config, scaling)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _kept_by_llama3(frequencies: Tensor, _config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """High frequencies wholly, low ones not at all, a blend between: (R / 2,)."""
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # context / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """A ramp over indices rather than turns (`_compute_yarn_parameters`): (R / 2,)."""

    def index(turns: float) -> float:
        wavelength = scaling.original_max_seq_len / turns
        return config.rope_pairs * math.log(wavelength / (2 * math.pi), config.rope_theta)

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), 2 * config.rope_pairs - 1)
    ramp = (torch.arange(len(frequencies)) - low) / (high - low or 0.001)
    return 1 - ramp.double().clamp(0, 1)
