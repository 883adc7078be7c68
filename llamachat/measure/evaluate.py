"""Perplexity and divergence by llama.cpp's conventions: figures compare with published ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

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


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many figures the mean, the median, the 99th percentile and the largest."""

    mean: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far what a model predicts is from what a reference does, on the same text.

    Attributes:
        perplexity: the model's.
        reference: the reference's perplexity.
        kl: D(reference || model) at the scored tokens, in nats.
        top1_agreement: share of the scored tokens where both find the same one likeliest.
    """

    perplexity: Perplexity
    reference: Perplexity
    kl: Spread
    top1_agreement: float


class Scores(Protocol):
    """As much of a `Model` as is needed to score a text."""

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
    windows_ = _windows(model, text_ids, window, windows)
    return _perplexity(torch.cat([_losses(_scored(model, ids), ids) for ids in windows_]))


def divergence(
    model: Scores,
    reference: Scores,
    text_ids: Sequence[int],
    *,
    window: int = 512,
    windows: int | None = None,
) -> Divergence:
    """Score a text as `perplexity` does with a model and with a reference, and compare.

    Both must have the same vocabulary; the model says whether windows begin with BOS.

    Args:
        model: what is measured.
        reference: what it should be like, usually the same weights less compressed.
        text_ids: the text.
        window: as for `perplexity`.
        windows: as for `perplexity`.

    Raises:
        UsageError: as `perplexity`, or the vocabularies differ in size.
        DamagedFileError: logits of either are not numbers.
    """
    columns: list[tuple[Tensor, ...]] = []  # a window each
    for ids in _windows(model, text_ids, window, windows):
        found, expected = _scored(model, ids), _scored(reference, ids)
        if found.shape != expected.shape:
            raise UsageError(
                f"the model knows {found.shape[1]} ids, the reference {expected.shape[1]}",
                hint="compare models of one vocabulary",
            )
        kl = kl_div(found, expected, reduction="none", log_target=True).sum(-1)
        agrees = found.argmax(-1) == expected.argmax(-1)
        columns.append((_losses(found, ids), _losses(expected, ids), kl, agrees))
    losses, their_losses, kl, agrees = map(torch.cat, zip(*columns, strict=True))
    return Divergence(
        perplexity=_perplexity(losses),
        reference=_perplexity(their_losses),
        kl=_spread(kl),
        top1_agreement=agrees.double().mean().item(),
    )


def _windows(
    model: Scores, text_ids: Sequence[int], window: int, windows: int | None
) -> Iterator[list[int]]:
    if window < 3:
        raise UsageError(f"window is {window}, expected 3 tokens or more")
    if windows is not None and windows < 1:
        raise UsageError(f"windows is {windows}, expected 1 or more")
    if len(text_ids) < window:
        raise UsageError(
            f"the text has {len(text_ids)} tokens, expected a window of {window} or more",
            hint="take a longer text or a smaller window",
        )
    n_windows = min(len(text_ids) // window, windows or len(text_ids))
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    for start in range(0, n_windows * window, window):
        ids = list(text_ids[start : start + window])
        yield ids if bos is None else [bos, *ids[1:]]


def _scored(model: Scores, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of what follows, for the second half: ((T - 1) // 2, V) float64."""
    return log_softmax(model.logits(ids)[len(ids) // 2 : -1].double(), dim=-1)


def _losses(scored: Tensor, ids: Sequence[int]) -> Tensor:
    """Negative log-likelihoods of the second half: ((T - 1) // 2,) float64."""
    return nll_loss(scored, torch.tensor(ids[len(ids) // 2 + 1 :]), reduction="none")


def _perplexity(losses: Tensor) -> Perplexity:
    if not bool(losses.isfinite().all()):
        raise DamagedFileError("the model's logits are not numbers: its weights are damaged")
    value, n_tokens = losses.mean().exp().item(), len(losses)
    # Of exp(mean), to first order: exp(mean) times the standard error of the mean.
    stderr = value * losses.std().item() / math.sqrt(n_tokens) if n_tokens > 1 else math.nan
    return Perplexity(value, stderr, n_tokens)


def _spread(figures: Tensor) -> Spread:
    median, p99 = figures.quantile(torch.tensor([0.5, 0.99], dtype=figures.dtype)).tolist()
    return Spread(figures.mean().item(), median, p99, figures.max().item())
