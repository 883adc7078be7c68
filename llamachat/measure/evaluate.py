"""Perplexity, by llama.cpp's convention, so that figures compare with published ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llamachat.errors import DamagedFileError, UsageError
from llamachat.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How surprised a model is by a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        stderr: the standard error of `perplexity`; NaN for a single token.
        tokens: how many were scored.
    """

    perplexity: float
    stderr: float
    tokens: int


class Scores(Protocol):
    """As much of a `Model` as perplexity needs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Says which token begins a window."""
        ...

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) float32 of every position."""
        ...


def perplexity(
    model: Scores, text_ids: Sequence[int], *, window: int = 512, windows: int | None = None
) -> Perplexity:
    """Score the second half of each window, given all of the window before it.

    Windows do not overlap, and what is left at the end is not scored. Where the tokenizer begins
    prompts with BOS, it takes the place of each window's first token. So does llama.cpp
    (tools/perplexity/perplexity.cpp, `perplexity`), which also puts it before the text itself.
    Sums are float64.

    Args:
        model: what is measured.
        text_ids: the text.
        window: tokens of one window; the last (window - 1) // 2 of them are scored.
        windows: at most so many, from the beginning; None for all.

    Raises:
        UsageError: the text has not one window, or a window nothing to score.
        DamagedFileError: the model's logits are not numbers.
    """
    if window < 3:
        raise UsageError(f"window is {window}, expected 3 tokens or more")
    if windows is not None and windows < 1:
        raise UsageError(f"windows is {windows}, expected 1 or more")
    if len(text_ids) < window:
        raise UsageError(
            f"the text has {len(text_ids)} tokens, expected a window of {window} or more",
            hint="take a longer text or a smaller window",
        )
    losses = torch.cat([_losses(model, ids) for ids in _windows(model, text_ids, window, windows)])
    if not bool(losses.isfinite().all()):
        raise DamagedFileError("the model's logits are not numbers: its weights are damaged")
    value, n_tokens = losses.mean().exp().item(), len(losses)
    # Of exp(mean), to first order: exp(mean) times the standard error of the mean.
    stderr = value * losses.std().item() / math.sqrt(n_tokens) if n_tokens > 1 else math.nan
    return Perplexity(value, stderr, n_tokens)


def _windows(
    model: Scores, text_ids: Sequence[int], window: int, windows: int | None
) -> Iterator[list[int]]:
    n_windows = min(len(text_ids) // window, windows or len(text_ids))
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    for start in range(0, n_windows * window, window):
        ids = list(text_ids[start : start + window])
        yield ids if bos is None else [bos, *ids[1:]]


def _losses(model: Scores, ids: Sequence[int]) -> Tensor:
    """Negative log-likelihoods of the second half: ((T - 1) // 2,) float64."""
    first = len(ids) // 2
    logits = model.logits(ids)[first:-1].double()
    return cross_entropy(logits, torch.tensor(ids[first + 1 :]), reduction="none")
