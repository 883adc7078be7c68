"""Draws that depend on (seed, turn, attempt, step) alone, on every device and in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(key: tuple[int, int, int], steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The draw of each step, uniform in [0, 1): (steps,) float64.

    Philox (Salmon et al. 2011) is counter-based: entry i is a function of the key and i only, so
    a longer table begins with a shorter one. Raw words are taken, since numpy keeps those stable.
    """
    seed, *turn_and_attempt = key
    sequence = np.random.SeedSequence(seed, spawn_key=turn_and_attempt)
    words = np.random.Philox(sequence).random_raw(steps)
    fractions = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy(fractions).to(device)
