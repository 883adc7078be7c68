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

BLOCK = 2**19  # values that are worked on at once: 4 MiB in float64, which caches hold


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error, which is NaN for a single token."""

    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many figures the mean and its standard error, median, 99th percentile and largest."""

    mean: float
    stderr: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far what a model predicts is from what a reference does, on the same text.

    Attributes:
        reference: the reference's perplexity.
        ratio: the model's perplexity to it; most of what makes either uncertain cancels out.
        kl: D(reference || model) at the scored tokens, in nats.
        rms_dp_percent: root mean square of p(token | model) - p(token | reference), in percent.
        top1_agreement: share of the scored tokens where both find the same one likeliest.
    """

    reference: Estimate
    ratio: Estimate
    kl: Spread
    rms_dp_percent: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Figures:
    """How surprised a model is by a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: how many were scored.
        divergence: from the reference, where there is one.
    """

    perplexity: Estimate
    tokens: int
    divergence: Divergence | None = None


class Scores(Protocol):
    """As much of a `Model` as is needed to score a text."""

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        """(n, V) float32 of some positions at a time, from `first` to the last."""
        ...


def windows(
    tokenizer: Tokenizer, text: str, *, size: int = 512, at_most: int | None = None
) -> list[list[int]]:
    """Cut a text's ids into windows of `size`; what is left at the end is dropped.

    Where the tokenizer begins prompts with BOS, it comes before the text, and takes the place of
    each window's first token. So does llama.cpp (tools/perplexity/perplexity.cpp, `perplexity`).

    Raises:
        UsageError: the text has not one window, or a window nothing to score.
    """
    if size < 3:
        raise UsageError(f"a window of {size} has nothing to score, expected 3 tokens or more")
    if at_most is not None and at_most < 1:
        raise UsageError(f"{at_most} windows were asked for, expected 1 or more")
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [*bos, *tokenizer.encode(text)]
    if len(ids) < size:
        raise UsageError(
            f"the text has {len(ids)} tokens, expected a window of {size} or more",
            hint="take a longer text or a smaller window",
        )
    starts = range(0, len(ids) - size + 1, size)[:at_most]
    return [[*bos, *ids[start + len(bos) : start + size]] for start in starts]


def evaluate(
    model: Scores, windows: Sequence[Sequence[int]], *, reference: Scores | None = None
) -> Iterator[Figures]:
    """Score the second half of each window, given all of the window before it.

    Yields after each window the figures of all so far. The windows, the half that is scored, and
    the definitions are those of llama.cpp (tools/perplexity/perplexity.cpp); sums are float64.

    Args:
        model: what is measured.
        windows: ids, 3 or more each; of T the last (T - 1) // 2 are scored.
        reference: what it should be like, usually the same weights less compressed.

    Raises:
        UsageError: the vocabularies of the two differ in size.
        DamagedFileError: logits of either are not numbers.
    """
    models = [model] if reference is None else [model, reference]
    scored: list[Tensor] = []
    for ids in windows:
        scored.append(_columns(_blocks(models, ids)))
        yield _figures(*torch.cat(scored, dim=1))


def _blocks(models: Sequence[Scores], ids: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """A few scored tokens (n,) at a time, with every model's logits (n, V) of what they are."""
    first = len(ids) // 2
    following = torch.tensor(ids[first + 1 :])
    passes = [model.iter_logits(ids[:-1], first) for model in models]
    for logits in zip(*passes, strict=True):
        found, expected = logits[0].shape[1], logits[-1].shape[1]
        if found != expected:
            raise UsageError(
                f"the model knows {found} ids, the reference {expected}",
                hint="compare models of one vocabulary",
            )
        tokens, following = following[: len(logits[0])], following[len(logits[0]) :]
        blocks = (torch.split(it, max(1, BLOCK // found)) for it in (tokens, *logits))
        yield from zip(*blocks, strict=True)


def _columns(blocks: Iterator[tuple[Tensor, ...]]) -> Tensor:
    """Of each token losses; with a reference its losses, KL and agreement, too: (C, N) float64.

    They are Python's floats meanwhile: small tensors between the large ones of the next block would
    keep the memory of the last from being used again.
    """
    rows = [row for it in blocks for row in torch.stack(_scored(*it), dim=1).tolist()]
    return torch.tensor(rows, dtype=torch.float64).T


def _scored(tokens: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
    scores = [log_softmax(it.double(), dim=-1) for it in logits]
    losses = [nll_loss(it, tokens, reduction="none") for it in scores]
    if not all(bool(it.isfinite().all()) for it in losses):
        raise DamagedFileError("the model's logits are not numbers: its weights are damaged")
    if len(scores) == 1:
        return tuple(losses)
    found, expected = scores
    kl = kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    agrees = found.argmax(-1) == expected.argmax(-1)
    return (*losses, kl, agrees.double())


def _figures(losses: Tensor, *others: Tensor) -> Figures:
    if not others:
        return Figures(_exp_mean(losses), len(losses))
    their_losses, kl, agrees = others
    changes = (-losses).exp() - (-their_losses).exp()
    divergence = Divergence(
        reference=_exp_mean(their_losses),
        ratio=_exp_mean(losses - their_losses),
        kl=_spread(kl),
        rms_dp_percent=100 * changes.square().mean().sqrt().item(),
        top1_agreement=agrees.mean().item(),
    )
    return Figures(_exp_mean(losses), len(losses), divergence)


def _exp_mean(logs: Tensor) -> Estimate:
    """Of exp(mean), to first order: exp(mean) times the standard error of the mean."""
    value = logs.mean().exp().item()
    return Estimate(value, value * _stderr(logs))


def _spread(figures: Tensor) -> Spread:
    median, p99 = figures.quantile(torch.tensor([0.5, 0.99], dtype=figures.dtype)).tolist()
    return Spread(figures.mean().item(), _stderr(figures), median, p99, figures.max().item())


def _stderr(figures: Tensor) -> float:
    """Of the mean."""
    return figures.std().item() / math.sqrt(len(figures)) if len(figures) > 1 else math.nan
