"""Perplexity, on models small enough to reckon by hand, and the default model's own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import DamagedFileError, UsageError
from llamachat.measure.evaluate import perplexity

# A window takes each side a second or more; 20 are the figure to compare with.
N_WINDOWS = int(os.environ.get("LLAMACHAT_TEST_WINDOWS", "2"))


@dataclass
class Counting:
    """Says of every next token how likely it is by the token itself: 2^-(1 + id)."""

    add_bos: bool = False
    asked: list[list[int]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(bos_id=0, add_bos=self.add_bos)

    def logits(self, ids: Sequence[int]) -> Tensor:
        self.asked.append(list(ids))
        halves = -math.log(2) * torch.arange(1, 41, dtype=torch.float32)
        return halves.repeat(len(ids), 1)


def test_only_the_second_half_of_each_window_is_scored() -> None:
    """Of 8 tokens the last 3: the logits of tokens 4 to 6 say what 5 to 7 are."""
    text = [9, 9, 9, 9, 9, 1, 2, 3, 9, 9, 9, 9, 9, 0, 0, 4, 7]
    found = perplexity(Counting(), text, window=8)
    bits = np.array([2, 3, 4, 1, 1, 5])
    assert found.tokens == 6
    assert found.perplexity == pytest.approx(2 ** bits.mean(), rel=1e-6)


def test_the_standard_error_is_that_of_llama_cpp() -> None:
    """tools/perplexity/perplexity.cpp: sqrt((E[l^2] - E[l]^2) / (n - 1)) times the perplexity."""
    text = [9, 9, 9, 9, 9, 1, 2, 3]
    found = perplexity(Counting(), text, window=8)
    losses = math.log(2) * np.array([2, 3, 4])
    error = math.sqrt((np.mean(losses**2) - np.mean(losses) ** 2) / 2) * math.exp(losses.mean())
    assert found.stderr == pytest.approx(error, rel=1e-6)


def test_windows_follow_one_another_and_a_rest_is_left_out() -> None:
    model = Counting()
    perplexity(model, list(range(11)), window=4)
    assert model.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_bos_takes_the_place_of_the_first_token_of_each_window() -> None:
    model = Counting(add_bos=True)
    perplexity(model, list(range(1, 10)), window=4)
    assert model.asked == [[0, 2, 3, 4], [0, 6, 7, 8]]


def test_no_more_windows_are_scored_than_were_asked_for() -> None:
    model = Counting()
    assert perplexity(model, list(range(40)), window=4, windows=3).tokens == 3
    assert perplexity(model, list(range(40)), window=4, windows=99).tokens == 10


def test_a_single_token_has_no_standard_error() -> None:
    found = perplexity(Counting(), [9, 9, 2], window=3)
    assert (found.perplexity, found.tokens) == (pytest.approx(8), 1)
    assert math.isnan(found.stderr)


@pytest.mark.parametrize(
    ("n_tokens", "settings", "named"),
    [
        (7, {"window": 8}, "7 tokens, expected a window of 8"),
        (9, {"window": 2}, "window is 2, expected 3"),
        (9, {"window": 4, "windows": 0}, "windows is 0"),
    ],
)
def test_nothing_to_score_is_refused(n_tokens: int, settings: dict[str, int], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        perplexity(Counting(), [1] * n_tokens, **settings)


def test_damaged_weights_are_told() -> None:
    class Damaged(Counting):
        def logits(self, ids: Sequence[int]) -> Tensor:
            return super().logits(ids) * math.nan

    with pytest.raises(DamagedFileError, match="not numbers"):
        perplexity(Damaged(), [1] * 8, window=8)


def reference_losses(logits: Callable[[list[int]], Tensor], text: list[int], n: int) -> np.ndarray:
    """Second halves of n windows of 512, by numpy in float64."""
    losses = []
    for start in range(0, 512 * n, 512):
        ids = text[start : start + 512]
        scores = logits(ids).double().numpy()[256:511]
        norms = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
        losses.append(norms - scores[np.arange(255), ids[257:]])
    return np.concatenate(losses)


@pytest.mark.network
@pytest.mark.slow
def test_the_default_models_perplexity_is_that_of_transformers(data: Path) -> None:
    """On the same dequantized weights, on WikiText-2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llamachat.load("smollm2-135m", backend="reference", dtype="float32", ctx_size=512)
    config = model.config
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, head_dim=config.head_dim,
        intermediate_size=config.hidden_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    theirs = LlamaForCausalLM(shape)
    weights = {
        name: tensor if isinstance(tensor, Tensor) else tensor.dequantize()
        for name, tensor in open_checkpoint(model.located.path).tensors()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied

    def their_logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0]

    text = model.tokenizer.encode((data / "text" / "wiki.test.raw").read_text("utf-8"))
    assert not model.tokenizer.add_bos
    found = perplexity(model, text, windows=N_WINDOWS)
    expected = math.exp(reference_losses(their_logits, text, N_WINDOWS).mean())
    assert found.tokens == 255 * N_WINDOWS
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
