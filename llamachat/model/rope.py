"""Positions to angles: rotary embeddings with scaling (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, divisors: Tensor | None = None) -> Tensor:
    """theta^(-2i / head_dim) for i < head_dim / 2, scaled: (head_dim / 2,) float32.

    Args:
        config: gives theta, head_dim and the scaling.
        divisors: (head_dim / 2,) from a file (GGUF `rope_freqs`), instead of computed scaling.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if divisors is not None:
        frequencies = frequencies / divisors.double()
    elif config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    return frequencies.float()


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear: divide all. Llama 3: divide low frequencies, blend the middle ones."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # context / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies
