"""Small pure functions on logits (B, V) float32: what is left to draw from.

Every filter scores tokens and keeps those that score enough; a removed token has the logit -inf.
Definitions and off values follow transformers; each function says where it could differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

REMOVED = -math.inf
BLOCK = 32  # the maxima of blocks tell in 25 us where the best of 128,256 logits are
SMALL = 4096  # candidates that are not worth being made fewer
RANKED_GUESSES = (256, 4096)  # tokens tried before a whole vocabulary is ranked, which takes 10 ms


class Left(NamedTuple):
    """What is left: logits (B, C) of the ids (C,), which rise; None: of all V.

    Off the CPU nothing is dropped, since counting what is left would stall the device.
    """

    logits: Tensor
    ids: Tensor | None = None

    def dense(self, vocab_size: int) -> Tensor:
        """The logits (B, V), -inf where a token was removed."""
        if self.ids is None:
            return self.logits
        everything = self.logits.new_full((self.logits.shape[0], vocab_size), REMOVED)
        return everything.index_copy_(1, self.ids, self.logits)

    def token(self, index: Tensor) -> Tensor:
        """The ids (B,) of candidates (B,)."""
        return index if self.ids is None else self.ids[index]


def temperature(left: Left, value: float) -> Left:
    """Divide by `value` > 0; below 1 sharpens, above 1 flattens; 1 is off."""
    return left if value == 1 else left._replace(logits=left.logits / value)


def top_k(left: Left, k: int) -> Left:
    """Keep the k largest, and whatever ties with the k-th; 0 is off (Fan et al. 2018)."""
    if k <= 0 or k >= left.logits.shape[-1]:
        return left
    kth = largest(left.logits, k)[0][..., -1:]
    return _keep(left, left.logits, kth)[0]


def top_p(left: Left, p: float) -> Left:
    """Keep the fewest tokens whose probability reaches p; 1 is off (Holtzman et al. 2020).

    The token that crosses p is kept. Of tokens that tie at the boundary those of lower id stay.
    """
    if p >= 1:
        return left
    probabilities = left.logits.softmax(-1)
    ordered, _ = _ranked_until(probabilities, probabilities, p)
    n_kept = 1 + (ordered.cumsum(-1)[..., :-1] < p).sum(-1, keepdim=True)  # (B, 1)
    least = ordered.gather(-1, n_kept - 1)
    left, probabilities = _keep(left, probabilities, least)
    tied = probabilities == least
    room = n_kept - (probabilities > least).sum(-1, keepdim=True)
    surplus = tied & (tied.cumsum(-1) > room)
    return left._replace(logits=left.logits.masked_fill(surplus, REMOVED))


def min_p(left: Left, value: float) -> Left:
    """Keep tokens at least `value` times as probable as the best; 0 is off (Nguyen et al. 2024)."""
    if value <= 0:
        return left
    best = left.logits.amax(-1, keepdim=True)
    return _keep(left, left.logits, best + math.log(value))[0]


def typical_p(left: Left, p: float) -> Left:
    """Keep the tokens nearest to the expected surprise that reach p; 1 is off.

    "Locally typical sampling" (Meister et al. 2022). Whatever ties with the last one stays.
    """
    if p >= 1:
        return left
    logprobs = left.logits.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum(-1, keepdim=True)
    typicality = -(logprobs + entropy).abs()
    ordered, mass = _ranked_until(typicality, probabilities, p)
    last = (mass.cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    return _keep(left, typicality, ordered.gather(-1, last))[0]


def epsilon_cutoff(left: Left, epsilon: float) -> Left:
    """Keep the best and what is as probable as `epsilon`; 0 is off (Hewitt et al. 2022)."""
    if epsilon <= 0:
        return left
    probabilities = left.logits.softmax(-1)
    return _keep(left, probabilities, probabilities.amax(-1, keepdim=True).clamp(max=epsilon))[0]


def eta_cutoff(left: Left, epsilon: float) -> Left:
    """As `epsilon_cutoff`, but the bound falls with the entropy; 0 is off (Hewitt et al. 2022)."""
    if epsilon <= 0:
        return left
    logprobs = left.logits.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum(-1, keepdim=True)
    eta = (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)
    return _keep(left, probabilities, eta.minimum(probabilities.amax(-1, keepdim=True)))[0]


FILTERS: Mapping[str, Callable[[Left, float], Left]] = {
    "temperature": temperature,
    "top_k": lambda left, k: top_k(left, int(k)),
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
}


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


def largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of (B, V) in falling order, and where they are.

    They lie in the n blocks with the largest maxima. -inf may be found past the end of a row.
    """
    blocks = _blocks(values)
    if n >= blocks.shape[1]:
        found = values.topk(n)
        return found.values, found.indices
    chosen = blocks.amax(-1).topk(n).indices.unsqueeze(-1)  # (B, n, 1)
    candidates = blocks.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)
    found = candidates.topk(n)
    offsets = chosen * BLOCK + torch.arange(BLOCK, device=values.device)
    return found.values, offsets.flatten(1).gather(1, found.indices)


def _keep(left: Left, scores: Tensor, least: Tensor) -> tuple[Left, Tensor]:
    """The tokens whose scores (B, C) are at least `least` (B, 1), and their scores."""
    if scores.is_cpu and scores.shape[-1] > SMALL:
        n = scores.shape[-1]
        blocks = _blocks(scores)
        chosen = (blocks.amax(-1) >= least).any(0).nonzero().squeeze(-1)
        offsets = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten()
        offsets = offsets[offsets < n]
        scores = _rows_of(blocks, chosen)[:, : len(offsets)]
        logits = _rows_of(_blocks(left.logits), chosen)[:, : len(offsets)]
        left = Left(logits, left.token(offsets))
    return left._replace(logits=left.logits.masked_fill(~(scores >= least), REMOVED)), scores


def _ranked_until(scores: Tensor, weights: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Scores in falling order with their weights, at least as many as weigh `mass` (or all)."""
    if scores.is_cpu:  # looking costs nothing here; elsewhere it would stall the device
        for guess in RANKED_GUESSES:
            if guess < scores.shape[-1]:
                found, where = largest(scores, guess)
                weighed = weights.gather(-1, where)
                if bool((weighed.sum(-1) >= mass).all()):
                    return found, weighed
        if weights is scores:  # numpy sorts three times as fast as torch
            falling = -torch.from_numpy(np.sort(-scores.numpy()))
            return falling, falling
    ordered, where = scores.sort(-1, descending=True)
    return ordered, weights.gather(-1, where)


def _blocks(values: Tensor) -> Tensor:
    """(B, V) -> (B, V / BLOCK, BLOCK), filled up with -inf."""
    if missing := -values.shape[-1] % BLOCK:
        values = pad(values, (0, missing), value=REMOVED)
    return values.reshape(len(values), -1, BLOCK)


def _rows_of(blocks: Tensor, chosen: Tensor) -> Tensor:
    return blocks.index_select(1, chosen).flatten(1)
