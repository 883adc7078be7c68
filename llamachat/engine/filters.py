"""Small pure functions on logits (B, V) float32: what is left to draw from.

A removed token has the logit -inf. Definitions and off values follow transformers; each function
says where it could differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REMOVED = -math.inf
NUCLEUS_GUESS = 256  # tokens tried before a whole vocabulary is sorted, which takes 3 ms for 49,152


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide by `value` > 0; below 1 sharpens, above 1 flattens; 1 is off."""
    return logits if value == 1 else logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest, and whatever ties with the k-th; 0 is off (Fan et al. 2018)."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < kth, REMOVED)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probability reaches p; 1 is off (Holtzman et al. 2020).

    The token that crosses p is kept. Of tokens that tie at the boundary those of lower id stay.
    """
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)
    ordered = _descending_until(probabilities, p)
    kept = 1 + (ordered.cumsum(-1)[..., :-1] < p).sum(-1, keepdim=True)  # (B, 1)
    smallest = ordered.gather(-1, kept - 1)
    above, tied = probabilities > smallest, probabilities == smallest
    room = kept - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= room))
    return logits.masked_fill(~keep, REMOVED)


def min_p(logits: Tensor, value: float) -> Tensor:
    """Keep tokens at least `value` times as probable as the best; 0 is off (Nguyen et al. 2024)."""
    if value <= 0:
        return logits
    best = logits.amax(-1, keepdim=True)
    return logits.masked_fill(logits < best + math.log(value), REMOVED)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: the first id at which the cumulative probability passes `uniform`.

    Args:
        logits: (B, V); at least one finite a row.
        uniform: () or (B,) float64 in [0, 1).

    Returns:
        (B,) int64.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniform.expand(logits.shape[0]).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _descending_until(probabilities: Tensor, mass: float) -> Tensor:
    """Probabilities in falling order, at least as many as reach `mass` (or all)."""
    guess = min(NUCLEUS_GUESS, probabilities.shape[-1])
    if probabilities.is_cpu:  # looking costs nothing here; elsewhere it would stall the device
        largest = probabilities.topk(guess).values
        if bool((largest.cumsum(-1)[..., -1] >= mass).all()):
            return largest
    return probabilities.sort(-1, descending=True).values
